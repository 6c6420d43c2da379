"""Where the camera stands, so that the things fill the wanted part of the frame and nothing is cut off.

World: y up, the camera looks roughly along -z. The frame is square, its coordinates in [-1, 1], y up.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 25


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole. right, up, forward: [3], orthonormal; `view_deg`: the full angle of view."""

    origin: np.ndarray
    right: np.ndarray
    up: np.ndarray
    forward: np.ndarray
    view_deg: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """Frame coordinates of points [N, 3]; returns [N, 2]."""
        seen = points - self.origin
        flat = np.stack([seen @ self.right, seen @ self.up], 1)
        return flat / ((seen @ self.forward) * np.tan(np.radians(self.view_deg) / 2))[:, None]


def frame(
    points: np.ndarray, azimuth_deg: float, elevation_deg: float, view_deg: float, fill: float,
    shift: tuple[float, float],
) -> Camera:  # fmt: skip
    """The camera that sees `points` [N, 3] over `fill` of the frame's larger side, their middle moved by `shift`."""
    azimuth, elevation = np.radians([azimuth_deg, elevation_deg])
    away = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)])
    up = np.cross(away, right)
    middle = (points.min(0) + points.max(0)) / 2
    reach = np.linalg.norm(points - middle, axis=1).max()
    tangent = np.tan(np.radians(view_deg) / 2)
    distance, target = 1.5 * reach / tangent + reach, middle
    for _ in range(ROUNDS):
        camera = Camera(origin=target + distance * away, right=right, up=up, forward=-away, view_deg=view_deg)
        seen = camera.project(points)
        low, high = seen.min(0), seen.max(0)
        offset = ((low + high) / 2 - np.array(shift)) * distance * tangent
        target = target + offset[0] * right + offset[1] * up
        distance = max(distance * (1 + 0.7 * ((high - low).max() / 2 / fill - 1)), 1.05 * reach)
    return camera
