"""Our C, compiled once by this machine's own C compiler; and `native.c` as functions of tensors.

The compiler is what the environment's CC names, or else cc, gcc or clang; CC=false does without. Where there is none,
or it fails, `library` is None and PyTorch computes everything. The compiled file lies in the user's cache folder.

Tensors are bfloat16, on the CPU, and dense in the order that a function names; nothing is checked here.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridle.atomic import write_with
from bridle.kernels.machine import cache_folder, processor

SOURCES = [Path(__file__).with_name(name) for name in ("native.c", "attention.c")]
HEADER = Path(__file__).with_name("bf16.h")
COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 120.0
MOST_CHANNELS = 4096  # of two groups of a normalisation
# Sums may be reordered and products fused, or loops would not become ones of vectors; infinities and NaN stay such.
EXACTLY = [
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
]
# From the fastest to what every compiler takes.
FLAGS = (
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-march=native"],
    [],
)
size, real, number, memory = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p
ARGUMENTS = {
    "geglu": [memory] * 2 + [size] * 2 + [number],
    "geglu_backward": [memory] * 3 + [size] * 2 + [number],
    "chances": [memory] * 2 + [size] * 2 + [real, number],
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
def library() -> Any:
    """The compiled functions; None where this machine has no compiler for them."""
    for compiler in compilers():
        for flags in FLAGS:
            with suppress(OSError, subprocess.SubprocessError):
                found = ctypes.CDLL(str(compiled(compiler, [*EXACTLY, *flags])))
                for name, arguments in ARGUMENTS.items():
                    getattr(found, name).argtypes = arguments
                found.square_sum.restype = ctypes.c_double
                return found
    return None


def compilers() -> Iterator[str]:
    """Paths of the C compilers to try."""
    named = os.environ.get("CC")
    for name in [named] if named else COMPILERS:
        path = shutil.which(name)
        if path:
            yield path


def compiled(compiler: str, flags: list[str]) -> Path:
    """The library that a compiler makes of the sources, from the cache folder where it is there.

    Raises:
        OSError: the folder cannot be written, or the compiler not be started.
        SubprocessError: the compiler fails.
    """
    made_by = "\n".join([compiler, *flags, processor(), *(source.read_text() for source in (HEADER, *SOURCES))])
    path = cache_folder() / f"native-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        # PyTorch's own OpenMP library where it brings one, or there would be two kinds of threads in a process.
        theirs = [str(found) for found in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
        linked = ["-Wl,--as-needed", *theirs] if sys.platform == "linux" and "-fopenmp" in flags else []

        def compile_to(temporary: Path) -> None:
            command = [compiler, *flags, *map(str, SOURCES), "-o", str(temporary), *linked, "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)

        write_with(path, compile_to)
    return path


# --- features as rows


def geglu(hidden: Tensor) -> Tensor:
    """[..., 2 * D] to [..., D]: the first half times the GELU of the second."""
    *others, width = hidden.shape
    output = hidden.new_empty(*others, width // 2)
    rows = hidden.numel() // width
    library().geglu(hidden.data_ptr(), output.data_ptr(), rows, width // 2, torch.get_num_threads())
    return output


def geglu_backward(gradient: Tensor, hidden: Tensor) -> Tensor:
    """[..., D] to [..., 2 * D]."""
    found, width = torch.empty_like(hidden), hidden.shape[-1]
    addresses = gradient.data_ptr(), hidden.data_ptr(), found.data_ptr()
    library().geglu_backward(*addresses, hidden.numel() // width, width // 2, torch.get_num_threads())
    return found


def chances_(scores: Tensor, level: Tensor, scale: float) -> Tensor:
    """In place, [N, S]: exp(scale * score - level). Args: level: [N], float32."""
    library().chances(scores.data_ptr(), level.data_ptr(), *scores.shape, scale, torch.get_num_threads())
    return scores


def chances_backward_(gradient: Tensor, chances: Tensor, drift: Tensor, scale: float) -> Tensor:
    """In place, [N, S]: chance * (gradient - drift) * scale. Args: drift: [N], float32."""
    addresses = chances.data_ptr(), gradient.data_ptr(), drift.data_ptr()
    library().chances_backward(*addresses, *gradient.shape, scale, torch.get_num_threads())
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
    library().group_norm(*addresses, *sizes, norm.eps, torch.get_num_threads())
    return output, mean, inverse


def group_norm_backward(
    gradient: Tensor, hidden: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns: the gradients of input, weight and bias."""
    batch, channels, height, width = hidden.shape
    found, (sums, along) = torch.empty_like(hidden), torch.empty(2, batch, channels)
    addresses = [part.data_ptr() for part in (gradient, hidden, weight, mean, inverse, found, sums, along)]
    sizes = batch, height * width, channels, mean.shape[1]
    library().group_norm_backward(*addresses, *sizes, torch.get_num_threads())
    return found, along.sum(0), sums.sum(0)


def gather(hidden: Tensor, kernel: int, stride: int, padding: int, size: tuple[int, int, int]) -> Tensor:
    """[B, C, H, W], channels last, to [B*H'*W', k*k*C]. Args: size: (B, H', W')."""
    batch, channels, height, width = hidden.shape
    output = hidden.new_empty(batch * size[1] * size[2], kernel * kernel * channels)
    numbers = batch, height, width, channels, kernel, stride, padding, size[1], size[2]
    library().gather(hidden.data_ptr(), output.data_ptr(), *numbers, torch.get_num_threads())
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
    library().scatter(said.data_ptr(), found.data_ptr(), *numbers, torch.get_num_threads())
    return found


def sum_rows(rows: Tensor) -> Tensor:
    """[N, C] to [C], float32."""
    sums = torch.empty(rows.shape[1])
    library().sum_rows(rows.data_ptr(), sums.data_ptr(), *rows.shape)
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
