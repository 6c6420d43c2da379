"""Convolutions in bfloat16, channels last: each of three products by the way that is fastest for its shape.

oneDNN is the best there is for many shapes and collapses for some: the weight gradient of 3x3 convolutions over few
pixels is 5 to 25 times faster as a matrix product over gathered neighbourhoods, the input gradient of a locked one as a
forward convolution with turned weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels.choice import pick
from bridle.kernels.working import BF16, cast, sum_rows, working

LAST = torch.channels_last
MOST_GATHERED = 64 * 2**20  # elements of gathered neighbourhoods beyond which that way is not even tried


def fits(conv: nn.Conv2d) -> bool:
    """Whether `convolve` knows such a convolution: square kernel, zero padding, no groups, no dilation."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    numbers = isinstance(conv.padding, tuple) and conv.padding[0] == conv.padding[1]
    return plain and numbers and conv.stride[0] == conv.stride[1] and conv.kernel_size[0] == conv.kernel_size[1]


def convolve(spec: "Spec", hidden: Tensor) -> Tensor:
    """Stands in for a convolution's `forward`: [B, C, H, W] to [B, D, H', W'], bfloat16, channels last."""
    hidden = hidden.to(BF16).contiguous(memory_format=LAST)
    weight = spec.conv.weight
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return forward(hidden, spec)
    output: Tensor = Conv.apply(hidden, weight, spec.conv.bias, spec)
    return output


class Spec:
    """One convolution, and what of it is wanted.

    Args:
        channels: of its input the first so many get a gradient, the others zero; all where None.
    """

    def __init__(self, conv: nn.Conv2d, channels: int | None = None) -> None:
        self.conv = conv
        self.channels = conv.in_channels if channels is None else channels
        self.stride, self.padding, self.kernel = conv.stride[0], int(conv.padding[0]), conv.kernel_size[0]
        self.numbers = (conv.in_channels, conv.out_channels, self.kernel, self.stride, self.padding)

    @property
    def steps(self) -> tuple[Any, ...]:
        """What PyTorch's backward pass of convolutions wants to know."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1

    def form(self, name: str, *, forward: bool) -> Tensor:
        afresh = forward and self.conv.weight.requires_grad
        return working(self.conv, "weight").get(self.conv.weight, name, FORMS[name], afresh=afresh)

    def bias(self) -> Any:
        return cast(self.conv, "bias", forward=True)


# --- forms of a weight [D, C, k, k]


def last(weight: Tensor) -> Tensor:
    """As a convolution reads it best."""
    return weight.contiguous(memory_format=LAST)


def rows(weight: Tensor) -> Tensor:
    """[D, k*k*C]: what `gather` is multiplied by."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def turned(weight: Tensor) -> Tensor:
    """[C, D, k, k], turned by half a circle: the convolution that is its transpose."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=LAST)


def turned_rows(weight: Tensor) -> Tensor:
    return rows(turned(weight))


FORMS: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (last, rows, turned, turned_rows)}


# --- forward: a way takes (input, weight's form, spec)


def forward_direct(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    return F.conv2d(hidden, weight, spec.bias(), spec.stride, spec.padding)


def forward_product(hidden: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    gathered, size = gather(hidden, spec.kernel, spec.stride, spec.padding)
    return spread(F.linear(gathered, weight, spec.bias()), size)


def forward(hidden: Tensor, spec: Spec) -> Tensor:
    """The convolution."""

    names = ("direct", "product") if gathers(hidden, spec) else ("direct",)
    return run("forward", names, spec, hidden)


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
    return F.conv2d(gradient, weight[: spec.channels], None, 1, spec.kernel - 1 - spec.padding)


def input_product(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    gathered, size = gather(gradient, spec.kernel, 1, spec.kernel - 1 - spec.padding)
    return spread(gathered @ weight[: spec.channels].t(), size)


def input_scatter(gradient: Tensor, weight: Tensor, spec: Spec, height: int, width: int) -> Tensor:
    """What every output pixel has to say to its neighbourhood, added up: reads the weight as the forward pass does."""
    size, kernel, stride, padding = (len(gradient), *gradient.shape[2:]), spec.kernel, spec.stride, spec.padding
    said = (flat(gradient) @ weight).view(*size, kernel, kernel, -1)[..., : spec.channels]
    sums = said.new_zeros(size[0], height + 2 * padding, width + 2 * padding, spec.channels, dtype=torch.float32)
    for row in range(kernel):
        rows = slice(row, row + stride * size[1], stride)
        for column in range(kernel):
            sums[:, rows, column : column + stride * size[2] : stride] += said[:, :, :, row, column]
    inside = sums[:, padding : padding + height, padding : padding + width]
    return inside.to(BF16, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def input_gradient(gradient: Tensor, shape: torch.Size, spec: Spec) -> Tensor:
    """[B, D, H', W'] to the gradient of the input, [B, C, H, W]."""

    names = ["direct"] if spec.stride > 1 else ["direct", "forward"]
    if gathers(gradient, spec):
        names += ["scatter"] if spec.stride > 1 else ["scatter", "product"]
    found = run("input", names, spec, gradient, shape[2], shape[3])
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
    found = flat(gradient).t() @ gathered
    return found.view(len(found), spec.kernel, spec.kernel, -1).permute(0, 3, 1, 2)


WEIGHT_WAYS = {"direct": weight_direct, "product": weight_product}


def weight_gradient(gradient: Tensor, hidden: Tensor, spec: Spec) -> Tensor:
    """The gradient of the weight, [D, C, k, k], in the weight's own type."""

    def in_full(way: Any) -> Tensor:
        return torch.empty_like(spec.conv.weight).copy_(way(gradient, hidden, spec))

    def timed() -> dict[str, Any]:
        names = ("direct", "product") if gathers(hidden, spec) else ("direct",)
        return {name: lambda name=name: in_full(WEIGHT_WAYS[name]) for name in names}

    return in_full(WEIGHT_WAYS[pick(("weight", *spec.numbers, *hidden.shape), timed)])


