"""Put the fast kernels into a model's modules, and take them out again."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bridle.kernels import conv, gate, linear, native, norm
from bridle.kernels.stand_in import Forward, Undo, stand_in
from bridle.kernels.working import Layer, Working, computes_bf16, count_changes, working


def quicken(*models: nn.Module, channels: Mapping[nn.Conv2d, int] | None = None, fixed: bool = False) -> Undo:
    """Have convolutions, linear layers and group normalisations compute by the fastest way that is known for them.

    Only in bfloat16 on a CPU: under autocast, or where features come in it. Anything else runs the modules' own code.
    The results differ from that only by rounding.

    Args:
        models: U-Nets, or controls of them.
        channels: convolutions of which only the first so many input channels need a gradient; the others get zero.
        fixed: whether no weight changes while this lasts, so that all are worth packing; locked ones are anyway. What
            is packed takes as much memory again as the weights in bfloat16.

    Returns: what makes the models as they were; calling it twice does no harm.
    """
    limits = channels or {}
    with ExitStack() as undo:
        undo.callback(register_optimizer_step_post_hook(count_changes).remove)
        for module in [module for model in models for module in model.modules()]:
            compute, before = way_of(module, limits, fixed), vars(module).get("forward")
            if compute is None or not (before is None or getattr(before, "func", None) is choose):
                continue
            if before is None:
                undo.callback(vars(module).pop, "_bridle_working", None)
            undo.callback(stand_in(module, partial(partial, choose, compute)))
        return undo.pop_all().close


def turn_weights(*models: nn.Module) -> Undo:
    """Keep convolutions' weights in the order in which they are read, or every step would turn them around.

    Only where they lie in memory changes: files and comparisons see the same weights. The modules' own code rounds
    differently on them, though, so they are to be turned back. Returns: what does.
    """
    convs = [module for model in models for module in model.modules() if type(module) is nn.Conv2d]

    def lay(order: torch.memory_format) -> None:
        for module in convs:
            module.weight.data = module.weight.data.contiguous(memory_format=order)

    lay(torch.channels_last)
    return partial(lay, torch.contiguous_format)


def trained_products(model: nn.Module) -> dict[nn.Parameter, Working]:
    """The trained weights of convolutions and linear layers that `quicken` computes with, and their forms."""
    modules: list[Any] = [module for module in model.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    known = [module for module in modules if type(module) is nn.Linear or conv.fits(module)]
    return {module.weight: working(module, "weight") for module in known if module.weight.requires_grad}


def way_of(module: nn.Module, channels: Mapping[nn.Conv2d, int], fixed: bool) -> Callable[[Tensor], Tensor] | None:
    """What computes in the module's place; None where nothing does."""
    if type(module) is nn.Conv2d and conv.fits(module):
        return partial(conv.convolve, conv.Spec(module, channels.get(module), fixed=fixed))
    if type(module) is nn.Linear:
        return partial(linear.project, Layer(module, fixed=fixed))
    if type(module) is nn.GroupNorm and module.affine:
        return partial(norm.normalise, module)
    if type(module) is GEGLU and native.library() is not None:
        return partial(gate.gate, module)
    return None


def choose(compute: Callable[[Tensor], Tensor], plain: Forward, hidden: Tensor, *others: Any) -> Any:
    """Either way of computing a module's output."""
    return compute(hidden) if computes_bf16(hidden) else plain(hidden, *others)
