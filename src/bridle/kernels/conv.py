"""Convolutions with channels last: each of three products by the way that is fastest for its shape.

oneDNN is the best there is for many shapes and collapses for some: the weight gradient of 3x3 convolutions over few
pixels is 5 to 25 times faster as a matrix product over gathered neighbourhoods, the input gradient of a locked one as a
forward convolution with turned weights. A 3x3 one can do with fewer multiplications (`winograd`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels import winograd
from bridle.kernels.choice import pick
from bridle.kernels.outer import outer
from bridle.kernels.packed import convolve_packed, multiply_packed, pack_filters, pack_rows, packs
from bridle.kernels.patches import LAST, flat, gather, gathers, scatter, spread
from bridle.kernels.working import BF16, Layer, gradient_type, identity, learns, sum_rows

MOST_KEPT = 2**22  # numbers in a form of a float32 weight beyond which it is made anew every time: 16 MiB


def fits(conv: nn.Conv2d) -> bool:
    """Whether `convolve` knows such a convolution: square kernel, less padding of zeros, no groups, no dilation."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    numbers = isinstance(conv.padding, tuple) and conv.padding[0] == conv.padding[1] < conv.kernel_size[0]
    return plain and numbers and conv.stride[0] == conv.stride[1] and conv.kernel_size[0] == conv.kernel_size[1]


def convolve(spec: "Spec", hidden: Tensor) -> Tensor:
    """Stands in for a convolution's `forward`: [B, C, H, W] to [B, D, H', W'], channels last, in the input's type."""
    hidden = hidden.contiguous(memory_format=LAST)
    if not learns(hidden, spec.conv.weight, spec.conv.bias):
        return forward(hidden, spec)
    output: Tensor = Conv.apply(hidden, spec.conv.weight, spec.conv.bias, spec)
    return output


