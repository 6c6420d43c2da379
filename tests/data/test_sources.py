"""A folder becomes records; whatever cannot be used is named, never skipped and never guessed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bridle.data.sources import open_source
from bridle.errors import DataError

WritePicture = Callable[..., Path]


def write_lines(path: Path, *rows: object) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_fill50k_and_metadata_give_the_same_pairs(tmp_path: Path, write_picture: WritePicture) -> None:
    for number in range(3):
        write_picture(f"target/{number}.png", number)
        write_picture(f"source/{number}.png", 100 + number)
    names = [(f"target/{number}.png", f"source/{number}.png", f"circle {number}") for number in range(3)]
    write_lines(tmp_path / "prompt.json", *({"source": h, "target": i, "prompt": c} for i, h, c in names))
    fill50k = open_source(tmp_path)
    (tmp_path / "prompt.json").unlink()
    write_lines(
        tmp_path / "metadata.jsonl", *({"file_name": i, "conditioning_image": h, "text": c} for i, h, c in names)
    )
    assert open_source(tmp_path) == fill50k
    assert fill50k.has_hints
    assert [(r.id, r.caption) for r in fill50k.records] == [(i, c) for i, _, c in names]


def test_metadata_and_a_folder_of_text_files_give_the_same_pairs(tmp_path: Path, write_picture: WritePicture) -> None:
    for name in ("a.png", "deep/er/b.JPG"):
        write_picture(name).with_suffix(".txt").write_text(f" a picture of {name}\n")
    folder = open_source(tmp_path)
    rows = [{"file_name": name, "caption": f"a picture of {name}"} for name in ("a.png", "deep/er/b.JPG")]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    assert open_source(tmp_path) == folder
    assert not folder.has_hints
    assert [record.id for record in folder.records] == ["a.png", "deep/er/b.JPG"]


def write_columns(tmp_path: Path, write_picture: WritePicture, *columns: dict[str, object]) -> None:
    """Rows of a metadata.jsonl, one for each dictionary of columns; every file that is named is there."""
    for number, more in enumerate(columns):
        write_picture(f"{number}.png", number)
        for name in more.values():
            if isinstance(name, str) and name.endswith(".png"):
                write_picture(name)
    write_lines(
        tmp_path / "metadata.jsonl",
        *({"file_name": f"{number}.png", "text": "", **more} for number, more in enumerate(columns)),
    )


def test_hints_come_from_the_conditions_own_column(tmp_path: Path, write_picture: WritePicture) -> None:
    write_columns(tmp_path, write_picture, *({"depth": f"d{n}.png", "canny": f"c{n}.png"} for n in range(2)))
    for condition in ("depth", "canny"):
        source = open_source(tmp_path, condition)
        hints = [record.hint.name for record in source.records if record.hint]
        assert hints == [f"{condition[0]}{n}.png" for n in range(2)]
        assert source.condition == condition
    for condition in ("scribble", None):
        assert not open_source(tmp_path, condition).has_hints
        assert open_source(tmp_path, condition).condition is None


def test_a_column_that_is_called_hint_goes_before_the_conditions(tmp_path: Path, write_picture: WritePicture) -> None:
    write_columns(tmp_path, write_picture, {"depth": "d0.png"}, {"depth": "d1.png", "conditioning_image": "h.png"})
    source = open_source(tmp_path, "depth")
    assert [(record.id, record.hint) for record in source.records] == [("1.png", tmp_path / "h.png")]
    assert source.condition is None
    assert [item.reason for item in source.quarantine] == ["names no hint while others do"]


def test_a_line_without_the_conditions_column_is_set_aside(tmp_path: Path, write_picture: WritePicture) -> None:
    write_columns(tmp_path, write_picture, {"depth": "d0.png"}, {}, {"depth": None}, {"depth": 3.5})
    source = open_source(tmp_path, "depth")
    assert [record.id for record in source.records] == ["0.png"]
    assert {item.id: item.reason for item in source.quarantine} == {
        "1.png": "names no hint while others do",
        "2.png": "names no hint while others do",
        "3.png": "depth is 3.5; expected text (metadata.jsonl:4)",
    }


def test_a_column_without_a_single_usable_hint_leaves_them_to_the_annotator(
    tmp_path: Path, write_picture: WritePicture
) -> None:
    write_columns(tmp_path, write_picture, {"depth": 3.5}, {})
    source = open_source(tmp_path, "depth")
    assert [record.id for record in source.records] == ["1.png"]
    assert (source.condition, source.has_hints) == (None, False)


def test_splits_by_any_of_their_names(tmp_path: Path, write_picture: WritePicture) -> None:
    names = ("train", "held_out", "validation", "val", "test", None)
    write_columns(tmp_path, write_picture, *({"split": name} for name in names), {})
    splits = [record.split for record in open_source(tmp_path).records]
    assert splits == ["train", *["held_out"] * 4, None, None]


@pytest.mark.parametrize("split", ["Train", "dev", 1, ["train"]])
def test_an_unknown_split_is_set_aside_and_never_trained_on(
    split: object, tmp_path: Path, write_picture: WritePicture
) -> None:
    write_columns(tmp_path, write_picture, {"split": split}, {})
    source = open_source(tmp_path)
    assert [record.id for record in source.records] == ["1.png"]
    expected = f"split is {split!r}; expected one of train, held_out, validation, val, test"
    assert source.quarantine[0].reason.startswith(expected)


BAD_ROWS = {
    "not a line of JSON": "{'file_name': 1}",
    "not a JSON object": [1, 2],
    "file_name is missing": {"text": "x"},
    "file_name is 3; expected text": {"file_name": 3, "text": "x"},
    "text or caption or prompt is missing": {"file_name": "good.png"},
    "half a character": '{"file_name": "good.png", "text": "\\ud800"}',
    "gone.png is missing": {"file_name": "gone.png", "text": "x"},
    "hint.png is missing": {"file_name": "good.png", "text": "x", "hint": "hint.png"},
    "../outside.png leads out of the data folder": {"file_name": "../outside.png", "text": "x"},
    "../data/good.png leads out of the data folder": {"file_name": "../data/good.png", "text": "x"},
    "x/../../data/good.png leads out": {"file_name": "good.png", "text": "x", "hint": "x/../../data/good.png"},
    "link.png leads out of the data folder": {"file_name": "link.png", "text": "x"},
    "'a\\x00b' is no usable path": {"file_name": "a\0b", "text": "x"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_every_bad_line_is_named_and_set_aside(reason: str, tmp_path: Path, write_picture: WritePicture) -> None:
    data = tmp_path / "data"
    write_picture("data/good.png")
    (data / "x").mkdir()
    (data / "link.png").symlink_to(write_picture("outside.png"))
    write_lines(data / "metadata.jsonl", BAD_ROWS[reason])
    with pytest.raises(DataError, match="no usable pair; 1 were set aside"):
        open_source(data)
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "good.png", "text": "fine"}) + "\n")
    source = open_source(data)
    assert [record.caption for record in source.records] == ["fine"]
    assert len(source.quarantine) == 1
    assert reason in source.quarantine[0].reason
    assert "metadata.jsonl:1" in source.quarantine[0].id + source.quarantine[0].reason


def test_an_absolute_path_is_refused_even_into_the_folder(tmp_path: Path, write_picture: WritePicture) -> None:
    write_lines(tmp_path / "metadata.jsonl", {"file_name": str(write_picture("a.png")), "text": "x"})
    with pytest.raises(DataError, match="leads out of the data folder"):
        open_source(tmp_path)


def test_the_second_line_of_a_picture_is_set_aside(tmp_path: Path, write_picture: WritePicture) -> None:
    write_picture("a.png")
    rows = [{"file_name": name, "text": name} for name in ("a.png", "./x/../a.png")]
    (tmp_path / "x").mkdir()
    write_lines(tmp_path / "metadata.jsonl", *rows)
    source = open_source(tmp_path)
    assert [record.caption for record in source.records] == ["a.png"]
    assert [item.id for item in source.quarantine] == ["a.png"]


def test_hints_are_for_all_pairs_or_for_none(tmp_path: Path, write_picture: WritePicture) -> None:
    for name in ("a.png", "b.png", "h.png"):
        write_picture(name)
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b", "hint": "h.png"}]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    source = open_source(tmp_path)
    assert [record.id for record in source.records] == ["b.png"]
    assert [item.reason for item in source.quarantine] == ["names no hint while others do"]


def test_a_picture_without_a_readable_caption_is_set_aside(tmp_path: Path, write_picture: WritePicture) -> None:
    write_picture("good.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfgood")
    write_picture("none.png")
    write_picture("latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    source = open_source(tmp_path)
    assert [(record.id, record.caption) for record in source.records] == [("good.png", "good")]
    assert {item.id: item.reason for item in source.quarantine} == {
        "none.png": "none.txt is missing",
        "latin.png": "latin.txt is not UTF-8 text",
    }


def test_a_file_name_that_is_not_utf8_is_set_aside(tmp_path: Path, write_picture: WritePicture) -> None:
    write_picture("good.png").with_suffix(".txt").write_text("good")
    write_picture(os.fsdecode(b"caf\xe9.png"))
    source = open_source(tmp_path)
    assert [item.id for item in source.quarantine] == ["caf\\udce9.png"]


@pytest.mark.parametrize(("make", "message"), [(False, "does not exist"), (True, "holds no pictures")])
def test_an_empty_folder_is_an_error(make: bool, message: str, tmp_path: Path) -> None:
    if make:
        (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data")


def test_two_lists_are_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "metadata.jsonl")
    write_lines(tmp_path / "prompt.json")
    with pytest.raises(DataError, match="remove the one"):
        open_source(tmp_path)


def test_pictures_of_other_formats_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "b.gif", "b.txt", "c.TIFF", "notes.md"):
        (tmp_path / name).touch()
    source = open_source(tmp_path)
    assert [record.id for record in source.records] == ["a.png"]
    assert [item.id for item in source.quarantine] == ["b.gif", "c.TIFF"]
    assert "is a .gif file; save it as PNG" in source.quarantine[0].reason
