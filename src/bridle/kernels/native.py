"""`native.c` as functions of tensors. Where there is no compiler, `library` is None and PyTorch computes everything.

Tensors are bfloat16 or float32, on the CPU, and dense in the order that a function names; nothing is checked here.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bridle.kernels.compiler import load

MOST_CHANNELS = 4096  # of two groups of a normalisation
size, real, number, memory = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p
KINDS: dict[torch.dtype, tuple[str, ...]] = {torch.bfloat16: (), torch.float32: ("FLOAT32",)}  # and what they define
ARGUMENTS = {
    "geglu": [memory] * 2 + [size] * 2 + [number],
    "geglu_backward": [memory] * 3 + [size] * 2 + [number],
    "chances": [memory] + [size] * 2 + [real, real, number],
    "chances_backward": [memory] * 3 + [size] * 2 + [real, number],
    "group_norm": [memory] * 6 + [size] * 4 + [real, number],
    "group_norm_backward": [memory] * 8 + [size] * 4 + [number],
    "gather": [memory] * 2 + [size] * 9 + [number],
    "scatter": [memory] * 2 + [size] * 10 + [number],
    "sum_rows": [memory] * 2 + [size] * 2,
    "square_sum": [memory, size, number, number],
    "adamw": [memory] * 5 + [size, number] + [real] * 8 + [number],
}


@cache
def library(kind: torch.dtype = torch.bfloat16) -> Any:
    """The compiled functions; None where this machine has no compiler for them. Args: kind: of the features."""
    found = load("native.c", *KINDS[kind])
    if found is not None:
        for name, arguments in ARGUMENTS.items():
            getattr(found, name).argtypes = arguments
        found.square_sum.restype = ctypes.c_double
    return found


# --- features as rows


def geglu(hidden: Tensor) -> Tensor:
    """[..., 2 * D] to [..., D]: the first half times the GELU of the second."""
    *others, width = hidden.shape
    output = hidden.new_empty(*others, width // 2)
    rows = hidden.numel() // width
    library(hidden.dtype).geglu(hidden.data_ptr(), output.data_ptr(), rows, width // 2, torch.get_num_threads())
    return output


def geglu_backward(gradient: Tensor, hidden: Tensor) -> Tensor:
    """[..., D] to [..., 2 * D]."""
    found, width = torch.empty_like(hidden), hidden.shape[-1]
    addresses = gradient.data_ptr(), hidden.data_ptr(), found.data_ptr()
    library(hidden.dtype).geglu_backward(*addresses, hidden.numel() // width, width // 2, torch.get_num_threads())
    return found


def chances_(scores: Tensor, scale: float, rest: float) -> Tensor:
    """In place, [N, S]: exp(scale * score - rest)."""
    library(scores.dtype).chances(scores.data_ptr(), *scores.shape, scale, rest, torch.get_num_threads())
    return scores


def chances_backward_(gradient: Tensor, chances: Tensor, drift: Tensor, scale: float) -> Tensor:
    """In place, [N, S]: chance * (gradient - drift) * scale. Args: drift: [N], float32."""
    addresses = chances.data_ptr(), gradient.data_ptr(), drift.data_ptr()
    library(gradient.dtype).chances_backward(*addresses, *gradient.shape, scale, torch.get_num_threads())
    return gradient


def group_norm(hidden: Tensor, norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, C, H, W], channels last. Returns: normalised; mean and 1 / deviation, [B, G].

    Args:
        weight, bias: float32.
    """
    batch, channels, height, width = hidden.shape
    output, (mean, inverse) = torch.empty_like(hidden), torch.empty(2, batch, norm.num_groups)
    addresses = [part.data_ptr() for part in (hidden, weight, bias, output, mean, inverse)]
    sizes = batch, height * width, channels, norm.num_groups
    library(hidden.dtype).group_norm(*addresses, *sizes, norm.eps, torch.get_num_threads())
    return output, mean, inverse


def group_norm_backward(
    gradient: Tensor, hidden: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns: the gradients of input, weight and bias."""
    batch, channels, height, width = hidden.shape
    found, (sums, along) = torch.empty_like(hidden), torch.empty(2, batch, channels)
    addresses = [part.data_ptr() for part in (gradient, hidden, weight, mean, inverse, found, sums, along)]
    sizes = batch, height * width, channels, mean.shape[1]
    library(hidden.dtype).group_norm_backward(*addresses, *sizes, torch.get_num_threads())
    return found, along.sum(0), sums.sum(0)


def gather(hidden: Tensor, kernel: int, stride: int, padding: int, size: tuple[int, int, int]) -> Tensor:
    """[B, C, H, W], channels last, to [B*H'*W', k*k*C]. Args: size: (B, H', W')."""
    batch, channels, height, width = hidden.shape
    output = hidden.new_empty(batch * size[1] * size[2], kernel * kernel * channels)
    numbers = batch, height, width, channels, kernel, stride, padding, size[1], size[2]
    library(hidden.dtype).gather(hidden.data_ptr(), output.data_ptr(), *numbers, torch.get_num_threads())
    return output


def scatter(said: Tensor, shape: tuple[int, int, int, int], wanted: int, convolved: tuple[int, int, int]) -> Tensor:
    """The transpose of `gather`: [B, H', W', k, k, C] to [B, wanted, H, W], channels last.

    Args:
        shape: of what was gathered from, (B, C, H, W).
        convolved: (kernel, stride, padding).
    """
    batch, channels, height, width = shape
    found = said.new_empty(batch, height, width, wanted).permute(0, 3, 1, 2)
    numbers = batch, height, width, channels, wanted, *convolved, said.shape[1], said.shape[2]
    library(said.dtype).scatter(said.data_ptr(), found.data_ptr(), *numbers, torch.get_num_threads())
    return found


def sum_rows(rows: Tensor) -> Tensor:
    """[N, C] to [C], float32."""
    sums = torch.empty(rows.shape[1])
    library(rows.dtype).sum_rows(rows.data_ptr(), sums.data_ptr(), *rows.shape)
    return sums


# --- weights


def square_sum(tensor: Tensor) -> float:
    """Of any dense tensor, float32 or bfloat16."""
    half = tensor.dtype is torch.bfloat16
    found: float = library().square_sum(tensor.data_ptr(), tensor.numel(), half, torch.get_num_threads())
    return found


def adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, cast: Tensor | None, scale: float, *how: float
) -> None:
    """One step, in place. All are dense and in the same order; float32, the gradient bfloat16 or float32.

    Args:
        cast: bfloat16; becomes the new weight as well.
        scale: the gradient is multiplied by it.
        how: see `native.c`, from `lr` on.
    """
    addresses = [None if part is None else part.data_ptr() for part in (weight, gradient, first, second, cast)]
    half = gradient.dtype is torch.bfloat16
    library().adamw(*addresses, weight.numel(), half, scale, *how, torch.get_num_threads())