class Spec(Layer):
    """One convolution, and what of it is wanted.

    Args:
        channels: of its input the first so many get a gradient, the others zero; all where None.
    """

    def __init__(self, conv: nn.Conv2d, channels: int | None = None, **how: bool) -> None:
        super().__init__(conv, **how)
        self.conv = conv
        self.channels = conv.in_channels if channels is None else channels
        self.stride, self.padding, self.kernel = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
        self.turned_padding = self.kernel - 1 - self.padding
        self.numbers = (conv.in_channels, conv.out_channels, self.kernel, self.stride, self.padding)

    @property
    def steps(self) -> tuple[Any, ...]:
        """What PyTorch's backward pass of convolutions wants to know."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1


# --- forms of a weight [D, C, k, k], for inputs or gradients of a shape


def last(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    """As a convolution reads it best."""
    return weight.contiguous(memory_format=LAST)


def rows(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    """[D, k*k*C]: what `gather` is multiplied by."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def turned(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    """[wanted, D, k, k], turned by half a circle: the convolution that is its transpose."""
    return weight[:, : spec.channels].flip(2, 3).transpose(0, 1).contiguous(memory_format=LAST)


def turned_rows(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return rows(turned(weight, spec, shape), spec, shape)


def packed(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return pack_filters(weight, spec.stride, spec.padding, shape)


def packed_rows(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return pack_rows(rows(weight, spec, shape), shape[0] * shape[2] * shape[3] // spec.stride**2)


def packed_turned(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return pack_filters(turned(weight, spec, shape), 1, spec.turned_padding, shape)


def packed_turned_rows(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return pack_rows(turned_rows(weight, spec, shape), shape[0] * shape[2] * shape[3])


def planes(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return winograd.form(weight)


def turned_planes(weight: Tensor, spec: Spec, shape: torch.Size) -> Tensor:
    return winograd.form(turned(weight, spec, shape))


Form = Callable[[Tensor, Spec, torch.Size], Tensor]


# --- forward: a way takes (input, weight's form, spec)


def forward_direct(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    return F.conv2d(hidden, weight, spec.bias(hidden.dtype), spec.stride, spec.padding)


def forward_product(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    gathered, size = gather(hidden, spec.kernel, spec.stride, spec.padding)
    return spread(F.linear(gathered, weight, spec.bias(hidden.dtype)), size)


def forward_packed(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    return convolve_packed(hidden, weight, spec.bias(hidden.dtype), spec.stride, spec.padding)


def forward_packed_product(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    gathered, size = gather(hidden, spec.kernel, spec.stride, spec.padding)
    return spread(multiply_packed(gathered, weight, spec.bias(hidden.dtype)), size)


def forward_winograd(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    return winograd.forward(hidden, weight, spec.bias(hidden.dtype))


def forward(hidden: Tensor, spec: Spec) -> Tensor:
    """The convolution."""
    return run(FORWARD, spec, hidden)


# --- gradient of the input: a way takes (gradient, weight's form, spec, input's height and width)


def input_direct(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    if spec.channels < spec.conv.in_channels:
        weight = weight[:, : spec.channels].contiguous(memory_format=LAST)
    like = gradient.new_empty(1).expand(len(gradient), spec.channels, height, width)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, like, weight, None, *spec.steps, [True, False, False]
    )[0]
    return found


def input_forward(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    return F.conv2d(gradient, weight, None, 1, spec.turned_padding)


def input_product(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    gathered, size = gather(gradient, spec.kernel, 1, spec.turned_padding)
    return spread(gathered @ weight.t(), size)


def input_scatter(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """What every output pixel has to say to its neighbourhood, added up: reads the weight as the forward pass does."""
    size, kernel = (len(gradient), *gradient.shape[2:]), spec.kernel
    said = (flat(gradient) @ weight).view(*size, kernel, kernel, -1)
    return scatter(said, height, width, spec.channels, spec.stride, spec.padding)


def input_packed(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    return convolve_packed(gradient, weight, None, 1, spec.turned_padding)


def input_packed_product(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    gathered, size = gather(gradient, spec.kernel, 1, spec.turned_padding)
    return spread(multiply_packed(gathered, weight, None), size)


def input_winograd(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    return winograd.forward(gradient, weight, None)


def input_gradient(gradient: Tensor, shape: torch.Size, spec: Spec) -> Tensor:
    """[B, D, H', W'] to the gradient of the input, [B, C, H, W]."""
    found = run(INPUT, spec, gradient, shape[2], shape[3])
    unwanted = shape[1] - spec.channels
    return F.pad(found, (0, 0, 0, 0, 0, unwanted)) if unwanted else found


# --- gradient of the weight: a way takes (gradient, input, spec)


def weight_direct(gradient: Tensor, hidden: Tensor, spec: Spec) -> Tensor:
    like = gradient.new_empty(1).expand(spec.conv.weight.shape)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, hidden, like, None, *spec.steps, [False, True, False]
    )[1]
    return found


def weight_product(gradient: Tensor, hidden: Tensor, spec: Spec) -> Tensor:
    gathered, _ = gather(hidden, spec.kernel, spec.stride, spec.padding)
    found = outer(flat(gradient), gathered)
    return found.view(len(found), spec.kernel, spec.kernel, -1).permute(0, 3, 1, 2)


def weight_winograd(gradient: Tensor, hidden: Tensor, spec: Spec) -> Tensor:
    return winograd.weight_gradient(gradient, hidden)


WEIGHT_WAYS = {"direct": weight_direct, "product": weight_product, "winograd": weight_winograd}


def weight_gradient(gradient: Tensor, hidden: Tensor, spec: Spec) -> Tensor:
    """The gradient of the weight, [D, C, k, k], in the type that its gradients have, and the weight's order."""
    weight = spec.conv.weight
    order = LAST if weight.is_contiguous(memory_format=LAST) else torch.contiguous_format

    def in_full(way: Any) -> Tensor:
        found: Tensor = way(gradient, hidden, spec)
        return found.to(gradient_type(weight), memory_format=order)

    def timed() -> dict[str, Any]:
        names = ["direct", *["product"] * gathers(hidden, spec.kernel), *["winograd"] * filters(spec, hidden)]
        return {name: lambda name=name: in_full(WEIGHT_WAYS[name]) for name in names}

    return in_full(WEIGHT_WAYS[pick(("weight", *spec.numbers, *hidden.shape, hidden.dtype), timed)])


# --- what they share


@dataclass(frozen=True)
class Way:
    """A way to compute, the form of the weight that it takes, and where it is a way at all."""

    compute: Callable[..., Tensor]
    form: Form
    gathers: bool = False  # it reads neighbourhoods as rows
    packs: bool = False  # it is worth its form only where that is made once
    strides: bool = True  # it knows strides beyond 1
    planes: bool = False  # it computes by Winograd's planes, in which there are more numbers than weights


