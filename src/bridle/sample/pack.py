"""Convolutions and linear layers with weights in the layout that the processor multiplies by: bfloat16 on a CPU.

oneDNN rearranges a weight at every call, unless it is given one that was rearranged before. Where there are many
channels and few pixels that takes several times as long as the product. A weight that is not trained is rearranged
once.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bridle.kernels.choice import pick
from bridle.kernels.conv import LAST, fits, flat, gather, gathers, rows, spread
from bridle.kernels.conv import Spec as ConvSpec
from bridle.kernels.stand_in import Forward, Undo, stand_in
from bridle.kernels.working import BF16, cast, computes_bf16, working

NO_EPILOGUE = ("none", [], "")  # oneDNN could also apply an activation


def pack(*models: nn.Module) -> Undo:
    """Have convolutions and linear layers compute with packed weights, wherever no gradient is asked for.

    Only in bfloat16 on a CPU: under autocast, or where features come in it. Anything else runs the modules' own code.
    The results differ from that only by the order of sums. The packed weights take as much memory as bfloat16 ones.

    Returns: what makes the models as they were; nothing is done where this PyTorch cannot pack.
    """
    with ExitStack() as undo:
        for module in [module for model in models for module in model.modules()] if available() else []:
            multiply = multiplication(module)
            if multiply is not None:
                undo.callback(vars(module).pop, "_bridle_working", None)
                undo.callback(stand_in(module, partial(choose, multiply, module)))
        return undo.pop_all().close


def multiplication(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes in the module's place; None where nothing does."""
    if type(module) is nn.Conv2d and fits(module):
        return partial(convolve, ConvSpec(module))
    if type(module) is nn.Linear:
        return partial(project, module)
    return None


def choose(multiply: Callable[[Tensor], Tensor], module: nn.Module, plain: Forward) -> Forward:
    """Either way of computing a module's output."""

    def forward(hidden: Tensor, *others: Any) -> Any:
        if computes_bf16(hidden) and not torch.is_grad_enabled():
            return multiply(hidden)
        return plain(hidden, *others)

    return forward


def project(linear: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., C] to [..., D], bfloat16."""
    given = hidden.to(BF16).reshape(-1, linear.in_features)
    weight = working(linear, "weight").get(linear.weight, "packed", lambda weight: pack_rows(weight, len(given)))
    return multiply_rows(given, weight, cast(linear, "bias")).view(*hidden.shape[:-1], linear.out_features)


def convolve(spec: ConvSpec, hidden: Tensor) -> Tensor:
    """[B, C, H, W] to [B, D, H', W'], bfloat16, channels last."""
    hidden = hidden.to(BF16).contiguous(memory_format=LAST)
    names = ("packed", "product") if gathers(hidden, spec) else ("packed",)

    def ways() -> dict[str, Any]:
        found = {}
        for name in names:
            way, form = WAYS[name]
            made = form(spec.conv.weight.detach().to(BF16), spec, hidden)
            found[name] = partial(way, hidden, made, spec)
        return found

    name = pick(("packed", *spec.numbers, *hidden.shape), ways)
    way, form = WAYS[name]
    made = working(spec.conv, "weight").get(spec.conv.weight, name, lambda weight: form(weight, spec, hidden))
    return way(hidden, made, spec)


# --- two ways to convolve: each takes (input, weight's form, spec), its form (weight, spec, an input)


def by_convolution(hidden: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    numbers = [spec.padding] * 2, [spec.stride] * 2, [1, 1], 1
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(hidden, weight, spec.bias(), *numbers, *NO_EPILOGUE)
    return found


def for_convolution(weight: Tensor, spec: ConvSpec, hidden: Tensor) -> Tensor:
    numbers = [spec.padding] * 2, [spec.stride] * 2, [1, 1], 1
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its types leave the last argument out
    packed: Tensor = reorder(weight.to_mkldnn(), *numbers, list(hidden.shape))
    return packed


def by_product(hidden: Tensor, weight: Tensor, spec: ConvSpec) -> Tensor:
    gathered, size = gather(hidden, spec.kernel, spec.stride, spec.padding)
    return spread(multiply_rows(gathered, weight, spec.bias()), size)


def for_product(weight: Tensor, spec: ConvSpec, hidden: Tensor) -> Tensor:
    return pack_rows(rows(weight), hidden.shape[0] * hidden.shape[2] * hidden.shape[3] // spec.stride**2)


WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "packed": (by_convolution, for_convolution),
    "product": (by_product, for_product),
}


def multiply_rows(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C] to [N, D]."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, *NO_EPILOGUE)
    return found


def pack_rows(weight: Tensor, count: int) -> Tensor:
    """[D, C] for products with so many rows; others do as well."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), count)
    return packed


@cache
def available() -> bool:
    """Whether this PyTorch and processor can: neither function is a promise of PyTorch's, so they are tried."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    linear, conv = nn.Linear(32, 32).to(BF16), nn.Conv2d(32, 32, 3, padding=1).to(BF16)
    hidden = torch.ones(1, 32, 4, 4, dtype=BF16).contiguous(memory_format=LAST)
    try:
        with torch.no_grad():
            pixels = flat(hidden)
            near = torch.allclose(project(linear, pixels), linear(pixels), atol=0.05)
            for way, form in WAYS.values():
                spec = ConvSpec(conv)
                near &= torch.allclose(way(hidden, form(conv.weight, spec, hidden), spec), conv(hidden), atol=0.05)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return near