# --- what they share

WAYS: dict[tuple[str, str], tuple[Callable[..., Tensor], str]] = {
    ("forward", "direct"): (forward_direct, "last"),
    ("forward", "product"): (forward_product, "rows"),
    ("input", "direct"): (input_direct, "last"),
    ("input", "forward"): (input_forward, "turned"),
    ("input", "scatter"): (input_scatter, "rows"),
    ("input", "product"): (input_product, "turned_rows"),
}


def run(what: str, names: Sequence[str], spec: Spec, hidden: Tensor, *sizes: int) -> Tensor:
    """By the fastest of the named ways; a trained weight's form is made anew at every step, so it is timed as well."""
    trained = spec.conv.weight.requires_grad

    def timed() -> dict[str, Any]:
        weight = spec.conv.weight.detach()
        found = {}
        for name in names:
            way, form = WAYS[what, name]
            made = FORMS[form](weight.to(BF16))

            def once(way: Any = way, form: str = form, made: Tensor = made) -> Tensor:
                return way(hidden, FORMS[form](weight.to(BF16)) if trained else made, spec, *sizes)

            found[name] = once
        return found

    name = pick((what, *spec.numbers, *hidden.shape, spec.channels, trained), timed)
    way, form = WAYS[what, name]
    return way(hidden, spec.form(form, forward=what == "forward"), spec, *sizes)


def gathers(hidden: Tensor, spec: Spec) -> bool:
    """Whether to gather neighbourhoods at all: beyond some size that only moves memory."""
    return hidden.numel() * spec.kernel**2 <= MOST_GATHERED


def gather(hidden: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Every pixel's neighbourhood as a row: [B, C, H, W] to [B*H'*W', k*k*C], and (B, H', W')."""
    channels = hidden.shape[1]
    pixels = hidden.permute(0, 2, 3, 1)
    if padding:
        pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
    batch, height, width, _ = pixels.shape
    size = (batch, (height - kernel) // stride + 1, (width - kernel) // stride + 1)
    if kernel == 1 and stride == 1:
        return pixels.reshape(-1, channels), size
    row, column = pixels.stride(1), pixels.stride(2)
    strides = (pixels.stride(0), row * stride, column * stride, row, column, 1)
    windows = pixels.as_strided((*size, kernel, kernel, channels), strides)
    return windows.reshape(-1, kernel * kernel * channels), size


def spread(found: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[B*H*W, C] to [B, C, H, W], channels last."""
    return found.view(*size, -1).permute(0, 3, 1, 2)


def flat(hidden: Tensor) -> Tensor:
    """[B, C, H, W], channels last, to [B*H*W, C]."""
    return hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])


class Conv(Function):
    """A convolution that keeps its input only where its weight is trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Any:
        ctx.spec, ctx.shape = spec, hidden.shape
        ctx.save_for_backward(hidden if weight.requires_grad else None)
        return forward(hidden, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,), spec = ctx.saved_tensors, ctx.spec
        gradient = gradient.to(BF16).contiguous(memory_format=LAST)
        for_hidden = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_hidden = input_gradient(gradient, ctx.shape, spec)
        if ctx.needs_input_grad[1]:
            for_weight = weight_gradient(gradient, hidden, spec)
        if ctx.needs_input_grad[2]:
            for_bias = sum_rows(flat(gradient)).to(spec.conv.bias.dtype)
        return for_hidden, for_weight, for_bias, None
