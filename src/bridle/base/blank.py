"""Weights that nobody filled, made visible: models are built of NaN, so that what a file lacks stays NaN.

Left alone, diffusers gives a weight that a file lacks whatever lies in memory, and at most logs it.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import single_file_model, single_file_utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bridle.errors import BaseError

ATEN = torch.ops.aten
EMPTY = {ATEN.empty.memory_format, ATEN.empty_like.default}
INITIAL = {ATEN.uniform_.default, ATEN.normal_.default, ATEN.fill_.Scalar, ATEN.zero_.default}  # what layers start with


class Blank(TorchDispatchMode):
    """While it lasts, new parameters are NaN until something is copied into them. It draws no random numbers."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in INITIAL and isinstance(args[0], nn.Parameter):
            return fill(args[0])
        result = func(*args, **(kwargs or {}))
        return fill(result) if func in EMPTY else result


@contextmanager
def in_memory() -> Generator[None]:
    """While it lasts, diffusers builds the models of a single file in memory, also where accelerate is installed.

    With it they are built without, and what the file lacks breaks loading before it can be named. Its pipelines offer
    no argument for that.
    """
    before = single_file_utils.is_accelerate_available, single_file_model._LOW_CPU_MEM_USAGE_DEFAULT
    vars(single_file_utils)["is_accelerate_available"] = lambda: False
    single_file_model._LOW_CPU_MEM_USAGE_DEFAULT = False
    try:
        yield
    finally:
        single_file_utils.is_accelerate_available, single_file_model._LOW_CPU_MEM_USAGE_DEFAULT = before


def fill(tensor: Tensor) -> Tensor:
    """With NaN, in place; integers stay as they are."""
    with torch.no_grad():
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def check_filled(models: dict[str, nn.Module], where: str) -> None:
    """Raises: BaseError: some weights were not loaded, or are no numbers in the file itself."""
    for part, model in models.items():
        weights = dict(model.named_parameters())
        blank = [name for name, weight in weights.items() if weight.is_floating_point() and holds_nan(weight)]
        if blank:
            said = f"{len(blank)} of the {len(weights)} weights of its {part}, such as {blank[0]}"
            raise BaseError(f"base {where} is damaged: it lacks, or has NaN in, {said}; take another copy")


def holds_nan(weight: Tensor) -> bool:
    """A sum is NaN where any number in it is, which takes a third of the time of asking each."""
    return bool(weight.detach().sum().isnan())
