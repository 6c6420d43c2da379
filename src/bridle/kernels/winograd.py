"""Convolutions of 3x3 in float32 by a quarter of the multiplications: Winograd's F(4x4, 3x3), arXiv 1509.09308.

What is rounded off is about twice what PyTorch's own convolution rounds off, and up to five times for the gradient of
a weight: a few millionths (`winograd.c` says why so little). In bfloat16 it would be percents, so there it is not used.
"""

from collections.abc import Iterator
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridle.kernels.compiler import load

SIDE = 4  # pixels of a tile's output
PLANES = 36
ROOM = 2**18  # numbers in the planes of the tiles that a thread works on at once: what the second cache holds
FEWEST = 64  # tiles at once, or the products have too few rows to be fast

ARGUMENTS = {
    "winograd_filter": (2, 2),
    "winograd_learned": (2, 2),
    "winograd_input": (2, 5),
    "winograd_output": (3, 5),
    "winograd_told": (2, 5),
}


@cache
def library() -> Any:
    """The compiled functions; None where this machine has no compiler for them."""
    found = load("winograd.c")
    if found is not None:
        for name, (tensors, sizes) in ARGUMENTS.items():
            getattr(found, name).argtypes = [c_void_p] * tensors + [c_int64] * sizes + [c_int]
    return found


def fits(kernel: int, stride: int, padding: int) -> bool:
    """Whether such a convolution can be computed so, here."""
    return (kernel, stride, padding) == (3, 1, 1) and library() is not None


def form(weight: Tensor) -> Tensor:
    """[D, C, 3, 3] to what the planes are multiplied by, [36, D, C]: four times as many numbers."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out, channels = weight.shape[:2]
    formed = weight.new_empty(PLANES, out, channels)
    library().winograd_filter(weight.data_ptr(), formed.data_ptr(), out, channels, torch.get_num_threads())
    return formed


def forward(hidden: Tensor, formed: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of [B, C, H, W], channels last, to [B, D, H, W], channels last."""
    batch, channels, height, width = hidden.shape
    out = formed.shape[1]
    output = hidden.new_empty(batch, height, width, out)
    shift = None if bias is None else bias.contiguous()
    address = None if shift is None else shift.data_ptr()
    for first, tiles in chunks(hidden, channels + out):
        read, written = hidden.new_empty(PLANES, tiles, channels), hidden.new_empty(PLANES, tiles, out)
        where = height, width, channels, first, tiles, torch.get_num_threads()
        library().winograd_input(hidden.data_ptr(), read.data_ptr(), *where)
        torch.bmm(read, formed.transpose(1, 2), out=written)
        where = height, width, out, first, tiles, torch.get_num_threads()
        library().winograd_output(written.data_ptr(), address, output.data_ptr(), *where)
    return output.permute(0, 3, 1, 2)


def weight_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    """[B, D, H, W] and the input, [B, C, H, W], to [D, C, 3, 3]; all with channels last."""
    _, channels, height, width = hidden.shape
    out = gradient.shape[1]
    sums = hidden.new_zeros(PLANES, out, channels)
    for first, tiles in chunks(hidden, channels + out):
        read, told = hidden.new_empty(PLANES, tiles, channels), hidden.new_empty(PLANES, tiles, out)
        threads = torch.get_num_threads()
        library().winograd_input(hidden.data_ptr(), read.data_ptr(), height, width, channels, first, tiles, threads)
        library().winograd_told(gradient.data_ptr(), told.data_ptr(), height, width, out, first, tiles, threads)
        sums.baddbmm_(told.transpose(1, 2), read)
    found = hidden.new_empty(out, 3, 3, channels)
    library().winograd_learned(sums.data_ptr(), found.data_ptr(), out, channels, torch.get_num_threads())
    return found.permute(0, 3, 1, 2)


def chunks(hidden: Tensor, channels: int) -> Iterator[tuple[int, int]]:
    """The first tile, and how many, of each part of the work. Args: channels: of all planes together."""
    batch, _, height, width = hidden.shape
    tiles = batch * -(-height // SIDE) * -(-width // SIDE)
    most = max(FEWEST, ROOM // (PLANES * channels)) * torch.get_num_threads()
    for first in range(0, tiles, most):
        yield first, min(most, tiles - first)
