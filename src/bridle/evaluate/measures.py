"""Which figures a condition goes by: a table from conditions to measures, and what each measure is called.

A new measure is one function and one row of `MEASURES`; a condition that it fits names it in `CONDITIONS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bridle.evaluate.fidelity import TOLERANCE_PX, edge_f1, is_binary, sharpen, ssim
from bridle.evaluate.maps import WITHIN_DEG, depth_rmse, miou, normals_deg, normals_within

Figures = dict[str, float]
"""What one map is measured by: measure -> figure."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure for how well a map follows the hint.

    Args:
        words: its name within a sentence.
        short: the same where "edge" or "depth" is clear.
        title: its name at the head of a row; `{tolerance_px}` is filled in.
        compute: hint and annotated output, uint8 [H, W, K], and the tolerance in pixels, to the figure.
        unit: follows every figure.
        lower_is_better: as of errors.
        decimals: shown.
        top: where an axis ends; None: at the greatest figure.
    """

    words: str
    short: str
    title: str
    compute: Callable[[np.ndarray, np.ndarray, int], float]
    unit: str = ""
    lower_is_better: bool = False
    decimals: int = 2
    top: float | None = 1.0

    @property
    def bound(self) -> str:
        """What the figure of the autoencoder's own reconstruction is called."""
        return "limit" if self.lower_is_better else "ceiling"

    def better_by(self, figure: float, other: float) -> float:
        """How much better one figure is than another; below zero if it is worse."""
        return other - figure if self.lower_is_better else figure - other

    def text(self, figure: float, more: int = 0) -> str:
        """A figure with its unit, and so many decimals more."""
        return f"{figure:.{self.decimals + more}f}{self.unit}"


def _plain(compare: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray, int], float]:
    """A measure that knows no tolerance."""
    return lambda reference, output, _: compare(reference, output)


def _sharp_f1(reference: np.ndarray, output: np.ndarray, tolerance_px: int) -> float:
    return edge_f1(sharpen(reference), sharpen(output), tolerance_px)


MEASURES = {
    "f1": Measure(words="edge F1", short="F1", title="Edge F1, within {tolerance_px} px", compute=_sharp_f1),
    "f1_strict": Measure(
        words="pixel-exact edge F1",
        short="exact F1",
        title="Edge F1, pixel exact",
        compute=lambda reference, output, _: _sharp_f1(reference, output, 0),
    ),
    "depth_rmse": Measure(
        words="depth RMSE",
        short="RMSE",
        title="Depth RMSE, of 255",
        compute=_plain(depth_rmse),
        lower_is_better=True,
        decimals=1,
        top=None,
    ),
    "normals_deg": Measure(
        words="mean angle between normals",
        short="angle",
        title="Mean angle between normals",
        compute=_plain(normals_deg),
        unit="°",
        lower_is_better=True,
        decimals=1,
        top=None,
    ),
    "normals_within": Measure(
        words=f"share of normals within {WITHIN_DEG}°",
        short=f"within {WITHIN_DEG}°",
        title=f"Normals within {WITHIN_DEG}°",
        compute=_plain(normals_within),
    ),
    "miou": Measure(words="mIoU", short="mIoU", title="mIoU", compute=_plain(miou)),
    "ssim": Measure(words="SSIM", short="SSIM", title="SSIM", compute=_plain(ssim)),
}

# Condition -> its own measures, the deciding one first. Edges are known by being binary, whoever drew them.
CONDITIONS = {
    "depth": ("depth_rmse",),
    "normals": ("normals_deg", "normals_within"),
    "segmentation": ("miou",),
    "soft_edge": (),
}
EDGES = ("f1", "f1_strict")
DRAWN = ("canny", "scribble")  # edges, though what was saved or shrunk of them is no longer black and white
BESIDE = "ssim"


def choose_measures(condition: str, hints: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The measures of a condition, the deciding one first; SSIM, the last one, is told of all.

    Args:
        condition: the annotator's name.
        hints: uint8 [H, W, K]; where all are binary, and the condition has no measures of its own, edges are compared.
    """
    own = CONDITIONS.get(condition)
    if own is None:
        own = EDGES if condition in DRAWN or all(is_binary(hint) for hint in hints) else ()
    return (*own, BESIDE)


def measure(names: Sequence[str], hint: np.ndarray, output: np.ndarray, tolerance_px: int = TOLERANCE_PX) -> Figures:
    """Compare two maps by the measures of these names. Raises: HintError: as they do."""
    return {name: MEASURES[name].compute(hint, output, tolerance_px) for name in names}
