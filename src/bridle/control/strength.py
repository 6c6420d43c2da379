"""How strongly a control pulls: in which steps, at which links, in which half of the guidance. A value that is checked.

Steps are told by their share of the sampling, 0 where it begins and 1 where it ends, counted over the steps that are
done: where a picture is begun from another one, those that are left out do not count. So diffusers counts them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from bridle.control.half import Half
from bridle.control.residuals import Residuals
from bridle.errors import ConfigError

Guess = Literal["official", "diffusers", "paper"]


def even(links: Sequence[Tensor], side: int) -> list[float]:
    """All links alike."""
    return [1.0] * len(links)


def official(links: Sequence[Tensor], side: int) -> list[float]:
    """0.825^(N-1-i) for link i of N: what the released code does for guess mode, where N is 13."""
    return [0.825 ** (len(links) - 1 - index) for index in range(len(links))]


def diffusers(links: Sequence[Tensor], side: int) -> list[float]:
    """N numbers from 0.1 to 1, each the same factor above the one before: what diffusers does for guess mode."""
    return torch.logspace(-1, 0, len(links)).tolist()


def paper(links: Sequence[Tensor], side: int) -> list[float]:
    """64 / h for a link of h×h, which in the paper belongs to latents of 64×64: 1 at their size, 8 in the middle.

    Of latents of another size it is their side over the link's. Links that are tokens all have one size, and weight 1.

    Source: arXiv:2302.05543v3, section 3.4, classifier-free guidance resolution weighting.
    """
    return [side / link.shape[-1] if link.ndim > 3 else 1.0 for link in links]


# Weights by name; each but the first is guess mode's in one of its definitions.
PRESETS: dict[str, Callable[[Sequence[Tensor], int], list[float]]] = {
    "even": even,
    "official": official,
    "diffusers": diffusers,
    "paper": paper,
}


@dataclass(frozen=True, kw_only=True)
class Strength:
    """All numbers multiply.

    Args:
        scale: one factor for everything; 0 turns the control off.
        start, end: the share of the steps during which it acts; a step counts where all of it lies between them.
        weights: a name of `PRESETS`, or one factor per link, those of the skip connections first, the middle's last.
        keyframes: (share, factor) by rising share, of the step's beginning; between two the factor runs straight from
            one to the other, before the first and after the last it stays. Two at one share make it jump.
        half: of classifier-free guidance, in which it acts. None: the control's own, "both" or, where it pools (see
            `Control.pools`), "conditional". Without guidance there is the conditional half alone.

    Raises: ConfigError: a value is out of range.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    weights: str | tuple[float, ...] = "even"
    keyframes: tuple[tuple[float, float], ...] = ()
    half: Half | None = None

    def __post_init__(self) -> None:
        if not is_number(self.scale):
            raise ConfigError(f"scale is {self.scale!r}; expected one number: factors per link go to weights")
        if not 0 <= self.start <= self.end <= 1:
            raise ConfigError(f"control acts from {self.start} to {self.end}; expected 0 <= start <= end <= 1")
        if self.half is not None and self.half not in get_args(Half):
            raise ConfigError(f"half is {self.half!r}; expected one of {', '.join(get_args(Half))}")
        check_weights(self.weights)
        check_keyframes(self.keyframes)

    @property
    def changes(self) -> bool:
        """Whether it is not the same in all steps."""
        return self.start > 0 or self.end < 1 or bool(self.keyframes)

    def at(self, begin: float, finish: float) -> float:
        """The factor in a step that covers [begin, finish] of the sampling; 0 where the control does not act."""
        if begin < self.start or finish > self.end:
            return 0.0
        return self.scale * interpolate(self.keyframes, begin)

    def apply(self, residuals: Residuals, factor: float, side: int) -> Residuals:
        """Args: factor: from `at`. side: of the latents, in latents."""
        named = isinstance(self.weights, str)
        weights = PRESETS[self.weights](residuals.links, side) if named else self.weights
        if factor == 1 and all(weight == 1 for weight in weights):
            return residuals
        # In float32, like the tools whose definitions these are: their products are rounded there.
        return residuals.scaled((torch.tensor(weights, dtype=torch.float32) * factor).tolist())


def interpolate(keyframes: Sequence[tuple[float, float]], share: float) -> float:
    """The factor at a share of the steps; 1 without keyframes."""
    if not keyframes:
        return 1.0
    before = [keyframe for keyframe in keyframes if keyframe[0] <= share]
    after = [keyframe for keyframe in keyframes if keyframe[0] > share]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * (share - left) / (right - left)


def check_weights(weights: str | Sequence[float]) -> None:
    if isinstance(weights, str) and weights not in PRESETS:
        raise ConfigError(f"weights are {weights!r}; expected one of {', '.join(PRESETS)}, or one number per link")
    if not isinstance(weights, str) and not (weights and all(map(is_number, weights))):
        raise ConfigError(f"weights are {weights!r}; expected one number per link, or one of {', '.join(PRESETS)}")


def check_keyframes(keyframes: Sequence[tuple[float, float]]) -> None:
    shares = [share for share, _ in keyframes]
    inside = all(0 <= share <= 1 for share in shares) and all(is_number(factor) for _, factor in keyframes)
    if not inside or shares != sorted(shares):
        expected = "(share, factor) with shares from 0 to 1, in rising order"
        raise ConfigError(f"keyframes are {list(keyframes)}; expected {expected}")


def is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)  # NumPy's scalars as well
