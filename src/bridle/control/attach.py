"""Steer a stock diffusers pipeline: one reversible hook on its denoiser that sums all controls.

    with attach(pipeline, edge=control) as rig:
        rig["edge"].set(hint=edges, scale=0.8)
        pipeline("a red apple")

A hook of its own per control would not do: of two hooks that set the residuals, the second silently wins. A control
that was trained with the base unlocked also brings what changed in the base, added on entry and taken off on exit.
"""

from contextlib import ExitStack
from functools import reduce
from operator import add
from types import TracebackType
from typing import Any, Self

import torch

from bridle.control.control import Call, Control, denoiser_of
from bridle.control.delta import apply_delta
from bridle.control.progress import Progress
from bridle.control.pulls import compute
from bridle.control.rein import Rein
from bridle.control.residuals import Residuals
from bridle.errors import ConfigError


class Rig:
    """All controls on one pipeline. `rig["name"]` is one of them; `detach` restores the pipeline exactly."""

    def __init__(self, pipeline: Any, controls: dict[str, Control]) -> None:
        if not controls:
            raise ConfigError("attach was given no control; name at least one: attach(pipeline, edge=control)")
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        for name, control in controls.items():
            if not isinstance(control, Control):
                remedy = f"attach(pipeline, {name}=load_control(...))"
                raise ConfigError(f'control "{name}" is a {type(control).__name__}; expected a control: {remedy}')
            control.check_fit(self.denoiser, f'control "{name}"', device_of(pipeline, self.denoiser))
        if len({control.joints for control in controls.values()}) > 1:
            remedy = "attach them one after the other: with attach(model, a=a), attach(model, b=b)"
            raise ConfigError(f"controls {', '.join(controls)} join the model at different blocks; {remedy}")
        self.reins = {name: Rein(name, control) for name, control in controls.items()}
        self.first = next(iter(controls.values()))  # any of them: all are of one family
        self.progress = Progress(pipeline)
        with ExitStack() as undo:  # should one fail, what came before it is undone
            for control in controls.values():
                undo.callback(apply_delta(self.denoiser, control.base_delta))
            undo.callback(self.first.steer(self.denoiser, self._pull_all))
            self._undo = undo.pop_all()

    def __getitem__(self, name: str) -> Rein:
        if name not in self.reins:
            raise ConfigError(f"no control is attached as {name!r}; attached: {', '.join(self.reins)}")
        return self.reins[name]

    def detach(self) -> None:
        """Remove the hook and what the controls changed in the base. A second call does no harm."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _pull_all(self, call: Call) -> Residuals | None:
        """What all controls that act in this call add, on top of what it brings along."""
        place = self.progress.locate(self.first.timestep(call))
        asked = [pull for rein in self.reins.values() if (pull := rein.ask(call, self.pipeline, place)) is not None]
        if not asked:
            return None
        computed = zip(asked, compute(asked, call, self.pipeline), strict=True)
        pulled = [pull.rein.answer(pull, residuals, call, self.pipeline) for pull, residuals in computed]
        given = self.first.given(call)
        if given is not None:
            pulled = [self.first.place(given, self.denoiser), *pulled]
        return reduce(add, pulled).to(call[self.first.INPUT].dtype)


def device_of(pipeline: Any, denoiser: Any) -> torch.device | None:
    """Where an offloaded denoiser computes, which rests elsewhere; None where it is not offloaded."""
    offloaded = hasattr(denoiser, "_hf_hook") or hasattr(denoiser, "_diffusers_hook")
    device = getattr(pipeline, "_execution_device", None) if offloaded else None
    return None if device is None else torch.empty(0, device=device).device  # which GPU, where it says "cuda" alone


def attach(pipeline: Any, **controls: Control) -> Rig:
    """Attach named controls to a pipeline; leave the `with` block, or call `detach`, to restore it exactly.

    Args:
        pipeline: any diffusers pipeline whose U-Net or transformer is of the family the controls were made for; for
            those by `Control.for_module`, their model itself, or a pipeline that has it as U-Net or transformer. The
            one that is called: the guidance is read from it, and another one of the same parts may have another.
        controls: name=control; their residuals are summed. So are their base deltas, one of each, which are in force at
            once and until the end, whatever scale, start and end say.

    Raises: BaseError: the base is not supported. ConfigError: a control, or its base delta, does not fit it.
    """
    return Rig(pipeline, controls)
