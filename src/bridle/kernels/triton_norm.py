"""Group normalisation of features with channels last on a GPU.

PyTorch's own copies such features to channels first, and the convolution that follows copies them back: a sixth of a
step on an H100.

A program goes through some pixels of one group of one sample. What it sums up is put together by the kernel that needs
the sums over all pixels, so that two kernels do however large a picture is.

Legend: B batch, P pixels, C channels, G groups, D = C / G channels of a group, N programs of a group.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import language as tl

TILE = 4096  # numbers that a program has in its registers
TILES = 4  # that it goes through, one after the other

Normalised = tuple[Tensor, Tensor, Tensor]


@triton.jit
def place(groups, channels, depth, pixels, programs, WIDTH: tl.constexpr):
    """Of this program: its group, its number within that, where the group begins, and the group's channels."""
    group, number = tl.program_id(0) // programs, tl.program_id(0) % programs
    begin = (group // groups).to(tl.int64) * pixels * channels + (group % groups) * depth
    return group, number, begin, tl.arange(0, WIDTH)


@triton.jit
def tile_of(number, tile, tiles, begin, columns, channels, depth, pixels, ROWS: tl.constexpr):
    """Where the numbers of one tile lie, and which of them there are."""
    rows = (number * tiles + tile) * ROWS + tl.arange(0, ROWS)
    there = (rows < pixels)[:, None] & (columns < depth)[None, :]
    return begin + rows.to(tl.int64)[:, None] * channels + columns[None, :], there


@triton.jit(do_not_specialize=["pixels", "programs", "tiles"])
def add_up(
    hidden, sums, groups, channels, depth, pixels, programs, tiles, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """To [B * G * N, 2]: sum and sum of squares about the group's first number, so that little cancels."""
    _, number, begin, columns = place(groups, channels, depth, pixels, programs, WIDTH)
    about = tl.load(hidden + begin).to(tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tiles):
        at, there = tile_of(number, tile, tiles, begin, columns, channels, depth, pixels, ROWS)
        value = tl.where(there, tl.load(hidden + at, there, 0.0).to(tl.float32) - about, 0.0)
        total += value
        square += value * value
    tl.store(sums + 2 * tl.program_id(0), tl.sum(total))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(square))


@triton.jit(do_not_specialize=["pixels", "programs", "tiles"])
def normalise(
    hidden, sums, weight, bias, normal, mean, inverse, eps, groups, channels, depth, pixels, programs, tiles,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """To the normalised features, and mean and 1 / deviation of each group, [B * G]."""
    group, number, begin, columns = place(groups, channels, depth, pixels, programs, WIDTH)
    about = tl.load(hidden + begin).to(tl.float32)
    others = tl.arange(0, PROGRAMS)
    theirs = sums + 2 * (group * programs + others)
    count = (pixels * depth).to(tl.float32)
    shift = tl.sum(tl.load(theirs, others < programs, 0.0)) / count
    square = tl.sum(tl.load(theirs + 1, others < programs, 0.0)) / count
    middle = about + shift
    slope = 1 / tl.sqrt(tl.maximum(square - shift * shift, 0.0) + eps)
    tl.store(mean + group, middle, number == 0)
    tl.store(inverse + group, slope, number == 0)
    channel = (group % groups) * depth + columns
    scale = tl.load(weight + channel, columns < depth, 0.0).to(tl.float32) * slope
    level = tl.load(bias + channel, columns < depth, 0.0).to(tl.float32)
    for tile in range(tiles):
        at, there = tile_of(number, tile, tiles, begin, columns, channels, depth, pixels, ROWS)
        value = tl.load(hidden + at, there, 0.0).to(tl.float32)
        tl.store(normal + at, (value - middle) * scale[None, :] + level[None, :], there)


@triton.jit(do_not_specialize=["pixels", "programs", "tiles", "rows_of_sums"])
def add_up_back(
    gradient, hidden, mean, inverse, sums, rows_of_sums, groups, channels, depth, pixels, programs, tiles,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """To [2, B * N, C]: of each channel the sums of the gradient, and of it times the normalised features."""
    group, number, begin, columns = place(groups, channels, depth, pixels, programs, WIDTH)
    middle, slope = tl.load(mean + group), tl.load(inverse + group)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    along = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tiles):
        at, there = tile_of(number, tile, tiles, begin, columns, channels, depth, pixels, ROWS)
        pulled = tl.load(gradient + at, there, 0.0).to(tl.float32)
        total += pulled
        along += pulled * (tl.load(hidden + at, there, 0.0).to(tl.float32) - middle) * slope
    at = sums + ((group // groups) * programs + number) * channels + (group % groups) * depth + columns
    tl.store(at, tl.sum(total, 0), columns < depth)
    tl.store(at + rows_of_sums * channels, tl.sum(along, 0), columns < depth)


@triton.jit(do_not_specialize=["pixels", "programs", "tiles", "rows_of_sums"])
def pull_back(
    gradient, hidden, mean, inverse, sums, weight, pulled, rows_of_sums, groups, channels, depth, pixels, programs,
    tiles, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """To the input's gradient: of g = gradient * weight and normalised h, (g - mean(g) - h mean(g h)) / deviation."""
    group, number, begin, columns = place(groups, channels, depth, pixels, programs, WIDTH)
    middle, slope = tl.load(mean + group), tl.load(inverse + group)
    channel = (group % groups) * depth + columns
    scale = tl.load(weight + channel, columns < depth, 0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    along = tl.zeros((WIDTH,), tl.float32)
    for other in range(programs):
        at = sums + ((group // groups) * programs + other) * channels + channel
        total += tl.load(at, columns < depth, 0.0)
        along += tl.load(at + rows_of_sums * channels, columns < depth, 0.0)
    count = (pixels * depth).to(tl.float32)
    level, tilt = tl.sum(total * scale) / count, tl.sum(along * scale) / count
    for tile in range(tiles):
        at, there = tile_of(number, tile, tiles, begin, columns, channels, depth, pixels, ROWS)
        normal = (tl.load(hidden + at, there, 0.0).to(tl.float32) - middle) * slope
        wanted = tl.load(gradient + at, there, 0.0).to(tl.float32) * scale[None, :]
        tl.store(pulled + at, slope * (wanted - level - normal * tilt), there)


def forward(hidden: Tensor, norm: nn.GroupNorm) -> Normalised:
    """[B, C, H, W], channels last. Returns: the same normalised, and mean and 1 / deviation of each group, float32."""
    grid, sizes, tiles = shape_of(hidden, norm)
    sums = hidden.new_empty(grid, 2, dtype=torch.float32)
    mean, inverse = hidden.new_empty(2, len(hidden), norm.num_groups, dtype=torch.float32)
    normal = torch.empty_like(hidden)
    given = (norm.weight.detach(), norm.bias.detach(), normal, mean, inverse, norm.eps)
    programs = triton.next_power_of_2(sizes[-2])
    with on_device_of(hidden):
        add_up[(grid,)](hidden, sums, *sizes, **tiles)
        normalise[(grid,)](hidden, sums, *given, *sizes, **tiles, PROGRAMS=programs)
    return normal, mean, inverse


def backward(
    gradient: Tensor, hidden: Tensor, mean: Tensor, inverse: Tensor, norm: nn.GroupNorm, trained: bool
) -> Normalised:
    """Returns: the gradients of input, weight and bias; the latter two mean nothing unless they are trained."""
    grid, sizes, tiles = shape_of(hidden, norm)
    rows = grid // norm.num_groups
    sums = hidden.new_empty(2, rows, norm.num_channels, dtype=torch.float32)
    pulled = torch.empty_like(hidden)
    weight = norm.weight.detach()
    with on_device_of(hidden):
        add_up_back[(grid,)](gradient, hidden, mean, inverse, sums, rows, *sizes, **tiles)
        pull_back[(grid,)](gradient, hidden, mean, inverse, sums, weight, pulled, rows, *sizes, **tiles)
    total, along = sums.sum(1) if trained else sums[:, 0]
    return pulled, along, total


def on_device_of(hidden: Tensor) -> Any:
    """Triton starts kernels on the current device, wherever the features lie."""
    return torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext()


def shape_of(hidden: Tensor, norm: nn.GroupNorm) -> tuple[int, tuple[int, ...], dict[str, int]]:
    """How many programs there are, what all kernels are told of the sizes, and their tiles."""
    batch, channels, height, width = hidden.shape
    pixels, depth = height * width, channels // norm.num_groups
    across = triton.next_power_of_2(depth)
    rows = max(1, TILE // across)
    tiles = min(TILES, triton.cdiv(pixels, rows))
    programs = triton.cdiv(pixels, rows * tiles)
    sizes = (norm.num_groups, channels, depth, pixels, programs, tiles)
    return batch * norm.num_groups * programs, sizes, {"ROWS": rows, "WIDTH": across}
