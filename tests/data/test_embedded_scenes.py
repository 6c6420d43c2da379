"""The scenes that the package carries: what is written out is an ordinary data set, and its hints are exact."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridle.data import scenes
from bridle.data.palette import SEGMENTATION
from bridle.data.picture import read_hint
from bridle.data.scenes import PACKED, Scenes, read_facts, write_scenes
from bridle.data.sources import open_source
from bridle.errors import DataError

CONDITIONS = ("depth", "normals", "segmentation")
MOST_BYTES = 15_000_000  # of one file in the package


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "deep" / "scenes")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first three scenes, for what is written more than once."""
    first = read_facts()[:3]
    monkeypatch.setattr(scenes, "read_facts", lambda: first)


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_they_are_an_ordinary_data_set_with_hints_of_every_condition(written: Scenes, condition: str | None) -> None:
    source = open_source(written.folder, condition)
    assert source.quarantine == ()
    assert len(source.records) == written.train + written.held_out == 1500
    assert all(record.caption for record in source.records)
    assert source.condition == condition
    assert source.has_hints is (condition is not None)


def test_no_object_is_in_both_splits_and_all_are_free(written: Scenes) -> None:
    rows = [json.loads(line) for line in (written.folder / "metadata.jsonl").read_text().splitlines()]
    seen: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for row in rows:
        seen[row["split"]] |= {thing["model"] for thing in row["things"]}
        assert {thing["licence"] for thing in row["things"]} == {"CC0-1.0"}
    assert seen["train"].isdisjoint(seen["held_out"])
    assert len(seen["held_out"]) >= 10
    assert [row["split"] for row in rows].count("held_out") == written.held_out > 100


def test_everyone_whose_models_are_seen_is_named() -> None:
    named = (PACKED / "README.md").read_text(encoding="utf-8")
    for thing in (thing for scene in read_facts() for thing in scene["things"]):
        assert thing["creator"] in named
        assert thing["title"] in named


def test_no_file_is_too_large_to_ship() -> None:
    packed = {path.name: path.stat().st_size for path in PACKED.glob("*.zip")}
    assert set(packed) == {"pictures.zip", "depth.zip", "normals.zip", "labels.zip"}
    assert max(packed.values()) < MOST_BYTES


def read_maps(written: Scenes, name: str) -> dict[str, np.ndarray]:
    return {condition: read_hint(written.folder / condition / f"{name}.png") for condition in CONDITIONS}


@pytest.mark.parametrize("row", [0, 1, -1])
def test_the_maps_mean_what_is_written_of_them(written: Scenes, row: int) -> None:
    facts = read_facts()[row]
    maps = read_maps(written, f"{facts['number']:06}")
    assert {hint.shape for hint in maps.values()} == {(128, 128, 3)}
    depth, colours = maps["depth"], {tuple(colour) for colour in maps["segmentation"].reshape(-1, 3).tolist()}
    assert (depth.min(), depth.max()) == (0, 255)
    assert (depth == depth[..., :1]).all()
    assert colours <= set(SEGMENTATION.values())
    assert (SEGMENTATION["second thing"] in colours) is (len(facts["things"]) == 2)
    lengths = np.linalg.norm(maps["normals"] / 127.5 - 1, axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=0.02)


def test_near_is_bright_floors_point_up_and_walls_at_us(written: Scenes) -> None:
    """By what every scene has: a floor that comes nearer towards the lower edge, and a wall behind the thing."""
    numbers = [f["number"] for f in read_facts()[:300] if "floor in front of" in f["caption"]][:20]
    assert len(numbers) == 20
    for number in numbers:
        maps = read_maps(written, f"{number:06}")
        floor, wall, thing = (
            (maps["segmentation"] == SEGMENTATION[name]).all(-1) for name in ("floor", "wall", "thing")
        )
        depth, normals = maps["depth"][..., 0], maps["normals"].astype(int)
        assert np.corrcoef(np.nonzero(floor)[0], depth[floor])[0, 1] > 0.9
        assert depth[thing].mean() > depth[wall].mean()
        assert normals[floor][:, 1].mean() > 128 < normals[floor][:, 2].mean()
        assert normals[wall][:, 2].mean() > 128


def test_writing_again_changes_nothing(few: None, tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "scenes")
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert write_scenes(tmp_path / "scenes") == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == times
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_empty_folder_is_filled(few: None, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    assert (write_scenes(tmp_path / "scenes").folder / "metadata.jsonl").is_file()


@pytest.mark.parametrize("name", ["metadata.jsonl", "depth/000001.png"])
def test_a_folder_that_holds_anything_else_is_left_alone(few: None, tmp_path: Path, name: str) -> None:
    folder = write_scenes(tmp_path / "scenes").folder
    (folder / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=rf"is not empty, and its {name} .*; give another folder"):
        write_scenes(folder)
    assert (folder / name).read_bytes() == b"mine"


def test_a_file_in_the_way_is_left_alone(few: None, tmp_path: Path) -> None:
    (tmp_path / "scenes").write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        write_scenes(tmp_path / "scenes")


def test_a_write_that_is_interrupted_leaves_nothing(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(pixels: np.ndarray) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "_to_png", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes")
    assert list(tmp_path.iterdir()) == []


def test_the_classes_can_be_told_apart() -> None:
    assert list(SEGMENTATION) == ["wall", "floor", "thing", "second thing"]
    colours = np.array(list(SEGMENTATION.values()))
    channels_apart = (np.abs(colours[:, None] - colours) == 255).sum(-1) + 2 * np.eye(4, dtype=int)
    assert channels_apart.min() == 2


def test_pictures_are_copied_as_they_were_packed(few: None, tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes").folder
    for path in sorted((folder / "pictures").iterdir()):
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("WEBP", (128, 128))