FORWARD: dict[str, Way] = {
    "direct": Way(forward_direct, last),
    "product": Way(forward_product, rows, gathers=True),
    "packed": Way(forward_packed, packed, packs=True),
    "packed_product": Way(forward_packed_product, packed_rows, gathers=True, packs=True),
    "winograd": Way(forward_winograd, planes, planes=True),
}
INPUT: dict[str, Way] = {
    "direct": Way(input_direct, last),
    "forward": Way(input_forward, turned, strides=False),
    "scatter": Way(input_scatter, rows, gathers=True),
    "product": Way(input_product, turned_rows, gathers=True, strides=False),
    "packed": Way(input_packed, packed_turned, packs=True, strides=False),
    "packed_product": Way(input_packed_product, packed_turned_rows, gathers=True, packs=True, strides=False),
    "winograd": Way(input_winograd, turned_planes, planes=True),
}


def run(ways: dict[str, Way], spec: Spec, hidden: Tensor, *sizes: int) -> Tensor:
    """By the fastest of the ways; a form that is made anew every time is timed as well."""
    kind = hidden.dtype
    # Forward all channels count: the same way, so the same rounding, whatever gradients are wanted.
    what = ("forward",) if ways is FORWARD else ("input", spec.channels)

    def form(name: str) -> Tensor:
        """Trained weights' too are kept until the next step, but for those that are larger than the weight."""

        def make(weight: Tensor) -> Tensor:
            return ways[name].form(weight, spec, hidden.shape)

        if keeps(ways[name], spec, kind) or (spec.trained and not ways[name].planes):
            return spec.form(f"{what} {name}", make, kind)
        return make(spec.form("cast", identity, kind))

    def timed() -> dict[str, Any]:
        weight, found = spec.conv.weight.detach().to(kind), {}
        for name in able(ways, spec, hidden):
            way = ways[name]
            made = way.form(weight, spec, hidden.shape) if keeps(way, spec, kind) else None

            def once(way: Way = way, made: Tensor | None = made) -> Tensor:
                form = way.form(weight, spec, hidden.shape) if made is None else made
                return way.compute(hidden, form, spec, *sizes)

            found[name] = once
        return found

    name = pick((*what, *spec.numbers, *hidden.shape, not spec.lasts, kind), timed)
    return ways[name].compute(hidden, form(name), spec, *sizes)


def keeps(way: Way, spec: Spec, kind: torch.dtype) -> bool:
    """Whether the weight's form lasts: float32 ones only where small, or the weights would lie in memory twice."""
    times = winograd.planes(kind) / 9 if way.planes else 1
    return spec.lasts and (kind is BF16 or spec.conv.weight.numel() * times <= MOST_KEPT)


def able(ways: dict[str, Way], spec: Spec, hidden: Tensor) -> Sequence[str]:
    """The names of the ways that such a convolution can be computed by."""
    small, packable = gathers(hidden, spec.kernel), spec.lasts and hidden.dtype is BF16 and packs()
    found = [
        name
        for name, way in ways.items()
        if (small or not way.gathers)
        and (packable or not way.packs)
        and (spec.stride == 1 or way.strides)
        and (not way.planes or filters(spec, hidden))
    ]
    return [name for name in found if PACKED.get(name) not in found]


def filters(spec: Spec, hidden: Tensor) -> bool:
    """Whether Winograd's minimal filtering is a way, and one of fewer products: 2x2 pixels take no more than its 16."""
    return min(hidden.shape[2:]) > 2 and winograd.fits(spec.kernel, spec.stride, spec.padding, hidden.dtype)


# What computes the same with a weight that oneDNN need not rearrange first: there is nothing to measure.
PACKED = {"direct": "packed", "forward": "packed", "product": "packed_product"}


class Conv(Function):
    """A convolution that keeps its input only where its weight is trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Any:
        ctx.spec, ctx.shape, ctx.kind = spec, hidden.shape, hidden.dtype
        ctx.save_for_backward(hidden if weight.requires_grad else None)
        return forward(hidden, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,), spec = ctx.saved_tensors, ctx.spec
        gradient = gradient.to(ctx.kind).contiguous(memory_format=LAST)
        for_hidden = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_hidden = input_gradient(gradient, ctx.shape, spec)
        if ctx.needs_input_grad[1]:
            for_weight = weight_gradient(gradient, hidden, spec)
        if ctx.needs_input_grad[2]:
            for_bias = sum_rows(flat(gradient)).to(spec.conv.bias.dtype)
        return for_hidden, for_weight, for_bias, None
