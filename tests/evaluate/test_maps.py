"""Figures of depth, normals and classes are those that a known difference between two maps has."""

from collections.abc import Callable

import numpy as np
import pytest

from bridle.data.palette import SEGMENTATION
from bridle.errors import HintError
from bridle.evaluate.maps import depth_rmse, miou, normals_deg, normals_within
from bridle.evaluate.measures import CONDITIONS, MEASURES, choose_measures, measure

PALETTE = np.array(list(SEGMENTATION.values()), dtype=np.uint8)


def grey(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


def tilted(angle_deg: float) -> np.ndarray:
    """Normals turned to the right, away from the camera's axis."""
    angle = np.radians(angle_deg)
    normal = np.array([np.sin(angle), 0, np.cos(angle)])
    return np.tile(np.rint((normal + 1) * 127.5).astype(np.uint8), (16, 16, 1))


def classes(*columns: int) -> np.ndarray:
    """Stripes of four columns each."""
    return PALETTE[np.tile(np.repeat(columns, 4), (16, 1))]


def test_depth_error_is_in_8_bit_steps_and_both_ways() -> None:
    assert depth_rmse(grey(100), grey(100)) == 0
    assert depth_rmse(grey(100), grey(130)) == depth_rmse(grey(130), grey(100)) == pytest.approx(30)
    assert depth_rmse(grey(0), grey(255)) == 255
    half = grey(0)
    half[:8] = 40
    assert depth_rmse(grey(0), half) == pytest.approx(40 / 2**0.5)


@pytest.mark.parametrize("angle_deg", [0, 3, 30, 90, 160])
def test_the_angle_between_normals_is_theirs(angle_deg: float) -> None:
    assert normals_deg(tilted(0), tilted(angle_deg)) == pytest.approx(angle_deg, abs=0.5)
    assert normals_deg(tilted(10), tilted(10 - angle_deg)) == pytest.approx(angle_deg, abs=0.5)


def test_equal_normals_have_no_angle() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert normals_deg(noise, noise) == pytest.approx(0, abs=1e-5)
    assert normals_within(noise, noise) == 1


def test_the_share_of_near_normals_is_counted() -> None:
    some = tilted(0)
    some[:4] = tilted(20)[:4]
    assert normals_within(tilted(0), some) == pytest.approx(0.75)
    assert normals_deg(tilted(0), some) == pytest.approx(5, abs=0.3)


def test_miou_is_the_mean_over_the_classes_of_the_hint() -> None:
    assert miou(classes(0, 1, 2, 2), classes(0, 1, 2, 2)) == 1
    # wall: one of two stripes in either; floor: one of two; thing: nothing of it is found
    assert miou(classes(0, 0, 1, 2), classes(0, 1, 1, 1)) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    # a class that the hint has not costs the others their pixels, and counts itself no further
    assert miou(classes(0, 0, 1, 1), classes(0, 3, 1, 1)) == pytest.approx((1 / 2 + 1) / 2)


def test_colours_near_a_class_are_of_that_class() -> None:
    noise = np.random.default_rng(0).integers(-60, 61, (16, 16, 3))
    wanted = classes(0, 1, 2, 3)
    assert miou(wanted, (wanted + noise).clip(0, 255).astype(np.uint8)) == 1


@pytest.mark.parametrize("compare", [depth_rmse, normals_deg, normals_within, miou])
def test_maps_of_other_shape_are_refused(compare: Callable[[np.ndarray, np.ndarray], float]) -> None:
    with pytest.raises(HintError, match=r"\[16, 16, 3\]"):
        compare(grey(0)[:8], grey(0))


@pytest.mark.parametrize("compare", [normals_deg, miou])
def test_maps_of_colours_need_three_channels(compare: Callable[[np.ndarray, np.ndarray], float]) -> None:
    with pytest.raises(HintError, match=r"\[H, W, 3\]"):
        compare(grey(0)[..., :1], grey(0)[..., :1])


@pytest.mark.parametrize(
    ("condition", "hint", "names"),
    [
        ("canny", classes(3, 3, 0, 0)[..., :1], ("f1", "f1_strict", "ssim")),
        ("soft_edge", grey(77), ("ssim",)),
        ("depth", grey(255), ("depth_rmse", "ssim")),
        ("normals", grey(77), ("normals_deg", "normals_within", "ssim")),
        ("segmentation", classes(0, 1, 2, 3), ("miou", "ssim")),
    ],
)
def test_the_condition_decides_what_it_goes_by(condition: str, hint: np.ndarray, names: tuple[str, ...]) -> None:
    assert choose_measures(condition, [hint, hint]) == names
    assert tuple(measure(names, hint, hint)) == names


def test_every_measure_of_a_condition_is_in_the_table_and_knows_what_is_better() -> None:
    for name in {name for names in CONDITIONS.values() for name in names}:
        hint, other = (classes(0, 1, 2, 3), classes(3, 2, 1, 0))
        row = MEASURES[name]
        assert row.better_by(row.compute(hint, hint, 1), row.compute(hint, other, 1)) > 0


def test_edges_are_compared_as_edges_though_shrinking_made_grey_of_them_and_soft_ones_never() -> None:
    sharp = np.zeros((32, 32, 1), np.uint8)
    sharp[8] = 255
    grey = np.where(sharp > 0, 200, 30).astype(np.uint8)
    for condition in ("canny", "scribble"):
        names = choose_measures(condition, [grey])
        assert names == ("f1", "f1_strict", "ssim")
        assert measure(names, grey, sharp)["f1_strict"] == 1
    assert choose_measures("files", [grey]) == ("ssim",)
    assert choose_measures("soft_edge", [sharp]) == ("ssim",)
