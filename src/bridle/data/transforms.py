"""The same square cut, resize and mirror for a picture and its hint.

The square is cut from the source and then resized, which gives the same pixels as resizing the short side first but
never holds more than the source: a strip of 1 x 30,000 pixels cannot grow.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from bridle.data.example import Pixels
from bridle.errors import DataError

_ASPECT_TOLERANCE = 0.02  # a hint saved at half size may be off by the rounding of one pixel


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the square lies, in units that fit a picture and a hint of any resolution.

    Args:
        position: along the longer side, from 0 (left or top) to 1 (right or bottom).
        flip: mirror left and right.
    """

    position: float
    flip: bool


CENTER = Geometry(position=0.5, flip=False)


def draw_geometry(rng: np.random.Generator, crop: Literal["random", "center"], flip: bool) -> Geometry:
    """Draw a cut. Both numbers are drawn whatever the settings, so that one setting does not move the other's draw."""
    position, coin = rng.random(2)
    return Geometry(position=float(position) if crop == "random" else 0.5, flip=flip and bool(coin < 0.5))


def fit(image: Pixels, hint: Pixels, size_px: int, geometry: Geometry = CENTER) -> tuple[Pixels, Pixels]:
    """Cut and resize a pair to [size_px, size_px], pixel on pixel.

    Args:
        image: [H, W, 3] uint8.
        hint: [H', W', K] uint8, of the image's aspect ratio but any resolution.
        size_px: side of the result.
        geometry: shared by both.

    Returns: image [size_px, size_px, 3] and hint [size_px, size_px, K], uint8.
    Raises: DataError: the two have different aspect ratios.
    """
    (height, width), (hint_height, hint_width) = image.shape[:2], hint.shape[:2]
    ratio = (width * hint_height) / (height * hint_width)
    if abs(ratio - 1) > _ASPECT_TOLERANCE:
        raise DataError(
            f"the hint is {hint_width}x{hint_height} px and the picture {width}x{height}; expected one shape"
        )
    wanted = round(hint_height * width / height)
    if abs(hint_width - wanted) > 1:  # of another shape, such as one rounded to 64: stretched back onto the picture
        stretched = cv2.resize(hint, (wanted, hint_height), interpolation=cv2.INTER_NEAREST_EXACT)
        hint = np.asarray(stretched, np.uint8).reshape(hint_height, wanted, -1)
    return fit_image(image, size_px, geometry), fit_hint(hint, size_px, geometry)


def fit_image(image: Pixels, size_px: int, geometry: Geometry = CENTER) -> Pixels:
    """Cut and resize a picture: area averages when shrinking (no aliasing), cubic when enlarging.

    Args: image: [H, W, K] uint8.
    Returns: [size_px, size_px, K] uint8.
    """
    return _resize(_cut(image, geometry), size_px, cv2.INTER_CUBIC)


def fit_hint(hint: Pixels, size_px: int, geometry: Geometry = CENTER) -> Pixels:
    """Cut and resize a hint: area averages when shrinking, nearest when enlarging.

    Nearest would drop whole pixels of a thin line when shrinking; an average keeps every line whole, only fainter, and
    mixes two labels in the one pixel between them at most. Enlarging invents no value: a label stays that label.

    Args: hint: [H, W, K] uint8.
    Returns: [size_px, size_px, K] uint8.
    """
    return _resize(_cut(hint, geometry), size_px, cv2.INTER_NEAREST_EXACT)


def mirror_normals(hint: Pixels) -> Pixels:
    """Turn the normals of a map that was mirrored as a picture: x, its red, points the other way.

    Args: hint: [H, W, 3] uint8, (n + 1) / 2 * 255 of x right, y up, z towards the camera.
    Returns: the same shape.
    """
    mirrored = hint.copy()
    mirrored[..., 0] = 255 - mirrored[..., 0]
    return mirrored


def _cut(pixels: Pixels, geometry: Geometry) -> Pixels:
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = round(geometry.position * (height - side)), round(geometry.position * (width - side))
    square = pixels[top : top + side, left : left + side]
    return np.ascontiguousarray(square[:, ::-1] if geometry.flip else square)


def _resize(square: Pixels, size_px: int, enlarge: int) -> Pixels:
    if square.shape[0] == size_px:
        return square
    how = cv2.INTER_AREA if square.shape[0] > size_px else enlarge
    resized = cv2.resize(square, (size_px, size_px), interpolation=how)
    return np.asarray(resized, dtype=np.uint8).reshape(size_px, size_px, -1)  # cv2 drops an axis of one channel
