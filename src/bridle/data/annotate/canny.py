"""Canny edges: thin white lines on black."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import cv2
import numpy as np

from bridle.data.annotate.annotator import repeat
from bridle.data.example import Pixels


@dataclass(frozen=True, kw_only=True)
class Canny:
    """Canny on the colour picture, which sees edges between colours of equal grey.

    Args:
        low, high: fixed thresholds of the gradient, 8-bit Sobel units; those of the official demo.
        low_range: from which the lower one is drawn in training.
        gap_range: from which the distance to the upper one is drawn in training.
        channels: equal copies of the edge map.

    Source: the random thresholds: arXiv:2302.05543, section 4 ("Canny edge"); the ranges are ours.
    """

    name: ClassVar[str] = "canny"
    low: float = 100
    high: float = 200
    low_range: tuple[float, float] = (50, 150)
    gap_range: tuple[float, float] = (50, 150)
    channels: int = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        low, high = self.low, self.high
        if rng is not None:
            low = float(rng.uniform(*self.low_range))
            high = low + float(rng.uniform(*self.gap_range))
        return repeat(np.asarray(cv2.Canny(image, low, high), dtype=np.uint8), self.channels)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}
