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
from bridle.kernels.working import BF16, Layer, Working, computed_in, count_changes, forget_forms, working


def quicken(
    *models: nn.Module, channels: Mapping[nn.Conv2d, int] | None = None, fixed: bool = False, sparing: bool = False
) -> Undo:
    """Have convolutions, linear layers and group normalisations compute by the fastest way that is known for them.

    Only on a CPU, in bfloat16 (under autocast, or where features come in it) or, with a compiler, in float32. Anything
    else, and linear layers in float32, run the modules' own code. The results differ from that only by rounding.
    Weights may change between two calls, but not through `.data` in place, nor between a call and its backward pass,
    of which there can be one.

    Args:
        models: U-Nets, or controls of them.
        channels: convolutions of which only the first so many input channels need a gradient; the others get zero.
        fixed: whether no weight changes while this lasts, so that all are worth packing; locked ones are anyway. What
            is packed takes as much memory again as the weights in bfloat16; in float32 only small weights have forms
            that last, see `conv.keeps`.
        sparing: whether to pack none, and keep no other form of a weight either: less memory, more time.

    Returns: what makes the models as they were; calling it twice does no harm.
    """
    limits = channels or {}
    with ExitStack() as undo:
        undo.callback(register_optimizer_step_post_hook(count_changes).remove)
        for module in [module for model in models for module in model.modules()]:
            compute, before = way_of(module, limits, fixed=fixed, sparing=sparing), vars(module).get("forward")
            if compute is None or not (before is None or getattr(before, "func", None) is choose):
                continue
            undo.callback(forget_forms(module))
            undo.callback(stand_in(module, partial(partial, choose, module, compute)))
        return undo.pop_all().close


def turn_weights(*models: nn.Module) -> Undo:
    """Keep convolutions' weights in the order in which they are read, or every step would turn them around.

    Only where they lie in memory changes: files and comparisons see the same weights. The modules' own code rounds
    differently on them, though, so they are to be turned back. Returns: what does.
    """
    convs = [module for model in models for module in model.modules() if type(module) is nn.Conv2d]
    last = torch.channels_last
    turned = [one for one in convs if not (one.weight.is_contiguous(memory_format=last) or one.weight.is_inference())]
    lay = [(module, module.weight.stride()) for module in turned]

    def turn_back() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for module, strides in lay:
                weight = module.weight
                before = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
                weight.data = before.copy_(weight)

    with torch.inference_mode(False):  # or they could never be trained again
        for module in turned:
            module.weight.data = module.weight.data.contiguous(memory_format=last)
    return turn_back


def trained_products(model: nn.Module) -> dict[nn.Parameter, Working]:
    """The trained weights of convolutions and linear layers that `quicken` computes with, and their forms."""
    modules: list[Any] = [module for module in model.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    known = [module for module in modules if type(module) is nn.Linear or conv.fits(module)]
    return {module.weight: working(module, "weight") for module in known if module.weight.requires_grad}


def way_of(module: nn.Module, channels: Mapping[nn.Conv2d, int], **how: bool) -> Callable[[Tensor], Tensor] | None:
    """What computes in the module's place; None where nothing does. Args: how: see `Layer`."""
    if type(module) is nn.Conv2d and conv.fits(module):
        return partial(conv.convolve, conv.Spec(module, channels.get(module), **how))
    if type(module) is nn.Linear:
        return partial(linear.project, Layer(module, **how))
    if type(module) is nn.GroupNorm and module.affine:
        return partial(norm.normalise, module)
    if type(module) is GEGLU and native.library() is not None:
        return partial(gate.gate, module)
    return None


def choose(module: nn.Module, compute: Callable[[Tensor], Tensor], plain: Forward, *given: Any, **named: Any) -> Any:
    """Either way of computing a module's output."""
    if named or not given:
        return plain(*given, **named)
    hidden = given[0]
    kind = computed_in(hidden)
    return plain(*given) if kind is None or not knows(module, hidden, kind) else compute(hidden.to(kind))


def knows(module: nn.Module, hidden: Tensor, kind: torch.dtype) -> bool:
    """Whether the kernels compute such a call; that weights of inference mode change, nobody is told."""
    weight = getattr(module, "weight", None)
    if hidden.numel() == 0 or (type(module) is nn.Conv2d and hidden.ndim != 4):
        return False
    if weight is not None and weight.is_inference():
        return False
    # In float32 linear layers are a product already; weights of another type are an error, which PyTorch is to find.
    alike = weight is None or weight.dtype is kind
    return kind is BF16 or (speeds_up(kind) and type(module) is not nn.Linear and alike)


def speeds_up(kind: torch.dtype) -> bool:
    """Whether there is anything to gain on a CPU with features of a type: in float32 what gains is compiled."""
    return kind is BF16 or (kind is torch.float32 and native.library(kind) is not None)
