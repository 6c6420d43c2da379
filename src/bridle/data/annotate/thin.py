"""Thinning: blobs of line in, lines of one pixel out."""

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

# Each neighbour's bit in a pixel's code: clockwise from north, the lowest bit first.
_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], dtype=np.float32)


def thin(mask: Mask) -> Mask:
    """Peel a mask from its rim until only centre lines are left; what was connected stays connected.

    Args: mask: [H, W] bool.
    Returns: [H, W] bool.
    Source: Zhang and Suen, A fast parallel algorithm for thinning digital patterns, CACM 27(3), 1984.
    """
    lines = mask.astype(np.uint8)
    peeled = True
    while peeled:
        peeled = False
        for removed in _build_tables():
            codes = cv2.filter2D(lines, -1, _BITS, borderType=cv2.BORDER_CONSTANT)
            rim = np.asarray(cv2.LUT(codes, removed), dtype=np.uint8) & lines
            lines ^= rim
            peeled |= bool(rim.any())
    return lines.astype(bool)


@cache
def _build_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """[256] each: 1 where a pixel with these neighbours goes; first the south-east rim, then the north-west one."""
    codes = np.arange(256)
    ring = [(codes >> bit & 1).astype(bool) for bit in range(8)]
    north, _, east, _, south, _, west, _ = ring
    count = np.sum(ring, axis=0)
    starts = np.sum([~here & after for here, after in zip(ring, ring[1:] + ring[:1], strict=True)], axis=0)
    inner = (count >= 2) & (count <= 6) & (starts == 1)
    south_east = inner & ~(north & east & south) & ~(east & south & west)
    north_west = inner & ~(north & east & west) & ~(north & south & west)
    return south_east.astype(np.uint8), north_west.astype(np.uint8)
