"""A lighter way back through a locked decoder: the same gradients, with less kept for them and less computed.

Training a control needs the decoder's gradients only to pass them on. Autograd keeps more than that takes: the input of
every convolution, which only its weights' gradient would need, and under autocast a bfloat16 copy of every weight.
While only the middle link is connected it also computes more: each decoder block sees what comes from below and a skip
connection as one tensor, so the skip's share of the gradient is computed, and then dropped.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from bridle.control.control import read_call
from bridle.control.unet import link_widths


def lighten_decoder(unet: Any, *, skips: bool) -> Callable[[], None]:
    """Have the convolutions of a locked decoder keep nothing but their own weights for the backward pass.

    The forward pass is the same bit for bit, and so is what runs without gradients; the gradients are the same but for
    rounding.

    Args:
        unet: a diffusers U-Net whose decoder is not trained.
        skips: whether gradients are wanted for the skip connections; not while only the middle link is connected.

    Returns: what makes the U-Net as it was again; calling it twice does no harm.
    """
    needed = {conv: conv.in_channels for conv in decoder_convs(unet)}
    if not skips:
        needed |= dict(channels_from_below(unet))
    assert not any("forward" in vars(conv) for conv in needed), "the decoder is lightened already"
    for conv, channels in needed.items():
        vars(conv)["forward"] = partial(convolve, conv, channels)
    end_guard = (lambda: None) if skips else refuse_skips(unet)

    def undo() -> None:
        for conv in needed:
            vars(conv).pop("forward", None)
        end_guard()

    return undo


def refuse_skips(unet: Any) -> Callable[[], None]:
    """Fail where a skip connection wants gradients. Returns: what ends that."""
    guards = [block.register_forward_pre_hook(check_skips, with_kwargs=True) for block in unet.up_blocks]

    def undo() -> None:
        for guard in guards:
            guard.remove()

    return undo


def decoder_convs(unet: Any) -> Iterator[nn.Conv2d]:
    """All convolutions from the middle block's output to the prediction."""
    for module in (*unet.up_blocks.modules(), unet.conv_out):
        if isinstance(module, nn.Conv2d):
            yield module


def channels_from_below(unet: Any) -> Iterator[tuple[nn.Conv2d, int]]:
    """The convolutions that see a skip connection, and for how many of their first channels a gradient is needed.

    Those from below come first. A group normalisation before the convolution mixes the channels of a group, so the
    group that holds the last one from below is needed whole (Stable Diffusion 1.5: 1280 from below, groups of 60).
    """
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    widths = reversed(link_widths(unet.conv_in, unet.down_blocks))
    for resnet, skip in zip(resnets, widths, strict=True):
        together = resnet.conv1.in_channels
        group = together // resnet.norm1.num_groups
        yield resnet.conv1, -(-(together - skip) // group) * group
        if resnet.conv_shortcut is not None:
            yield resnet.conv_shortcut, together - skip


def check_skips(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Without this a link that was connected too early would never learn, and nobody would know."""
    wanted = any(skip.requires_grad for skip in read_call(block, args, kwargs)["res_hidden_states_tuple"])
    assert not wanted, "skip connections want gradients, but the decoder was lightened with skips=False"


def convolve(conv: nn.Conv2d, channels: int, hidden: Tensor) -> Tensor:
    """Stands in for a convolution's `forward`."""
    if not hidden.requires_grad:
        return nn.Conv2d.forward(conv, hidden)
    assert not conv.weight.requires_grad, "the decoder is trained, but was lightened as a locked one"
    output: Tensor = LockedConv.apply(hidden, conv.weight, conv, channels)
    return output


class LockedConv(Function):
    """A convolution that hands gradients through to the first so many of its input channels, and zero to the rest."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, conv: nn.Conv2d, channels: int) -> Tensor:
        ctx.save_for_backward(weight)  # not an attribute: sharding swaps what a parameter holds between the passes
        ctx.conv, ctx.channels, ctx.shape = conv, channels, hidden.shape
        return nn.Conv2d.forward(conv, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,), conv, channels = ctx.saved_tensors, ctx.conv, ctx.channels
        batch, together, height, width = ctx.shape
        weight = lying_as(gradient, weight[:, :channels].to(gradient.dtype))
        shape = (batch, channels, height, width)
        below = conv2d_input(shape, weight, gradient, conv.stride, conv.padding, conv.dilation, conv.groups)
        if channels < together:
            below = F.pad(below, (0, 0, 0, 0, 0, together - channels))
        return below, None, None, None


def lying_as(gradient: Tensor, weight: Tensor) -> Tensor:
    """A weight in the order of the gradient: a slice's strides, or another order, would slow the kernel down."""
    if not gradient.is_contiguous(memory_format=torch.channels_last):
        return weight.contiguous()
    _, channels, height, width = weight.shape
    strides = (height * width * channels, 1, width * channels, channels)  # 1x1 ones pass for channels first as well
    return weight.contiguous(memory_format=torch.channels_last).as_strided(weight.shape, strides)
