"""What every annotator keeps to."""

from typing import Any, Protocol

import numpy as np

from bridle.data.example import Pixels


class Annotator(Protocol):
    """A picture in, a hint of the same size out. Frozen: two annotators with equal settings do the same."""

    @property
    def name(self) -> str:
        """As in the table of `bridle.data.annotate`."""

    @property
    def channels(self) -> int:
        """K of the hint. 3 by default, even of a grey hint: other tools expect RGB."""

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        """Annotate one picture.

        Args:
            image: [H, W, 3] uint8, RGB.
            rng: draws the thresholds (training), or None for fixed ones (sampling, measuring).

        Returns: [H, W, K] uint8.
        """

    def settings(self) -> dict[str, Any]:
        """Everything that the hint depends on, as JSON can hold it; part of the cache's fingerprint."""


def repeat(grey: Pixels, channels: int) -> Pixels:
    """[H, W] to [H, W, channels], all equal."""
    return np.repeat(grey[..., None], channels, axis=2)
