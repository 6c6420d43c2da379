"""Which rows of a denoiser's call are whose: pipelines order them as guidance half, prompt, picture of that prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bridle.control.half import Half
from bridle.control.residuals import Residuals
from bridle.errors import HintError


@dataclass(frozen=True)
class Rows:
    """Of one call.

    Attributes:
        batch: the rows in all.
        halves: of classifier-free guidance that these rows are, in their order; equally many rows each.
    """

    batch: int
    halves: tuple[Half, ...]

    @classmethod
    def of(cls, pipeline: Any, batch: int, again: int) -> "Rows":
        """Args: again: how many calls this step has had before; Flux guides by a second call, not by a second half."""
        if getattr(pipeline, "do_classifier_free_guidance", False):
            return cls(batch, ("unconditional", "conditional"))
        return cls(batch, ("unconditional",) if again else ("conditional",))

    def acting(self, half: Half, pictures: Sequence[int] | None = None) -> "Some":
        """The rows of that half, or of both, in those pictures, or in all. Raises: HintError: there is no such one."""
        if half == "both" and pictures is None:
            return Some(tuple(range(self.batch)), len(self.halves))
        count = self.batch // len(self.halves)
        chosen = range(count) if pictures is None else pictures
        if outside := [picture for picture in chosen if not 0 <= picture < count]:
            raise HintError(f"control is to act in pictures {outside}; expected numbers from 0 to {count - 1}")
        places = [place for place, name in enumerate(self.halves) if half in ("both", name)]
        return Some(tuple(place * count + picture for place in places for picture in chosen), len(places))

    def spread(self, per_prompt: Tensor, some: "Some") -> Tensor:
        """One row per prompt, or a single one, to one per row that acts. Raises: HintError: their number is wrong."""
        if len(per_prompt) == 1:
            return per_prompt.expand(len(some.rows), *per_prompt.shape[1:])
        count = len(some.rows) // some.halves
        pictures, left = divmod(count, len(per_prompt))
        if left or not pictures:
            raise HintError(f"{len(per_prompt)} hints for {count} pictures; give one hint, or one per prompt")
        return torch.cat([per_prompt.repeat_interleave(pictures, 0)] * some.halves)

    def take(self, value: Any, some: "Some") -> Any:
        """A call, or any value in it, cut to some of its rows."""
        if some.rows == tuple(range(self.batch)):
            return value
        if isinstance(value, Tensor):
            return value[some.index] if value.ndim and len(value) == self.batch else value
        if isinstance(value, Mapping):
            return {name: self.take(part, some) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.take(part, some) for part in value)
        return value

    def fill(self, residuals: Residuals, some: "Some") -> Residuals:
        """Residuals of some rows to those of all: zero elsewhere."""
        if len(some.rows) == self.batch:
            return residuals

        def spread(link: Tensor) -> Tensor:
            if len(link) != len(some.rows):
                return link  # the zero of a link that is not connected
            filled = link.new_zeros(self.batch, *link.shape[1:])
            filled[some.index] = link
            return filled

        return replace(residuals, links=tuple(map(spread, residuals.links)))


@dataclass(frozen=True)
class Some:
    """Some of a call's rows.

    Attributes:
        rows: their numbers, rising; one may come several times.
        halves: of guidance that they belong to; equally many rows each.
    """

    rows: tuple[int, ...]
    halves: int

    @property
    def index(self) -> Any:
        """What picks them: a slice where they are evenly spaced, so that every step sees the same memory again."""
        apart = {after - before for before, after in pairwise(self.rows)} or {1}
        if len(apart) > 1 or 0 in apart:
            return list(self.rows)
        return slice(self.rows[0], self.rows[-1] + 1, apart.pop())
