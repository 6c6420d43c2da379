"""Neighbourhoods of pixels as rows, and back: what makes a convolution a matrix product."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bridle.kernels import native

LAST = torch.channels_last
Size = tuple[int, int, int]
MOST_GATHERED = 64 * 2**20  # elements of gathered neighbourhoods beyond which that way is not even tried


def gathers(hidden: Tensor, kernel: int) -> bool:
    """Whether to gather neighbourhoods at all: beyond some size that only moves memory."""
    return hidden.numel() * kernel**2 <= MOST_GATHERED


def gather(hidden: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Size]:
    """Every pixel's neighbourhood as a row: [B, C, H, W] to [B*H'*W', k*k*C], and (B, H', W')."""
    batch, _, height, width = hidden.shape
    down, across = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    size = (batch, down, across)
    if kernel == stride == 1 and not padding:
        return flat(hidden), size
    if native.library(hidden.dtype) is not None:
        return native.gather(hidden, kernel, stride, padding, size), size
    return gather_plain(hidden, kernel, stride, padding, size), size


def gather_plain(hidden: Tensor, kernel: int, stride: int, padding: int, size: Size) -> Tensor:
    """The same as PyTorch does it."""
    pixels = hidden.permute(0, 2, 3, 1)
    if padding:
        pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
    row, column = pixels.stride(1), pixels.stride(2)
    strides = (pixels.stride(0), row * stride, column * stride, row, column, 1)
    windows = pixels.as_strided((*size, kernel, kernel, hidden.shape[1]), strides)
    return windows.reshape(-1, kernel * kernel * hidden.shape[1])


def scatter(said: Tensor, height: int, width: int, wanted: int, stride: int, padding: int) -> Tensor:
    """The transpose of `gather`, added up in float32: [B, H', W', k, k, C] to [B, wanted, height, width]."""
    batch, down, across, kernel, _, channels = said.shape
    if native.library(said.dtype) is not None:
        return native.scatter(said, (batch, channels, height, width), wanted, (kernel, stride, padding))
    said = said[..., :wanted]
    sums = said.new_zeros(batch, height + 2 * padding, width + 2 * padding, wanted, dtype=torch.float32)
    for row in range(kernel):
        rows = slice(row, row + stride * down, stride)
        for column in range(kernel):
            sums[:, rows, column : column + stride * across : stride] += said[:, :, :, row, column]
    inside = sums[:, padding : padding + height, padding : padding + width]
    return inside.to(said.dtype, memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def spread(found: Tensor, size: Size) -> Tensor:
    """[B*H*W, C] to [B, C, H, W], channels last."""
    return found.view(*size, -1).permute(0, 3, 1, 2)


def flat(hidden: Tensor) -> Tensor:
    """[B, C, H, W], channels last, to [B*H*W, C]."""
    return hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])
