"""Put the fast kernels into a model's modules, and take them out again."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bridle.kernels import conv, linear, norm


def quicken(*models: nn.Module, channels: Mapping[nn.Conv2d, int] | None = None) -> Callable[[], None]:
    """Have convolutions, linear layers and group normalisations compute by the fastest way that is known for them.

    Only in bfloat16 on a CPU: under autocast, or where features come in it. Anything else runs the modules' own code.
    The results differ from that only by rounding.

    Args:
        models: U-Nets, or controls of them.
        channels: convolutions of which only the first so many input channels need a gradient; the others get zero.

    Returns: what makes the models as they were; calling it twice does no harm.
    """
    limits = channels or {}
    touched: list[tuple[nn.Module, Any]] = []
    for model in models:
        for module in model.modules():
            stand_in, before = stand_in_for(module, limits), vars(module).get("forward")
            if stand_in is not None and (before is None or getattr(before, "func", None) is choose):
                vars(module)["forward"] = partial(choose, module, stand_in)
                touched.append((module, before))

    def undo() -> None:
        for module, before in touched:
            vars(module).pop("forward", None)
            if before is None:
                vars(module).pop("_bridle_working", None)
            else:
                vars(module)["forward"] = before
        touched.clear()

    return undo


def turn_weights(*models: nn.Module) -> None:
    """Keep convolutions' weights in the order in which they are read, or every step would turn them around.

    Only where they lie in memory changes; files and comparisons see the same weights.
    """
    for model in models:
        for module in model.modules():
            if type(module) is nn.Conv2d:
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def stand_in_for(module: nn.Module, channels: Mapping[nn.Conv2d, int]) -> Callable[[Tensor], Tensor] | None:
    """What computes in the module's place; None where nothing does."""
    if type(module) is nn.Conv2d and conv.fits(module):
        return partial(conv.convolve, conv.Spec(module, channels.get(module)))
    if type(module) is nn.Linear:
        return partial(linear.project, module)
    if type(module) is nn.GroupNorm and module.affine:
        return partial(norm.normalise, module)
    return None


def choose(module: nn.Module, stand_in: Callable[[Tensor], Tensor], hidden: Tensor, *others: Any) -> Tensor:
    """Either way of computing a module's output."""
    wanted = hidden.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if wanted and hidden.device.type == "cpu":
        return stand_in(hidden)
    output: Tensor = type(module).forward(module, hidden, *others)  # type: ignore[arg-type]
    return output
