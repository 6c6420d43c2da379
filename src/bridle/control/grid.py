"""Hints on grids of one, two or three axes (sound, pictures, volumes), encoded to features on a coarser grid.

The layers are those of the official encoder for pictures; each axis shrinks by a factor of its own, which need be no
power of two.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from bridle.control.block import CONVOLUTIONS, zero_conv
from bridle.control.hint import OFFICIAL_CHANNELS
from bridle.errors import HintError


def grid_encoder(hint_channels: int, width: int, factors: Sequence[int]) -> nn.Sequential:
    """Hints [B, hint_channels, *grid] to features [B, width, *coarse], grid = factor * coarse along each axis.

    Until the first optimiser step the features are zero.
    """
    axes, channels = len(factors), OFFICIAL_CHANNELS[0]
    layers: list[nn.Module] = [conv(hint_channels, channels, [1] * axes), nn.SiLU()]
    for stage, stride in enumerate(strides(factors), start=1):
        wider = OFFICIAL_CHANNELS[min(stage, len(OFFICIAL_CHANNELS) - 1)]
        layers += [conv(channels, channels, [1] * axes), nn.SiLU(), conv(channels, wider, stride), nn.SiLU()]
        channels = wider
    return nn.Sequential(*layers, zero_conv(channels, width, axes))


def conv(channels_in: int, channels_out: int, stride: Sequence[int]) -> nn.Module:
    """Divides each axis by its stride, if that is a divisor, and looks at every position."""
    kernel = [max(3, step) for step in stride]
    padding = [1 if step < 3 else 0 for step in stride]  # centred on every third, the last of all would go unseen
    layer: nn.Module = CONVOLUTIONS[len(stride)](channels_in, channels_out, kernel, tuple(stride), padding)
    return layer


def strides(factors: Sequence[int]) -> Iterator[list[int]]:
    """One per stage, of the smallest prime factors that are left: (4, 6) is (2, 2), then (2, 3)."""
    left = list(factors)
    while max(left) > 1:
        stride = [next(step for step in (*range(2, rest + 1), 1) if rest % step == 0) for rest in left]
        left = [rest // step for rest, step in zip(left, stride, strict=True)]
        yield stride


def factors_between(hint: Sequence[int], features: Sequence[int]) -> tuple[int, ...]:
    """Hint positions per feature, along each axis.

    Args:
        hint: the sizes of its axes.
        features: the same, or one number of tokens, which then are row by row a grid with one factor for all axes.

    Raises: HintError: there are none.
    """
    if len(hint) == len(features) and all(a >= b and a % b == 0 for a, b in zip(hint, features, strict=True)):
        return tuple(a // b for a, b in zip(hint, features, strict=True))
    if len(features) == 1:
        for factor in range(1, min(hint) + 1):
            if not any(size % factor for size in hint) and math.prod(size // factor for size in hint) == features[0]:
                return (factor,) * len(hint)
    raise HintError(
        f"hint has positions {show(hint)}, the features where it enters {show(features)}; expected a whole multiple"
        " along each axis: resize the hint, or name another block as hint_at"
    )


def lay_out(features: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """Features [B, C, *grid] in the form of the tensor that they are added to. Raises: HintError: they do not fit."""
    if channels_last:
        features = features.flatten(2).transpose(1, 2) if like.ndim == 3 else features.movedim(1, -1)
    if features.shape != like.shape:
        ours, theirs = show(features.shape), show(like.shape)
        raise HintError(f"hint's features are {ours}, what they are added to is {theirs}; give a hint of that size")
    return features.to(like.dtype)


def show(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
