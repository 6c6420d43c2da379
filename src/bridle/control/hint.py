"""Hints: from a picture to a checked tensor, and from pixels to the size of the latents.

In: a PIL image, a uint8 array or a tensor. Out: [B, K, H, W] float32 in [0, 1], and features [B, C, H / f, W / f]; f is
the autoencoder's factor. Two encoders: `official` (what the released code, diffusers, ComfyUI and webui have) and
`paper` (what the text of arXiv:2302.05543 says, as far as it adds up).
"""

from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from PIL import Image
from torch import Tensor, nn

from bridle.control.block import zero_conv
from bridle.errors import ConfigError, HintError

HintEncoder = Literal["official", "paper"]
OFFICIAL_CHANNELS = (16, 32, 96, 256)
PAPER_CHANNELS = (16, 32, 64, 128)


class PaperHintEncoder(nn.Sequential):
    """Four 4x4 convolutions with ReLU and Gaussian weights, as the paper's text says, adapted so that the sizes fit.

    The text gives every layer a stride of 2, which takes 512 px to 32, not to the 64 of the latents, and ends on 128
    channels where the U-Net has 320. Here as many layers have stride 2 as the autoencoder's factor asks for, the rest
    have stride 1, and a zero convolution leads from 128 to the model's channels.
    """

    def __init__(self, channels_in: int, channels_out: int, size_factor: int) -> None:
        layers: list[nn.Module] = []
        halvings = size_factor.bit_length() - 1
        for index, channels in enumerate(PAPER_CHANNELS):
            if index < halvings:
                conv = nn.Conv2d(channels_in, channels, kernel_size=4, stride=2, padding=1)
            else:
                layers.append(nn.ZeroPad2d((1, 2, 1, 2)))  # what padding="same" does, without torch's warning
                conv = nn.Conv2d(channels_in, channels, kernel_size=4)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU()]
            channels_in = channels
        super().__init__(*layers, zero_conv(channels_in, channels_out))


def build_hint_encoder(kind: HintEncoder, hint_channels: int, channels_out: int, size_factor: int) -> nn.Module:
    """Args: channels_out: those of the base's first convolution. size_factor: pixels per latent, a power of two."""
    if size_factor not in (1, 2, 4, 8, 16):
        raise ConfigError(f"size factor {size_factor} cannot be encoded; expected 1, 2, 4, 8 or 16 pixels per latent")
    if kind not in ("official", "paper"):
        raise ConfigError(f"hint encoder is {kind!r}; expected 'official' or 'paper'")
    if kind == "paper":
        return PaperHintEncoder(hint_channels, channels_out, size_factor)
    return ControlNetConditioningEmbedding(channels_out, hint_channels, official_channels(size_factor))


def official_channels(size_factor: int) -> tuple[int, ...]:
    """The official encoder halves the size between each two of its widths, so the factor decides how many there are."""
    halvings = size_factor.bit_length() - 1
    return (OFFICIAL_CHANNELS + OFFICIAL_CHANNELS[-1:])[: halvings + 1]


def to_hint(hint: Any, channels: int) -> Tensor:
    """Turn what people have at hand into a hint tensor.

    Args:
        hint: a PIL image, an array [H, W], [H, W, K] or [B, H, W, K] of uint8, or a tensor [K, H, W] or [B, K, H, W] in
            [0, 1].
        channels: how many channels the control was made for; a grey picture serves as three equal ones.

    Returns: [B, channels, H, W] float32.
    Raises: HintError: the type, the number of channels or the range does not fit.
    """
    if isinstance(hint, Image.Image):
        hint = to_array(hint, channels)
    if isinstance(hint, np.ndarray):
        if hint.dtype != np.uint8:
            raise HintError(f"hint array has type {hint.dtype}; expected uint8 (0 to 255), or a tensor in [0, 1]")
        pixels = torch.from_numpy(np.array(hint, order="C")).float() / 255
        if pixels.ndim == 2:
            pixels = pixels[..., None].expand(-1, -1, 3 if channels == 3 else 1)
        hint = pixels.movedim(-1, -3)
    if not isinstance(hint, Tensor):
        raise HintError(f"hint is a {type(hint).__name__}; expected a PIL image, a uint8 array or a tensor in [0, 1]")
    hint = hint[None] if hint.ndim == 3 else hint
    check_hint(hint, channels)
    if hint.numel() == 0:
        raise HintError(f"hint has shape {list(hint.shape)}, which is no pixels at all; give a picture")
    check_range(hint)
    return hint.float().contiguous()  # or kernels for other layouts round the same pixels differently


def to_array(picture: Image.Image, channels: int) -> np.ndarray:
    """Uint8, [H, W] for a control of one channel, [H, W, 3] for any other."""
    return np.array(picture.convert("L" if channels == 1 else "RGB"))


def to_mask(mask: Any) -> Tensor:
    """As `to_hint`, of one channel. Returns: [B, 1, H, W]. Raises: HintError: as there."""
    shape = list(getattr(mask, "shape", ()))
    if len(shape) > 2 and shape[-1 if isinstance(mask, np.ndarray) else -3] != 1:
        expected = "one channel, an array [H, W] of uint8 or a tensor [B, 1, H, W]"
        raise HintError(f"mask has shape {shape}; expected {expected}: give the channel that is 1 inside")
    return to_hint(mask, 1)


def check_range(hint: Tensor) -> None:
    """Raises: HintError: values lie outside [0, 1]."""
    low, high = hint.min().item(), hint.max().item()
    if not 0 <= low <= high <= 1:
        remedy = "add 1 and halve it if it lies in [-1, 1], divide by 255 if it lies in [0, 255]"
        raise HintError(f"hint values lie in [{low:.3g}, {high:.3g}]; expected [0, 1]: {remedy}")


def check_hint(hint: Tensor, channels: int, size_px: tuple[int, int] | None = None) -> None:
    """Raises: HintError: the shape is not [B, channels, H, W], or (H, W) is not `size_px`."""
    if hint.ndim != 4:
        raise HintError(f"hint has shape {list(hint.shape)}; expected [batch, {channels}, height, width]")
    if hint.shape[1] != channels:
        fitting = "a grey picture" if channels == 1 else f"a hint of {channels}"
        remedy = f"give {fitting}, or make a control with Control.from_base(base, hint_channels={hint.shape[1]})"
        raise HintError(f"hint has {hint.shape[1]} channels; this control was made for {channels}: {remedy}")
    if size_px is not None and tuple(hint.shape[-2:]) != size_px:
        (height, width), (expected_h, expected_w) = hint.shape[-2:], size_px
        remedy = "resize the hint, or ask for a picture of its size"
        raise HintError(f"hint is {width}x{height} px; the picture asks for {expected_w}x{expected_h} px: {remedy}")
