"""Convolutions of 3x3 by fewer multiplications: Winograd's minimal filtering, arXiv 1509.09308.

In float32 F(4x4, 3x3), by a quarter of them: it rounds off about twice what PyTorch's own convolution does, and up to
five times for the gradient of a weight, a few millionths (`winograd.c` says why so little). In bfloat16 that would be
percents, so there it is F(2x2, 3x3), by 4/9 of them: it rounds off 0.5%, three times as much as PyTorch's.
"""

from collections.abc import Iterator
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridle.kernels.compiler import load
from bridle.kernels.working import BF16

SIDES = {torch.float32: 4, BF16: 2}  # pixels of a tile's output
ROOM = 2**18  # numbers in the planes of the tiles that a thread works on at once: what the second cache holds
FEWEST = {torch.float32: 64, BF16: 512}  # tiles at once, or the products have too few rows to be fast
MOST_SUMMED = 2**24  # numbers in the planes at once whose sum a weight's gradient is, in bfloat16

ARGUMENTS = {
    "winograd_filter": (2, 2),
    "winograd_learned": (2, 2),
    "winograd_input": (2, 6),
    "winograd_output": (3, 6),
    "winograd_told": (2, 6),
}


@cache
def library(kind: torch.dtype) -> Any:
    """The functions compiled for features of a type; None where this machine has no compiler for them."""
    found = load("winograd.c", *["FLOAT32"] * (kind is torch.float32))
    if found is not None:
        for name, (tensors, sizes) in ARGUMENTS.items():
            getattr(found, name).argtypes = [c_void_p] * tensors + [c_int64] * sizes + [c_int]
    return found


def fits(kernel: int, stride: int, padding: int, kind: torch.dtype) -> bool:
    """Whether such a convolution can be computed so, here."""
    return (kernel, stride, padding) == (3, 1, 1) and kind in SIDES and library(kind) is not None


def planes(kind: torch.dtype) -> int:
    """How many products there are, each of a number of every tile."""
    return (SIDES[kind] + 2) ** 2


def form(weight: Tensor) -> Tensor:
    """[D, C, 3, 3] to what the planes are multiplied by, [planes, D, C]: four times as many numbers, or 16/9 times."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out, channels = weight.shape[:2]
    formed = weight.new_empty(planes(weight.dtype), out, channels)
    threads = torch.get_num_threads()
    library(weight.dtype).winograd_filter(weight.data_ptr(), formed.data_ptr(), out, channels, threads)
    return formed


def forward(hidden: Tensor, formed: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of [B, C, H, W], channels last, to [B, D, H, W], channels last."""
    batch, channels, height, width = hidden.shape
    (count, out, _), kind, threads = formed.shape, hidden.dtype, torch.get_num_threads()
    compiled, output = library(kind), hidden.new_empty(batch, height, width, out)
    shift = None if bias is None else bias.contiguous()
    address = None if shift is None else shift.data_ptr()
    for first, tiles, rows in chunks(hidden, ROOM * threads // (count * (channels + out))):
        read, written = hidden.new_empty(count, rows, channels), hidden.new_empty(count, rows, out)
        where = first, tiles, rows, threads
        compiled.winograd_input(hidden.data_ptr(), read.data_ptr(), height, width, channels, *where)
        torch.bmm(read, formed.transpose(1, 2), out=written)
        compiled.winograd_output(written.data_ptr(), address, output.data_ptr(), height, width, out, *where)
    return output.permute(0, 3, 1, 2)


def weight_gradient(gradient: Tensor, hidden: Tensor) -> Tensor:
    """[B, D, H, W] and the input, [B, C, H, W], to [D, C, 3, 3]; all with channels last."""
    _, channels, height, width = hidden.shape
    out, kind, threads = gradient.shape[1], hidden.dtype, torch.get_num_threads()
    compiled, count = library(kind), planes(kind)
    sums: Tensor | None = None
    room = ROOM * threads if kind is torch.float32 else MOST_SUMMED
    for first, tiles, rows in chunks(hidden, room // (count * (channels + out))):
        read, told = hidden.new_empty(count, rows, channels), hidden.new_empty(count, rows, out)
        where = first, tiles, rows, threads
        compiled.winograd_input(hidden.data_ptr(), read.data_ptr(), height, width, channels, *where)
        compiled.winograd_told(gradient.data_ptr(), told.data_ptr(), height, width, out, *where)
        if sums is None:
            sums = torch.bmm(told.transpose(1, 2), read)
        elif kind is BF16:
            sums = sums.float() + torch.bmm(told.transpose(1, 2), read)
        else:
            sums.baddbmm_(told.transpose(1, 2), read)
    assert sums is not None
    sums, found = sums.to(kind), hidden.new_empty(out, 3, 3, channels)
    compiled.winograd_learned(sums.data_ptr(), found.data_ptr(), out, channels, threads)
    return found.permute(0, 3, 1, 2)


def chunks(hidden: Tensor, most: int) -> Iterator[tuple[int, int, int]]:
    """Of each part of the work the first tile, how many, and how many rows planes have for them.

    Args: most: tiles to be worked on at once, if that is not too few.
    """
    batch, _, height, width = hidden.shape
    side, most = SIDES[hidden.dtype], max(most, FEWEST[hidden.dtype] * torch.get_num_threads())
    total = batch * -(-height // side) * -(-width // side)
    for first in range(0, total, most):
        tiles = min(most, total - first)
        yield first, tiles, tiles | 1  # of even numbers, planes would lie in one place of the processor's caches
