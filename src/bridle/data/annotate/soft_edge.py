"""Soft edges without weights: bright, blurred lines on black, strong where a contour shows at several scales."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from bridle.data.annotate.annotator import repeat
from bridle.data.example import Pixels

# Gaussian widths as parts of the short side, so that a hint looks alike at 128 and at 512 px.
_SCALES = (1 / 160, 1 / 80, 1 / 40)
_LEAST_SIGMA_PX = 0.6  # below it a Gaussian no longer blurs a pixel grid
_FULL_STRENGTH = 0.995  # this quantile of the picture's own edges becomes white...
_FAINTEST = 6.0  # ...unless it is weaker than this (8-bit Lab units): noise on a flat ground stays dark


@dataclass(frozen=True, kw_only=True)
class SoftEdge:
    """Gradient strength averaged over three scales, normalised to the picture.

    Args:
        blur_range: factor on the scales, drawn in training (1 when fixed).
        gamma: of the normalised strength; below 1 lifts faint edges.
        gamma_range: drawn from in training.
        channels: equal copies.
    """

    name: ClassVar[str] = "soft_edge"
    blur_range: tuple[float, float] = (0.7, 1.6)
    gamma: float = 0.8
    gamma_range: tuple[float, float] = (0.6, 1.2)
    channels: int = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        blur, gamma = 1.0, self.gamma
        if rng is not None:
            blur, gamma = float(rng.uniform(*self.blur_range)), float(rng.uniform(*self.gamma_range))
        strength = edge_strength(image, blur) ** gamma
        return repeat(np.rint(strength * 255).astype(np.uint8), self.channels)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def edge_strength(image: Pixels, blur: float = 1.0) -> NDArray[np.float32]:
    """How strong the edge through each pixel is.

    Args:
        image: [H, W, 3] uint8, RGB.
        blur: factor on the three scales.

    Returns: [H, W] float32 in [0, 1].
    """
    lab = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2LAB)).astype(np.float32)
    sigmas = [max(_LEAST_SIGMA_PX, scale * blur * min(image.shape[:2])) for scale in _SCALES]
    strength = np.mean([_gradient(lab, sigma) for sigma in sigmas], axis=0)
    white = max(float(np.quantile(strength, _FULL_STRENGTH)), _FAINTEST)
    return np.asarray(np.clip(strength / white, 0, 1), dtype=np.float32)


def _gradient(lab: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """[H, W]: the strongest channel's gradient; times sigma, so that a step counts the same at every scale."""
    smooth = cv2.GaussianBlur(lab, (0, 0), sigma)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    return np.asarray(np.hypot(across, down).max(axis=2) * sigma, dtype=np.float32)
