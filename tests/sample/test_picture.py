"""A picture carries what made it, and a sheet shows every picture it was given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridle.errors import SampleError
from bridle.sample.picture import grid, read_settings, save_picture

SETTINGS = {
    "prompt": "ein Kätzchen 猫 🐈",
    "negative_prompt": "blur",
    "steps": 20,
    "sampler": "DDIM",
    "guidance": 7.5,
    "seed": 2**40,
    "controls": [{"hint": "canny", "scale": 0.8}],
}


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def test_settings_and_pixels_come_back(tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "new folder" / "cat.png"
    save_picture(image, path, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert [file.name for file in path.parent.iterdir()] == ["cat.png"]


def test_other_tools_find_the_form_they_know(tmp_path: Path, image: np.ndarray) -> None:
    save_picture(image, tmp_path / "cat.png", SETTINGS)
    with Image.open(tmp_path / "cat.png") as picture:
        shown = picture.info["parameters"]
    assert shown.splitlines() == [
        "ein Kätzchen 猫 🐈",
        "Negative prompt: blur",
        f"Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: {2**40}, Size: 32x24",
    ]


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_a_picture_of_another_kind_is_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(SampleError, match="expected uint8"):
        save_picture(wrong, tmp_path / "cat.png", {})


def test_a_setting_that_json_cannot_hold_is_named(tmp_path: Path, image: np.ndarray) -> None:
    for value in (tmp_path, float("nan"), "caf\udce9.png"):
        with pytest.raises(SampleError, match="setting where"):
            save_picture(image, tmp_path / "cat.png", {"where": value})
    assert list(tmp_path.iterdir()) == []


def test_files_without_our_settings_are_refused(tmp_path: Path, image: np.ndarray) -> None:
    plain, text, damaged = tmp_path / "plain.png", tmp_path / "text.png", tmp_path / "damaged.png"
    Image.fromarray(image).save(plain)
    text.write_text("no picture")
    save_picture(image, damaged, {"a": 1})
    damaged.write_bytes(damaged.read_bytes()[:60])
    for path, words in ((plain, "no settings"), (text, "cannot be read"), (tmp_path / "none.png", "does not exist")):
        with pytest.raises(SampleError, match=words):
            read_settings(path)
    with pytest.raises(SampleError):
        read_settings(damaged)


def test_a_sheet_shows_every_picture_whole() -> None:
    colours = [[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(200, 200, 0), (0, 200, 200), (200, 0, 200)]]
    rows = [[np.full((260, 300, 3), colour, np.uint8) for colour in row] for row in colours]
    sheet = grid(rows, ["left", "a title that is much too long for its column", "right"], ["first", "second"])
    for row, expected in enumerate(colours):
        for column, colour in enumerate(expected):
            places = np.argwhere((sheet == colour).all(-1))
            assert len(places) == 260 * 300
            assert (places.min(0) // sheet.shape[:2]).tolist() == [0, 0]
            top, left = places.min(0)
            assert (top > sheet.shape[0] // 2 - 100) == (row == 1)
            assert left // (sheet.shape[1] // 3) == column


def test_long_titles_stay_in_their_column() -> None:
    dark = [np.zeros((256, 256, 3), np.uint8)] * 2
    short, long = grid([dark], ["", "b"]), grid([dark], ["W" * 80, "b"])
    assert not np.array_equal(short, long)
    assert np.array_equal(short[:, 28 + 256 + 6 :], long[:, 28 + 256 + 6 :])


@pytest.mark.parametrize(
    ("rows", "columns", "captions", "words"),
    [
        ([], ["a"], None, "at least one"),
        ([[np.zeros((8, 8, 3), np.uint8)]], ["a", "b"], None, "row 0 holds 1"),
        ([[np.zeros((8, 8, 3), np.uint8)]], ["a"], ["x", "y"], "2 captions for 1"),
        ([[np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]], ["a", "b"], None, "different size"),
    ],
)
def test_a_sheet_that_does_not_add_up_is_refused(
    rows: list[list[np.ndarray]], columns: list[str], captions: list[str] | None, words: str
) -> None:
    with pytest.raises(SampleError, match=words):
        grid(rows, columns, captions)
