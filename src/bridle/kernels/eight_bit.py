"""Moments of AdamW in 8 bits (arXiv 2110.02861): `eight_bit.c` as functions of tensors, and the same codes in PyTorch.

The codes are bitsandbytes' dynamic type, so that its state can be read, in blocks of 256 numbers in the order in which
they lie. What is not zero gets no code of zero where it has no sign: steps are divided by second moments.
"""

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridle.kernels.compiler import load

BLOCK = 256
LEAST = 4096  # numbers from which on moments are kept so; bitsandbytes' choice as well
DECADES = 7


@cache
def library() -> Any:
    """The compiled function; None where this machine has no compiler for it."""
    found = load("eight_bit.c")
    if found is not None:
        found.adamw_8bit.argtypes = [c_void_p] * 7 + [c_int64, c_int] + [c_float] * 8 + [c_int]
    return found


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    largest_first: Tensor,
    largest_second: Tensor,
    cast: Tensor | None,
    scale: float,
    *how: float,
) -> None:
    """One step, in place. As `native.adamw`, but for the moments.

    Args:
        first, second: uint8, of the weight's size and order; codes with and without a sign.
        largest_first, largest_second: [blocks], float32.
    """
    parts = weight, gradient, first, second, largest_first, largest_second
    addresses = [*(part.data_ptr() for part in parts), None if cast is None else cast.data_ptr()]
    half = gradient.dtype is torch.bfloat16
    library().adamw_8bit(*addresses, weight.numel(), half, scale, *how, torch.get_num_threads())


@cache
def shares(signed: bool) -> Tensor:
    """What the 256 codes stand for, ascending: shares of a block's largest number, [-1, 1] or [0, 1]."""
    parts = [10.0 ** (at - DECADES + 1) * middles(2 ** (at + (not signed))) for at in range(DECADES)]
    positive = torch.cat(parts)
    ends = torch.tensor([0.0]), torch.tensor([1.0])
    return torch.cat([*([-positive.flip(0)] if signed else []), ends[0], positive, ends[1]])


def middles(count: int) -> Tensor:
    """Of equal parts between 0.1 and 1."""
    return 0.1 + 0.9 * (torch.arange(count) + 0.5) / count


def quantize(numbers: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """[N] to codes, [N], uint8, and the largest of each block, [blocks]."""
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
    largest, known = blocks.abs().amax(1), shares(signed)
    relative = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(relative, (known[1:] + known[:-1]) / 2, right=True)
    if not signed:
        codes += (codes == 0) & (relative > 0)
    return codes.to(torch.uint8).view(-1)[: len(numbers)], largest


def dequantize(codes: Tensor, largest: Tensor, *, signed: bool) -> Tensor:
    """What `quantize` gave, to float32, [N]."""
    return shares(signed)[codes.long()] * largest.repeat_interleave(BLOCK)[: len(codes)]
