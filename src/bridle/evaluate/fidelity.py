"""How well a picture follows its hint, for hints of any kind: two maps in, figures of which 1 is best out.

The output is annotated again by what made the hint, and the two maps are compared: binary ones (canny, scribble) by
the F1 of their pixels, all by their structural similarity. `maps.py` has the figures of depth, normals and classes.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from bridle.errors import HintError

TOLERANCE_PX = 1
WINDOW_PX = 11
SIGMA_PX = 1.5
K1, K2, RANGE = 0.01, 0.03, 255.0


@dataclass(frozen=True)
class EdgeMatch:
    """Where two edge maps meet; each field is a bool map [H, W] or [H, W, K]."""

    hit: np.ndarray
    """Reference edges with an output edge near by."""
    missed: np.ndarray
    """Reference edges without one."""
    extra: np.ndarray
    """Output edges without a reference edge near by."""


def sharpen(edges: np.ndarray) -> np.ndarray:
    """Edges as they were before JPEG or shrinking made grey of them: uint8, 0 and 255, of the same shape."""
    return np.where(edges < 128, 0, 255).astype(np.uint8)


def is_binary(hint: np.ndarray) -> bool:
    """Whether a uint8 map holds nothing but 0 and 255."""
    return bool(np.isin(hint, (0, 255)).all())


def edge_f1(reference: np.ndarray, output: np.ndarray, tolerance_px: int = TOLERANCE_PX) -> float:
    """Harmonic mean of precision and recall of the output's edges.

    An edge pixel counts as right when the other map has one at a Euclidean distance of at most `tolerance_px`, in the
    same channel; 0 asks for the very pixel. As in BSDS the tolerance applies both ways; unlike there, one pixel may
    answer for several, which favours thick edges slightly. Two empty maps agree (1.0), an empty and another do not
    (0.0).

    Args:
        reference, output: [H, W] or [H, W, K] uint8, 0 and 255 only.

    Raises: HintError: the maps differ in shape, or are not binary.
    """
    match = match_edges(reference, output, tolerance_px)
    wanted, drawn = np.count_nonzero(reference), np.count_nonzero(output)
    if not wanted or not drawn:
        return float(wanted == drawn)
    recall = np.count_nonzero(match.hit) / wanted
    precision = 1.0 - np.count_nonzero(match.extra) / drawn
    return float(2.0 * precision * recall / (precision + recall)) if precision + recall else 0.0


def match_edges(reference: np.ndarray, output: np.ndarray, tolerance_px: int = TOLERANCE_PX) -> EdgeMatch:
    """Tell right, missed and extra edges apart, as `edge_f1` counts them. Raises: HintError, as there."""
    check_pair(reference, output)
    if not (is_binary(reference) and is_binary(output)):
        raise HintError("F1 needs binary maps of 0 and 255; threshold these, or compare them by ssim")
    wanted, drawn = reference > 0, output > 0
    near_drawn, near_wanted = _dilate(drawn, tolerance_px), _dilate(wanted, tolerance_px)
    return EdgeMatch(wanted & near_drawn, wanted & ~near_drawn, drawn & ~near_wanted)


def ssim(reference: np.ndarray, output: np.ndarray) -> float:
    """Structural similarity: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, mean over pixels and channels.

    Only pixels whose window lies inside the map count.

    Args:
        reference, output: [H, W] or [H, W, K] uint8.

    Returns: in [-1, 1]; 1 for equal maps.
    Raises: HintError: the maps differ in shape or are smaller than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13.
    """
    check_pair(reference, output)
    if min(reference.shape[:2]) < WINDOW_PX:
        raise HintError(f"map is {list(reference.shape)}; SSIM needs at least {WINDOW_PX} pixels a side")
    planes = zip(_planes(reference), _planes(output), strict=True)
    return float(np.mean([_ssim_plane(x.astype(np.float64), y.astype(np.float64)) for x, y in planes]))


def _ssim_plane(x: np.ndarray, y: np.ndarray) -> float:
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((above / below).mean())


def _blur(plane: np.ndarray) -> np.ndarray:
    edge = WINDOW_PX // 2
    return cv2.GaussianBlur(plane, (WINDOW_PX, WINDOW_PX), SIGMA_PX)[edge:-edge, edge:-edge]


def _dilate(edges: np.ndarray, radius_px: int) -> np.ndarray:
    """Every pixel within `radius_px` of an edge, channel by channel."""
    if radius_px == 0:
        return edges
    span = np.arange(-radius_px, radius_px + 1)
    disc = (span[:, None] ** 2 + span[None, :] ** 2 <= radius_px**2).astype(np.uint8)
    planes = [cv2.dilate(plane.astype(np.uint8), disc) > 0 for plane in _planes(edges)]
    return np.stack(planes, axis=-1).reshape(edges.shape)


def _planes(array: np.ndarray) -> list[np.ndarray]:
    stacked = array if array.ndim == 3 else array[..., None]
    return [np.ascontiguousarray(stacked[..., index]) for index in range(stacked.shape[-1])]


def check_pair(reference: np.ndarray, output: np.ndarray) -> None:
    """Raises: HintError: the maps differ in shape, or are not uint8 [H, W] or [H, W, K]."""
    if reference.shape != output.shape:
        sizes = f"{list(output.shape)} against {list(reference.shape)}"
        raise HintError(f"maps of different shape: {sizes}; generate and annotate at the size of the hint")
    if reference.dtype != np.uint8 or output.dtype != np.uint8 or reference.ndim not in (2, 3):
        kinds = f"{reference.dtype} {list(reference.shape)} and {output.dtype} {list(output.shape)}"
        raise HintError(f"maps are {kinds}; expected uint8 [H, W] or [H, W, K]")
