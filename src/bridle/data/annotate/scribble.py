"""Scribbles: what a hand might draw of a picture. Soft edges, cut to lines, made wobbly and thick; white on black."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from bridle.data.annotate.annotator import repeat
from bridle.data.annotate.soft_edge import edge_strength
from bridle.data.annotate.thin import Mask, thin
from bridle.data.example import Pixels

_LEAST_STROKE = 1 / 16  # shorter strokes, as a part of the short side, are specks that nobody draws
_WAVE = 1 / 12  # length over which a hand's line drifts, as a part of the short side


@dataclass(frozen=True, kw_only=True)
class Scribble:
    """Strokes along the strong edges. Fixed: all of them, drawn with a steady hand.

    Args:
        threshold: of the edge strength in [0, 1], and the range it is drawn from in training.
        thickness: of a stroke, as a part of the short side.
        blur_range: factor on the scales of the edges: more of it, fewer details.
        wobble_range: largest drift of a line, as a part of the short side.
        dropped_range: part of the strokes that are left out.
        channels: equal copies.
    """

    name: ClassVar[str] = "scribble"
    threshold: float = 0.3
    threshold_range: tuple[float, float] = (0.18, 0.5)
    thickness: float = 1 / 64
    thickness_range: tuple[float, float] = (1 / 128, 1 / 36)
    blur_range: tuple[float, float] = (0.8, 2.5)
    wobble_range: tuple[float, float] = (0.0, 1 / 40)
    dropped_range: tuple[float, float] = (0.0, 0.3)
    channels: int = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        if rng is None:
            strokes = _find_strokes(edge_strength(image), self.threshold)
            return repeat(_thicken(strokes, self.thickness), self.channels)
        strength = edge_strength(image, float(rng.uniform(*self.blur_range)))
        strokes = _find_strokes(strength, float(rng.uniform(*self.threshold_range)))
        strokes = _drop(strokes, float(rng.uniform(*self.dropped_range)), rng)
        thick = _thicken(strokes, float(rng.uniform(*self.thickness_range)))
        return repeat(_wobble(thick, float(rng.uniform(*self.wobble_range)), rng), self.channels)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def _find_strokes(strength: NDArray[np.float32], threshold: float) -> Mask:
    """Centre lines of everything above the threshold, without specks."""
    lines = thin(strength > threshold)
    labels, sizes = _label(lines)
    long: Mask = sizes >= _LEAST_STROKE * min(lines.shape)
    return lines & long[labels]


def _drop(strokes: Mask, part: float, rng: np.random.Generator) -> Mask:
    """Leave out a part of the strokes, never the longest: an empty scribble would teach nothing."""
    labels, sizes = _label(strokes)
    kept = rng.random(len(sizes)) >= part
    if len(sizes) > 1:
        kept[1 + np.argmax(sizes[1:])] = True
    return strokes & kept[labels]


def _label(lines: Mask) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number connected strokes. Returns: labels [H, W], 0 for the ground, and the pixels of each label."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(lines.astype(np.uint8), connectivity=8)
    return np.asarray(labels, dtype=np.int32), np.asarray(stats[:, cv2.CC_STAT_AREA], dtype=np.int32)


def _thicken(strokes: Mask, thickness: float) -> Pixels:
    """[H, W] uint8, 0 or 255."""
    width_px = max(2, round(thickness * min(strokes.shape)))  # the wobble would tear lines of one pixel
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px, width_px))
    return np.asarray(cv2.dilate(strokes.astype(np.uint8) * 255, brush), dtype=np.uint8)


def _wobble(strokes: Pixels, amplitude: float, rng: np.random.Generator) -> Pixels:
    """Shift every pixel by a smooth random field. Moves whole thick lines, so that none is torn."""
    height, width = strokes.shape
    short = min(height, width)
    field = np.stack([_draw_drift(height, width, _WAVE * short, rng) for _ in range(2)])
    rows, columns = np.indices((height, width), dtype=np.float32) + np.float32(amplitude * short) * field
    moved = cv2.remap(strokes, columns, rows, cv2.INTER_LINEAR)
    return np.where(np.asarray(moved) >= 128, 255, 0).astype(np.uint8)


def _draw_drift(height: int, width: int, sigma: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """[H, W] float32: smooth, its largest value 1 in either direction."""
    noise = rng.standard_normal((height, width), dtype=np.float32)
    smooth = np.asarray(cv2.GaussianBlur(noise, (0, 0), sigma))
    return np.asarray(smooth / np.abs(smooth).max(), dtype=np.float32)
