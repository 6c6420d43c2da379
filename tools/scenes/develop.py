"""From light values to a picture: the noise taken out, the exposure set, highlights bent instead of clipped."""

import colours
import numpy as np
from maps import Guides

REACH_PX = 4
SPREAD_PX = 2.5
NORMAL_SPREAD = 0.25
DEPTH_SPREAD = 0.05  # relative
LIGHT_SPREAD = 0.22  # of the logarithm of the light, so that the borders of shadows stay
DARKEST = 0.04  # surfaces darker than this shine more than they show colour
WELL_LIT = 50  # the percentile of the picture whose surface is shown in its own colour
KNEE = 0.82  # light values above it are bent towards 1


def denoise(light: np.ndarray, guides: Guides) -> np.ndarray:
    """Average what the light does to the surfaces, not the surfaces: [H, W, 3] light values in and out.

    A cross-bilateral filter over the light divided by the albedo, guided by noiseless normals and depth.
    """
    albedo = np.maximum(guides.albedo, DARKEST)
    shading = light / albedo
    level = np.log(_blur(np.maximum(shading.mean(-1), 1e-3)))
    total, weights = np.zeros_like(shading), np.zeros(shading.shape[:2])
    for down in range(-REACH_PX, REACH_PX + 1):
        for right in range(-REACH_PX, REACH_PX + 1):
            normals, depth, near, value = (
                _shift(array, down, right) for array in (guides.normals, guides.depth, level, shading)
            )
            weight = np.exp(
                -(down**2 + right**2) / (2 * SPREAD_PX**2)
                - ((normals - guides.normals) ** 2).sum(-1) / (2 * NORMAL_SPREAD**2)
                - ((depth / guides.depth - 1) / DEPTH_SPREAD) ** 2 / 2
                - ((near - level) / LIGHT_SPREAD) ** 2 / 2
            )
            total += weight[..., None] * value
            weights += weight
    return total / weights[..., None] * albedo


def expose(light: np.ndarray, guides: Guides) -> np.ndarray:
    """The picture, [H, W, 3] uint8 sRGB: lit surfaces in their own colours, whatever the lamp's power was."""
    shading = light.mean(-1) / np.maximum(guides.albedo.mean(-1), DARKEST)
    values = light / np.percentile(shading, WELL_LIT)
    bent = KNEE + (1 - KNEE) * (1 - np.exp(-np.maximum(values - KNEE, 0) / (1 - KNEE)))
    return np.round(colours.to_srgb(np.where(values < KNEE, values, bent)) * 255).astype(np.uint8)


def _blur(values: np.ndarray) -> np.ndarray:
    return np.mean([_shift(values, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)], 0)


def _shift(array: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move by so many pixels, the border repeated."""
    rows = np.clip(np.arange(array.shape[0]) - down, 0, array.shape[0] - 1)
    columns = np.clip(np.arange(array.shape[1]) - right, 0, array.shape[1] - 1)
    return array[rows][:, columns]
