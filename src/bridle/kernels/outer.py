"""The product of two matrices over their rows, which a weight's gradient is."""

from functools import partial

from torch import Tensor

from bridle.kernels.choice import Way, pick


def plain(left: Tensor, right: Tensor) -> Tensor:
    return left.t() @ right


def turned(left: Tensor, right: Tensor) -> Tensor:
    """Transposed in memory first: twice as fast where rows are few."""
    return left.t().contiguous() @ right


WAYS = {"plain": plain, "turned": turned}


def outer(left: Tensor, right: Tensor) -> Tensor:
    """[N, D] and [N, C] to [D, C], by the faster way."""

    def ways() -> dict[str, Way]:
        return {name: partial(way, left, right) for name, way in WAYS.items()}

    return WAYS[pick(("outer", *left.shape, right.shape[1], left.dtype), ways)](left, right)
