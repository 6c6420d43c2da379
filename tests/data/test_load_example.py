"""Draws depend on seed, id and variant, and on nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridle.data.annotate import get_annotator
from bridle.data.example import Example, Record
from bridle.data.load import choose_held_out, load_example
from bridle.data.picture import read_picture
from bridle.data.settings import DataSettings
from bridle.data.transforms import fit_image
from bridle.errors import ConfigError

WritePicture = Callable[..., Path]
CANNY = get_annotator("canny")


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


def test_a_new_picture_pushes_out_one_held_out_pair_at_most() -> None:
    ids = [f"{number}.png" for number in range(200)]
    before = choose_held_out(ids, 16)
    assert len(before) == 16
    assert choose_held_out(reversed(ids), 16) == before
    for number in range(50):
        assert len(before - choose_held_out([*ids, f"new {number}.png"], 16)) <= 1


@pytest.mark.parametrize(
    "values",
    [{"size_px": 100}, {"size_px": 0}, {"held_out": -1}, {"variants": 0}, {"annotator": "x"}, {"crop": "left"}],
)
def test_settings_out_of_range_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        make_settings(**values)
