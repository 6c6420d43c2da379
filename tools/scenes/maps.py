"""What is exactly where in a picture: the maps that come with it."""

from dataclasses import dataclass

import numpy as np

WALL, FLOOR, FIRST_THING = 0, 1, 2  # labels of the segmentation


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What is exactly where, at each pixel's centre.

    depth: [H, W] float32, along the camera's axis, in radii of the things. normals: [H, W, 3] float32, unit length,
    x right, y up, z towards the camera. labels: [H, W] uint8: 0 wall, 1 floor, 2 and 3 the things. albedo: [H, W, 3].
    """

    depth: np.ndarray
    normals: np.ndarray
    labels: np.ndarray
    albedo: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Guides:
    """Noiseless means over each pixel, for taking the noise out of the picture. Shapes and units as in `Maps`."""

    albedo: np.ndarray
    normals: np.ndarray
    depth: np.ndarray
