"""What every annotator promises, and what each of them draws."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from bridle.data.annotate import NAMES, get_annotator
from bridle.data.annotate.thin import thin
from bridle.errors import ConfigError

MAPS = ("depth", "normals", "segmentation")
everyone = pytest.mark.parametrize("name", NAMES)
lines = pytest.mark.parametrize("name", [name for name in NAMES if name not in MAPS])
maps = pytest.mark.parametrize("name", MAPS)


def draw_disc(height: int = 96, width: int = 128) -> np.ndarray:
    """A red disc and a blue square on white."""
    image = np.full((height, width, 3), 255, np.uint8)
    cv2.circle(image, (40, 48), 30, (200, 30, 30), -1)
    cv2.rectangle(image, (85, 30), (115, 70), (30, 30, 200), -1)
    return image


@everyone
def test_fixed_hints_are_the_same_every_time_and_drawn_ones_follow_their_generator(name: str) -> None:
    annotator, image = get_annotator(name), draw_disc()
    before = image.copy()
    fixed = annotator(image)
    assert fixed.shape == (96, 128, annotator.channels)
    assert fixed.dtype == np.uint8
    np.testing.assert_array_equal(fixed, annotator(image))
    drawn = [annotator(image, np.random.default_rng(seed)) for seed in (1, 1, *range(2, 8))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(image, before)
    if name not in ("canny", *MAPS):  # hard edges look the same at every threshold of Canny; of maps nothing is drawn
        assert any((hint != drawn[0]).any() for hint in drawn)


@lines
def test_lines_lie_on_the_edges_and_nowhere_else(name: str) -> None:
    hint = get_annotator(name)(draw_disc())[..., 0]
    shapes = (draw_disc().min(axis=2) < 255).astype(np.uint8)
    rim = shapes - cv2.erode(shapes, np.ones((3, 3), np.uint8))
    far = cv2.dilate(rim, np.ones((15, 15), np.uint8)) == 0
    near = cv2.dilate((hint > 64).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert hint[far].max() <= 64
    assert near[rim > 0].mean() > 0.95


@lines
def test_a_flat_picture_with_sensor_noise_has_no_lines(name: str) -> None:
    flat = 200 + np.random.default_rng(0).integers(0, 3, (64, 64, 3)).astype(np.uint8)
    for rng in (None, np.random.default_rng(0)):
        assert get_annotator(name)(flat, rng).max() < 64


@everyone
def test_settings_are_json_and_name_the_annotator(name: str) -> None:
    settings = get_annotator(name).settings()
    assert json.loads(json.dumps(settings))["name"] == name == get_annotator(name).name


def test_canny_thresholds_vary_with_the_generator() -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))  # steps of every strength
    image = (ramp * np.linspace(0, 1, 64)[:, None, None]).astype(np.uint8)
    image[::8] = 255 - image[::8]
    canny = get_annotator("canny")
    assert len({int(canny(image, np.random.default_rng(seed)).sum()) for seed in range(8)}) > 1


def test_a_drawn_scribble_is_never_empty() -> None:
    scribble = get_annotator("scribble")
    assert all(scribble(draw_disc(), np.random.default_rng(seed)).any() for seed in range(20))


def test_thinning_leaves_connected_lines_of_one_pixel() -> None:
    mask = np.zeros((40, 60), np.uint8)
    cv2.ellipse(mask, (30, 20), (22, 13), 0, 0, 360, 1, 5)
    lines = thin(mask > 0)
    assert lines[mask == 0].sum() == 0
    assert cv2.connectedComponents(lines.astype(np.uint8), connectivity=8)[0] == 2  # the ground and one ring
    assert cv2.connectedComponents((~lines).astype(np.uint8), connectivity=4)[0] == 3  # still closed
    assert not cv2.erode(lines.astype(np.uint8), np.ones((2, 2), np.uint8)).any()


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean canny"):
        get_annotator("cany")


def test_settings_load_without_any_picture_library() -> None:
    code = "import sys, bridle.data.settings; sys.exit(any(name in sys.modules for name in ('numpy', 'cv2', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
