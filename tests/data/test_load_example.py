"""Draws depend on seed, id and variant, and on nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridle.data.annotate import get_annotator
from bridle.data.example import Example, Pixels, Record
from bridle.data.load import choose_held_out, load_example, share_out
from bridle.data.picture import read_picture
from bridle.data.settings import DataSettings
from bridle.data.transforms import fit_image
from bridle.errors import ConfigError

WritePicture = Callable[..., Path]
CANNY = get_annotator("canny")


@dataclass(frozen=True)
class Named:
    """An annotator of which only the name counts, because the hints come from files."""

    name: str
    channels: int = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}


def make_settings(**values: Any) -> DataSettings:
    return DataSettings(**{"folder": Path("unused"), "size_px": 16, "crop": "random", **values})


def same(one: Example, two: Example) -> bool:
    return np.array_equal(one.image, two.image) and np.array_equal(one.hint, two.hint)


@pytest.fixture
def records(write_picture: WritePicture) -> list[Record]:
    path = write_picture("a.png", width=200)
    return [Record(id=f"{number}.png", image=path, hint=None, caption="") for number in range(6)]


def test_draws_do_not_depend_on_order(records: list[Record]) -> None:
    jobs = [(record, variant) for record in records for variant in range(3)]
    forward = {(r.id, v): load_example(r, make_settings(), CANNY, v, train=True) for r, v in jobs}
    backward = {(r.id, v): load_example(r, make_settings(), CANNY, v, train=True) for r, v in reversed(jobs)}
    assert all(same(forward[key], backward[key]) for key in forward)
    assert len({example.image.tobytes() for example in forward.values()}) > 12  # of 18; some cuts may coincide
    other = load_example(records[0], make_settings(seed=1), CANNY, 0, train=True)
    assert not same(other, forward[records[0].id, 0])


def test_held_out_pairs_are_never_drawn(records: list[Record]) -> None:
    image = fit_image(read_picture(records[0].image), 16)
    soft_edge = get_annotator("soft_edge")  # unlike Canny's, its draws show in every pixel
    for record in records:
        example = load_example(record, make_settings(), soft_edge, 0, train=False)
        np.testing.assert_array_equal(example.image, image)
        np.testing.assert_array_equal(example.hint, soft_edge(image))


def test_a_hint_from_a_file_follows_its_picture(write_picture: WritePicture) -> None:
    path = write_picture("a.png", width=60)
    record = Record(id="a", image=path, hint=path, caption="")
    for variant in range(8):
        example = load_example(record, make_settings(), CANNY, variant, train=True)
        np.testing.assert_array_equal(example.image, example.hint)


@pytest.mark.parametrize("name", ["normals", "depth"])
def test_of_a_mirrored_pair_only_normals_turn_their_x(name: str, write_picture: WritePicture) -> None:
    path = write_picture("a.png", width=16)
    record, turned = Record(id="a", image=path, hint=path, caption=""), []
    for variant in range(8):
        example = load_example(record, make_settings(), Named(name), variant, train=True)
        plain = load_example(record, make_settings(flip=False), Named(name), variant, train=True)
        mirrored = not np.array_equal(example.image, plain.image)
        turned.append(mirrored)
        expected = example.image.copy()
        if mirrored and name == "normals":
            expected[..., 0] = 255 - expected[..., 0]
        np.testing.assert_array_equal(example.hint, expected)
    assert {True, False} == set(turned)


def test_a_grey_hint_has_three_equal_channels(tmp_path: Path, write_picture: WritePicture) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "depth.png")
    record = Record(id="a", image=write_picture("a.png"), hint=tmp_path / "depth.png", caption="")
    example = load_example(record, make_settings(crop="center"), Named("depth"), 0, train=False)
    np.testing.assert_array_equal(example.hint, np.repeat(grey[:, 4:20, None], 3, axis=2))


def split_records(*splits: str | None) -> list[Record]:
    return [
        Record(id=f"{number}.png", image=Path(), hint=None, caption="", split=split)
        for number, split in enumerate(splits)
    ]


def test_pairs_that_the_data_set_holds_out_are_never_trained_on() -> None:
    records = split_records(*["train", "held_out", None] * 20)
    for count in (0, 5, 20, 30):
        train, held_out = share_out(records, count)
        assert [record.split for record in train] == ["train", None] * 20
        assert len(held_out) == min(count, 20)
        assert {record.split for record in held_out} <= {"held_out"}
    assert set(map(id, share_out(records, 5)[1])) <= set(map(id, share_out(records, 6)[1]))


def test_a_data_set_that_holds_none_out_is_shared_by_hash() -> None:
    records = split_records(*["train", None] * 20)
    train, held_out = share_out(records, 5)
    assert {record.id for record in held_out} == choose_held_out([record.id for record in records], 5)
    assert [record for record in records if record not in held_out] == train


def test_a_new_picture_pushes_out_one_held_out_pair_at_most() -> None:
    ids = [f"{number}.png" for number in range(200)]
    before = choose_held_out(ids, 16)
    assert len(before) == 16
    assert choose_held_out(reversed(ids), 16) == before
    for number in range(50):
        assert len(before - choose_held_out([*ids, f"new {number}.png"], 16)) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"size_px": 100},
        {"size_px": 0},
        {"size_px": 8},
        {"held_out": -1},
        {"variants": 0},
        {"annotator": "x"},
        {"crop": "left"},
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"(setting data\.|unknown ){next(iter(values))} "):
        make_settings(**values)
