"""Which rows of a denoiser's call are whose: pipelines order them as guidance half, prompt, picture of that prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridle.control.residuals import Residuals
from bridle.control.strength import Half
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

    def of_half(self, half: Half) -> slice:
        """The rows of that half, or of both; none where this call has none of it."""
        if half == "both":
            return slice(0, self.batch)
        if half not in self.halves:
            return slice(0, 0)
        size, place = self.batch // len(self.halves), self.halves.index(half)
        return slice(place * size, (place + 1) * size)

    def spread(self, per_prompt: Tensor) -> Tensor:
        """One row per prompt, or a single one, to one per row of the call. Raises: HintError: their number is wrong."""
        if len(per_prompt) == 1:
            return per_prompt.expand(self.batch, *per_prompt.shape[1:])
        pictures, left = divmod(self.batch, len(self.halves) * len(per_prompt))
        if left:
            asked = f"{len(per_prompt)} hints for {self.batch // len(self.halves)} pictures"
            raise HintError(f"{asked}; give one hint, or one per prompt")
        return torch.cat([per_prompt.repeat_interleave(pictures, 0)] * len(self.halves))

    def take(self, value: Any, rows: slice) -> Any:
        """A call, or any value in it, cut to some of its rows."""
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == self.batch else value
        if isinstance(value, Mapping):
            return {name: self.take(part, rows) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.take(part, rows) for part in value)
        return value

    def fill(self, residuals: Residuals, rows: slice) -> Residuals:
        """Residuals of some rows to those of all: zero elsewhere."""
        before, filled, after = rows.start, rows.stop - rows.start, self.batch - rows.stop

        def spread(link: Tensor) -> Tensor:
            if len(link) != filled:
                return link  # the zero of a link that is not connected
            shape = link.shape[1:]
            return torch.cat([link.new_zeros(before, *shape), link, link.new_zeros(after, *shape)])

        return residuals if filled == self.batch else replace(residuals, links=tuple(map(spread, residuals.links)))
