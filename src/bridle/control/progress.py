"""Where in the sampling a call of the denoiser lies, told by the pipeline's scheduler."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Transformers' pipelines round the timestep to the model's type: bfloat16 keeps eight bits.
ROUNDING = 2**-8


@dataclass(frozen=True)
class Place:
    """Of one call.

    Attributes:
        begin, finish: the share of the steps that the call's step covers.
        again: how many calls this step has had before, of a pipeline that guides by a second call.
        known: whether that could be told.
    """

    begin: float = 0.0
    finish: float = 1.0
    again: int = 0
    known: bool = True


class Progress:
    """Follows a pipeline from step to step.

    diffusers' own controls are told the place in the pipeline's list of timesteps. That list is gone when the denoiser
    is called; left are the scheduler's, of which image-to-image does not do the first ones, and the call's timestep,
    which some schedulers (Heun, PNDM) visit twice.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._steps: Tensor | None = None  # of the sampling that is followed; the next one brings a tensor of its own
        self._told = torch.empty(0)  # the same steps, where they can be looked at without waiting for a GPU
        self._first = self._index = self._again = 0

    def locate(self, timestep: Any) -> Place:
        """Args: timestep: a number or tensor; where it holds several that differ, it is no sampling's."""
        steps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        told = torch.as_tensor(timestep).detach().to("cpu", torch.float64).flatten()
        if not isinstance(steps, Tensor) or not len(steps) or not len(told) or bool((told != told[0]).any()):
            return Place(known=False)
        fresh = steps is not self._steps
        if fresh:
            self._told = steps.detach().to("cpu", torch.float64)
        index = self._find(told[0].item(), fresh)
        self._again = 0 if fresh or index != self._index else self._again + 1
        self._first = index if fresh else min(self._first, index)
        self._steps, self._index = steps, index
        done, count = index - self._first, len(steps) - self._first
        return Place(done / count, (done + 1) / count, self._again)

    def _find(self, timestep: float, fresh: bool) -> int:
        """The scheduler's step of this timestep; where several come into question, the one that was counted."""
        scheduler = self.pipeline.scheduler
        gaps = (self._told - timestep).abs()
        near = gaps <= max(gaps.min().item(), ROUNDING * abs(timestep))
        own = [getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None) if fresh else None]
        counted = [index for index in own if index is not None and index < len(gaps) and near[index]]
        return counted[0] if counted else self._count(gaps, fresh)

    def _count(self, gaps: Tensor, fresh: bool) -> int:
        """For a scheduler that does not count: the nearest step; of two (PNDM), that after the last call's."""
        nearest = (gaps == gaps.min()).nonzero().flatten().tolist()
        done = len(gaps) - (getattr(self.pipeline, "num_timesteps", None) or len(gaps))
        expected = done if fresh else self._index + 1
        return expected if expected in nearest else nearest[0]
