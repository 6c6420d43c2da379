"""What the compiled loops gain: each beside PyTorch's own way to compute the same, on one thread.

In: nothing; a C compiler. Out: a table. Kinds take turns; a time is the median of some rounds, a gain the median of the
rounds' ratios. Shapes are Stable Diffusion 1.5's, one pair, and the embedded base's, 24 pairs. In bfloat16, and
convolutions by Winograd's way in float32 as well.

    python benchmarks/loops.py --rounds 31
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridle.errors import ConfigError
from bridle.kernels import attention, fused, native, outer, patches, winograd
from bridle.train.memory import keep_freed_memory
from bridle.train.optim import make_optimizer

BF16, LAST = torch.bfloat16, torch.channels_last
Pair = tuple[str, Callable[[], object], Callable[[], object]]  # what, by PyTorch, by ours


def image(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16).contiguous(memory_format=LAST)


def pairs() -> list[Pair]:
    found: list[Pair] = []
    for shape in ((1, 640, 16, 16), (24, 64, 16, 16)):
        found += [*(normalisation(order, *shape) for order in ("first", "last")), neighbourhoods(*shape)]
    for rows, width in ((1024, 2560), (1536, 768)):
        found.append(gate(rows, width))
    for rows, wide, width in ((16, 1280, 11520), (64, 1280, 11520), (6144, 64, 576)):
        left, right = torch.randn(rows, wide).to(BF16), torch.randn(rows, width).to(BF16)
        what = f"product over {rows} rows, {wide} by {width}"
        found.append((what, lambda a=left, b=right: outer.plain(a, b), lambda a=left, b=right: outer.turned(a, b)))
    found += optimisers(10_000_000)
    found.append(attending(attention.again, 8, 4096, 4096, 40))
    if fused.library() is not None:
        sizes = ((8, 4096, 4096, 40), (8, 4096, 77, 40), (8, 1024, 1024, 40), (8, 256, 256, 80), (2, 256, 256, 32, 24))
        found += [attending(attention.fuse, *size) for size in sizes]
    for shape in ((24, 64, 16), (24, 128, 8), (1, 320, 64), (1, 640, 32), (1, 1280, 16)):
        found += convolutions(torch.float32, *shape) + convolutions(BF16, *shape)
    return found


def optimisers(count: int) -> list[Pair]:
    """AdamW of so many weights, with moments in float32 beside PyTorch's fused one, in 8 bits beside bitsandbytes'."""
    found: list[Pair] = []
    for kind, what in (("adamw", "AdamW"), ("adamw8bit", "AdamW with moments in 8 bits, by bitsandbytes")):
        sides = []
        for loops in (False, True):
            weight = nn.Parameter(torch.randn(count) * 0.02)
            weight.grad = torch.randn(count) * 1e-4
            with mock.patch("bridle.train.optim.compiles", return_value=loops):
                try:
                    optimiser = make_optimizer(kind, [{"params": [weight], "lr": 1e-5}], weight_decay=0.01)
                except ConfigError:  # no bitsandbytes
                    return found
            sides.append(partial(step, optimiser, loops))
        found.append((f"{what}, {count:,} weights", *sides))
    return found


def step(optimiser: Any, loops: bool) -> None:
    with mock.patch("bridle.train.adamw.compiles", return_value=loops):
        optimiser.step()


def convolutions(kind: torch.dtype, batch: int, channels: int, side: int) -> list[Pair]:
    """By Winograd's way, the form of the weight made every time, as for one that is trained."""
    shape = batch, channels, side, side
    hidden, gradient = (torch.randn(shape).to(kind).contiguous(memory_format=LAST) for _ in range(2))
    weight = torch.randn(channels, channels, 3, 3).to(kind).contiguous(memory_format=LAST)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    return [
        (
            f"convolution {shape}, {kind}",
            lambda: F.conv2d(hidden, weight, None, 1, 1),
            lambda: winograd.forward(hidden, winograd.form(weight), None),
        ),
        (
            "its weight's gradient",
            lambda: torch.ops.aten.convolution_backward(gradient, hidden, weight, None, *how),
            lambda: winograd.weight_gradient(gradient, hidden),
        ),
    ]


def normalisation(order: str, *shape: int) -> Pair:
    """Ours has channels last. Args: order: of the channels on PyTorch's side, which is faster with them first."""
    norm, hidden = nn.GroupNorm(32, shape[1]).requires_grad_(False), image(*shape)
    theirs, half = hidden.contiguous() if order == "first" else hidden, norm.weight.to(BF16)
    sizes = shape[0], shape[1], shape[2] * shape[3], 32, 1e-5
    return (
        f"group normalisation {shape}, PyTorch with channels {order}",
        lambda: torch.ops.aten.native_group_norm(theirs, half, half, *sizes),
        lambda: native.group_norm(hidden, norm, norm.weight, norm.bias),
    )


def neighbourhoods(*shape: int) -> Pair:
    hidden, size = image(*shape), (shape[0], *shape[2:])
    return (
        f"neighbourhoods {shape}",
        lambda: patches.gather_plain(hidden, 3, 1, 1, size),
        lambda: native.gather(hidden, 3, 1, 1, size),
    )


def gate(rows: int, width: int) -> Pair:
    hidden = torch.randn(rows, width).to(BF16)

    def by_pytorch() -> None:
        value, opened = hidden.chunk(2, -1)
        value * F.gelu(opened)

    return f"gated activation ({rows}, {width})", by_pytorch, lambda: native.geglu(hidden)


def attending(way: Callable[..., Tensor], heads: int, queries: int, keys: int, depth: int, batch: int = 1) -> Pair:
    """There and back, beside PyTorch's flash attention."""
    given = [torch.randn(batch, heads, rows, depth).to(BF16).requires_grad_() for rows in (queries, keys, keys)]
    pull = torch.randn(batch, heads, queries, depth).to(BF16)

    def by(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*given), given, pull)

    what = f"attention, {batch} x {heads} heads, {queries} to {keys} tokens, depth {depth}, {way.__name__}"
    return what, by(attention.flash), by(way)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    if native.library() is None:
        raise SystemExit("no C compiler (cc, gcc or clang) made the loops that this is to measure: install one")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    print("| what | PyTorch, ms | ours, ms | gain |\n|---|---|---|---|")
    for what, theirs, ours in pairs():
        taken = [(seconds(theirs), seconds(ours)) for _ in range(rounds + 1)][1:]
        medians = [1000 * statistics.median(side) for side in zip(*taken, strict=True)]
        gain = statistics.median(a / b for a, b in taken)
        print(f"| {what} | {medians[0]:.2f} | {medians[1]:.2f} | {gain:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
