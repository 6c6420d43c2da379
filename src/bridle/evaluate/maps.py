"""How far a map of depth, normals or classes is from the hint: two maps in, one figure out.

All maps are uint8 [H, W, K] as hints are: depth in grey, normals as (n + 1) / 2 * 255, classes in the palette.
"""

import numpy as np

from bridle.data.palette import SEGMENTATION
from bridle.errors import HintError
from bridle.evaluate.fidelity import check_pair

WITHIN_DEG = 11.25  # the strictest of the thresholds usual for normals since Fouhey et al., ICCV 2013


def depth_rmse(reference: np.ndarray, output: np.ndarray) -> float:
    """Root mean square error in 8-bit steps, from 0 to 255; as ControlNet++ measures depth, picture by picture.

    Raises: HintError: the maps differ in shape.
    Source: ControlNet++, arXiv:2404.07987.
    """
    check_pair(reference, output)
    return float(np.sqrt(np.mean(np.square(reference.astype(np.float64) - output))))


def normals_deg(reference: np.ndarray, output: np.ndarray) -> float:
    """Mean angle between the normals of two maps, in degrees. Raises: HintError: see `angles_deg`."""
    return float(angles_deg(reference, output).mean())


def normals_within(reference: np.ndarray, output: np.ndarray) -> float:
    """Share of the pixels whose normals differ by less than 11.25°. Raises: HintError: see `angles_deg`."""
    return float((angles_deg(reference, output) < WITHIN_DEG).mean())


def angles_deg(reference: np.ndarray, output: np.ndarray) -> np.ndarray:
    """[H, W]: the angle between the normals at each pixel.

    Raises: HintError: no maps of equal shape with 3 channels.
    """
    check_pair(reference, output)
    if reference.shape[2:] != (3,):
        raise HintError(f"maps are {list(reference.shape)}; normals need [H, W, 3], their x, y and z")
    a, b = (pixels / 127.5 - 1 for pixels in (reference, output))
    # Of both sine and cosine, because the arc cosine alone is blind to small angles.
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(a, b), axis=2), np.sum(a * b, axis=2)))


def miou(reference: np.ndarray, output: np.ndarray) -> float:
    """Intersection over union, mean over the classes of the reference; each colour counts as the nearest class's.

    Of one picture: a data set's figure as it is published sums pixels over all pictures first.

    Raises: HintError: no maps of equal shape with 3 channels.
    """
    check_pair(reference, output)
    wanted, found = to_classes(reference), to_classes(output)
    shares = []
    for index in np.unique(wanted):
        a, b = wanted == index, found == index
        shares.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
    return float(np.mean(shares))


def to_classes(colours: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 to [H, W]: the place in the palette of the colour nearest to each pixel's."""
    if colours.shape[2:] != (3,):
        raise HintError(f"map is {list(colours.shape)}; classes need [H, W, 3], in the colours of bridle.data.palette")
    palette = np.array(list(SEGMENTATION.values()), dtype=np.float32)
    distances = [np.square(colours - colour).sum(axis=2) for colour in palette]
    return np.argmin(distances, axis=0)
