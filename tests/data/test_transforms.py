"""Picture and hint go through the same geometry, and thin lines survive it."""

import cv2
import numpy as np
import pytest

from bridle.data.transforms import CENTER, Geometry, draw_geometry, fit, fit_hint, fit_image
from bridle.errors import DataError

GEOMETRIES = [Geometry(position=position, flip=flip) for position in (0.0, 0.5, 1.0) for flip in (False, True)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (16, 16)])
def test_image_and_hint_get_the_same_crop_and_flip(geometry: Geometry, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size_px in (8, 16):
        fitted, hint = fit(image, image, size_px, geometry)
        np.testing.assert_array_equal(fitted, hint)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [(16, 56), (56, 16)])
def test_a_hint_of_half_the_size_still_lies_on_its_image(geometry: Geometry, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    half = image.reshape(shape[0] // 2, 2, shape[1] // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
    fitted, hint = fit(image, half, 8, geometry)
    assert np.abs(fitted.astype(int) - hint.astype(int)).max() <= 1  # the same area averages


def test_the_cut_lies_where_the_geometry_says() -> None:
    strip = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    assert fit_image(strip, 8, Geometry(position=0.0, flip=False))[0, :, 0].tolist() == list(range(0, 80, 10))
    assert fit_image(strip, 8, CENTER)[0, :, 0].tolist() == list(range(80, 160, 10))
    assert fit_image(strip, 8, Geometry(position=1.0, flip=True))[0, :, 0].tolist() == list(range(230, 150, -10))


def test_a_hint_of_another_shape_is_an_error() -> None:
    with pytest.raises(DataError, match="30x20 px and the picture 20x20"):
        fit(np.zeros((20, 20, 3), np.uint8), np.zeros((20, 30, 3), np.uint8), 8)


@pytest.mark.parametrize("column", range(40, 48))
def test_a_line_of_one_pixel_survives_shrinking_eight_times(column: int) -> None:
    hint = np.zeros((64, 64, 1), np.uint8)
    hint[:, column] = 255
    small = fit_hint(hint, 8)
    assert small.shape == (8, 8, 1)
    assert small[:, column // 8].min() > 0


def test_enlarging_a_hint_invents_no_label() -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 7, 200], np.uint8), (10, 10, 3))
    assert set(np.unique(fit_hint(labels, 37))) == {0, 7, 200}


def test_settings_decide_what_is_drawn() -> None:
    drawn = [draw_geometry(np.random.default_rng(seed), "random", True) for seed in range(20)]
    assert len({geometry.position for geometry in drawn}) == 20
    assert {geometry.flip for geometry in drawn} == {False, True}
    assert {draw_geometry(np.random.default_rng(seed), "center", False) for seed in range(20)} == {CENTER}


@pytest.mark.parametrize("turned", [False, True])
def test_a_hint_whose_shape_was_rounded_lies_on_its_image(turned: bool) -> None:
    """By a tool that works in multiples of 64: 512 x 504 px became 512 x 512."""
    image = np.zeros((504, 512, 3), np.uint8)
    image[:, 16:20] = 255
    image[400:404] = 255
    hint = cv2.resize(image, (512, 512), interpolation=cv2.INTER_NEAREST)
    if turned:
        image, hint = image.swapaxes(0, 1), hint.swapaxes(0, 1)
    fitted, placed = fit(np.ascontiguousarray(image), np.ascontiguousarray(hint), 504)
    assert (fitted != placed).mean() < 0.01
