"""Group normalisation of features with channels last, where PyTorch's own kernel takes many times as long."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bridle.kernels import native
from bridle.kernels.choice import pick
from bridle.kernels.working import BF16, learns


def normalise(norm: nn.GroupNorm, hidden: Tensor) -> Tensor:
    """Stands in for a group normalisation's `forward`: [B, C, H, W], channels last, in the input's type."""
    if hidden.shape[1] != norm.num_channels or not hidden.is_contiguous(memory_format=torch.channels_last):
        return nn.GroupNorm.forward(norm, hidden)
    if not learns(hidden, norm.weight, norm.bias):
        return forward(hidden, norm)[0]
    output: Tensor = GroupNorm.apply(hidden, norm.weight, norm.bias, norm)
    return output


Normalised = tuple[Tensor, Tensor, Tensor]
Way = Callable[[], Normalised]


def forward(hidden: Tensor, norm: nn.GroupNorm) -> Normalised:
    """Returns: normalised [B, C, H, W], and of each group mean and 1 / deviation, [B, G], float32."""
    if hidden.is_cuda:
        return on_gpu().forward(hidden, norm)
    sizes = (hidden.shape[0], hidden.shape[1], hidden.shape[2] * hidden.shape[3])
    weight, bias = norm.weight.detach().contiguous(), norm.bias.detach().contiguous()

    def theirs() -> Normalised:
        found = torch.ops.aten.native_group_norm(hidden, weight, bias, *sizes, norm.num_groups, norm.eps)
        return found[0], found[1].float(), found[2].float()

    def sums() -> Normalised:
        normal, mean, inverse = sums_forward(rows(hidden), norm, weight, bias)
        return image(normal, hidden), mean, inverse

    def compiled() -> Normalised:
        return native.group_norm(hidden, norm, weight.float(), bias.float())

    ways = able({"native": theirs, "sums": sums, "compiled": compiled}, norm, hidden.dtype)
    return ways[pick(("norm", *hidden.shape, norm.num_groups, hidden.dtype), lambda: ways)]()


def backward(
    gradient: Tensor, hidden: Tensor, mean: Tensor, inverse: Tensor, norm: nn.GroupNorm, trained: bool
) -> Normalised:
    """Returns: the gradients of input, weight and bias; the latter two mean nothing unless they are trained."""
    if hidden.is_cuda:
        return on_gpu().backward(gradient, hidden, mean, inverse, norm, trained)
    sizes = (hidden.shape[0], hidden.shape[1], hidden.shape[2] * hidden.shape[3])
    weight = norm.weight.detach().contiguous()

    def theirs() -> Normalised:
        kind = weight.dtype
        found: Normalised = torch.ops.aten.native_group_norm_backward(
            gradient, hidden, mean.to(kind), inverse.to(kind), weight, *sizes, norm.num_groups, [True, trained, trained]
        )
        return found

    def sums() -> Normalised:
        found = sums_backward(rows(gradient), rows(hidden), mean, inverse, norm.num_groups, weight)
        return image(found[0], hidden), found[1], found[2]

    def compiled() -> Normalised:
        return native.group_norm_backward(gradient, hidden, mean, inverse, weight.float())

    ways = able({"native": theirs, "sums": sums, "compiled": compiled}, norm, hidden.dtype)
    return ways[pick(("norm_backward", *hidden.shape, norm.num_groups, trained, hidden.dtype), lambda: ways)]()


def on_gpu() -> Any:
    """The kernels for GPUs. Raises: ImportError: PyTorch came without Triton, as it does where there is none."""
    from bridle.kernels import triton_norm

    return triton_norm


def able(ways: dict[str, Way], norm: nn.GroupNorm, kind: torch.dtype) -> dict[str, Way]:
    """Those that are ways here. In float32 the compiled one alone where there is one: it rounds least."""
    compiled = compiles(norm, kind)
    if kind is BF16:
        return {name: way for name, way in ways.items() if compiled or name != "compiled"}
    name = "compiled" if compiled else "native"
    return {name: ways[name]}


def compiles(norm: nn.GroupNorm, kind: torch.dtype = BF16) -> bool:
    """Whether the compiled function does such a normalisation: two groups have to fit what it keeps."""
    return native.library(kind) is not None and 2 * norm.num_channels // norm.num_groups <= native.MOST_CHANNELS


def rows(hidden: Tensor) -> Tensor:
    """[B, C, H, W], channels last, to [B, H*W, C]."""
    return hidden.permute(0, 2, 3, 1).flatten(1, 2)


def image(found: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] to [B, C, H, W], channels last."""
    batch, channels, height, width = like.shape
    return found.view(batch, height, width, channels).permute(0, 3, 1, 2)


def sums_forward(hidden: Tensor, norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Normalised:
    """[B, P, C] by two sums over pixels, the second about the mean."""
    batch, pixels, channels = hidden.shape
    groups = norm.num_groups
    exact = hidden.float()
    number = pixels * channels // groups
    mean = exact.sum(1).view(batch, groups, -1).sum(2) / number
    exact.sub_(fill(mean, (batch, groups, channels // groups)))
    variance = exact.square().sum(1).view(batch, groups, -1).sum(2) / number
    inverse = (variance + norm.eps).rsqrt()
    slope = inverse[:, :, None] * weight.view(groups, -1)
    normal = torch.addcmul(bias.view(1, 1, channels).float(), exact, slope.view(batch, 1, channels))
    return normal.to(BF16), mean, inverse


def sums_backward(
    gradient: Tensor, hidden: Tensor, mean: Tensor, inverse: Tensor, groups: int, weight: Tensor
) -> Normalised:
    """[B, P, C]: with h = (x - m) r and g' = g w, the input's gradient is r (g' - mean(g') - h mean(g' h))."""
    batch, pixels, channels = hidden.shape
    number = pixels * channels // groups
    pulled, exact = gradient.float(), hidden.float()
    sums, products = pulled.sum(1).view(batch, groups, -1), (pulled * exact).sum(1).view(batch, groups, -1)
    along = (products - mean[:, :, None] * sums) * inverse[:, :, None]
    scale = weight.view(groups, -1)
    slope = -inverse.square() * (along * scale).sum(2) / number
    level = -inverse * (sums * scale).sum(2) / number - slope * mean
    shape = (batch, groups, channels // groups)
    found = torch.addcmul(fill(level, shape), exact, fill(slope, shape))
    found.addcmul_(pulled, (inverse[:, :, None] * scale).view(batch, 1, channels))
    return found.to(BF16), along.sum(0).flatten(), sums.sum(0).flatten()


def fill(values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """One value per group, [B, G], as one per channel, [B, 1, C]."""
    return values[:, :, None].expand(shape).reshape(len(values), 1, -1)


class GroupNorm(Function):
    """The same, with gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm) -> Any:
        normal, mean, inverse = forward(hidden, norm)
        ctx.save_for_backward(hidden, mean, inverse)
        ctx.norm = norm
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden, mean, inverse), norm = ctx.saved_tensors, ctx.norm
        gradient = gradient.to(hidden.dtype).contiguous(memory_format=torch.channels_last)
        trained = any(ctx.needs_input_grad[1:3])
        for_hidden, for_weight, for_bias = backward(gradient, hidden, mean, inverse, norm, trained)
        if not trained:
            return for_hidden, None, None, None
        kind = norm.weight.dtype
        return for_hidden, for_weight.to(kind), for_bias.to(kind), None
