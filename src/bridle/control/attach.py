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
from torch import Tensor

from bridle.control.control import Call, Control, control_class, denoiser_of
from bridle.control.delta import apply_delta
from bridle.control.hint import to_hint
from bridle.control.residuals import Residuals
from bridle.errors import ConfigError, HintError


class Rein:
    """One attached control and how strongly it pulls. Change it at any time between two calls of the pipeline."""

    def __init__(self, name: str, control: Control) -> None:
        self.name, self.control = name, control
        self.scale: float | tuple[float, ...] = 1.0
        self.start, self.end = 0.0, 1.0
        self.mask: Tensor | None = None
        self._hint: Tensor | None = None
        self._prepared: Tensor | None = None  # the hint as the control's encoder takes it
        self._features: Tensor | None = None

    def set(
        self,
        *,
        hint: Any = None,
        scale: float | tuple[float, ...] | None = None,
        start: float | None = None,
        end: float | None = None,
        mask: Any = None,
    ) -> Self:
        """Change what is given, keep the rest.

        Args:
            hint: a PIL image, a uint8 array [H, W, K], or a tensor [B, K, H, W] in [0, 1].
            scale: one factor, or one per link (13, the middle last). 0 turns the control off.
            start, end: the share of the sampling steps during which it acts, in [0, 1].
            mask: where it acts: a hint of one channel, 1 inside.

        Raises: HintError, ConfigError.
        """
        if hint is not None:
            self._hint, self._prepared, self._features = to_hint(hint, self.control.hint_channels), None, None
        if mask is not None:
            self.mask = to_hint(mask, 1)
        if scale is not None:
            self.scale = scale
        start, end = self.start if start is None else start, self.end if end is None else end
        if not 0 <= start <= end <= 1:
            raise ConfigError(f"control acts from {start} to {end}; expected 0 <= start <= end <= 1")
        self.start, self.end = start, end
        return self

    def features(self, call: Call, pipeline: Any) -> Tensor:
        """The encoded hint, computed once for all steps. Raises: HintError: no hint was set, or its size is wrong."""
        if self._hint is None:
            raise HintError(
                f'control "{self.name}" has no hint; call rig["{self.name}"].set(hint=...) before the pipeline'
            )
        if self._prepared is None:
            self._prepared = self.control.prepare(self._hint.to(self.control.device), pipeline)
        self.control.check_hint(self._prepared, call)
        if torch.is_grad_enabled():
            return self.control.encode(self._prepared)
        if self._features is None:
            self._features = self.control.encode(self._prepared)
        return self._features


class Rig:
    """All controls on one pipeline. `rig["name"]` is one of them; `detach` restores the pipeline exactly."""

    def __init__(self, pipeline: Any, controls: dict[str, Control]) -> None:
        if not controls:
            raise ConfigError("attach was given no control; name at least one: attach(pipeline, edge=control)")
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        control_class(type(self.denoiser).__name__).check_base(self.denoiser)
        for name, control in controls.items():
            control.check_fit(self.denoiser, f'control "{name}"')
        self.reins = {name: Rein(name, control) for name, control in controls.items()}
        self.first = next(iter(controls.values()))  # any of them: all are of one family
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
        latents = call[self.first.INPUT]
        begin, finish = self._share(call)
        pulled = [self._pull(rein, call, latents) for rein in self.reins.values() if acts(rein, begin, finish)]
        if not pulled:
            return None
        given = self.first.given(call)
        return reduce(add, pulled if given is None else [given, *pulled]).to(latents.dtype)

    def _pull(self, rein: Rein, call: Call, latents: Tensor) -> Residuals:
        features = self._spread(rein.features(call, self.pipeline), len(latents))
        residuals = rein.control.residuals(call, features)
        if rein.scale != 1.0:
            residuals = residuals.scaled(rein.scale)
        if rein.mask is not None:
            residuals = residuals.masked(self._spread(rein.mask.to(latents.device), len(latents)))
        return residuals

    def _spread(self, per_prompt: Tensor, batch: int) -> Tensor:
        """One row per hint to one row per latent: pipelines order a batch as guidance half, prompt, picture."""
        if len(per_prompt) == 1:
            return per_prompt.expand(batch, *per_prompt.shape[1:])
        halves = 2 if getattr(self.pipeline, "do_classifier_free_guidance", False) else 1
        if batch % (halves * len(per_prompt)):
            raise HintError(f"{len(per_prompt)} hints for {batch // halves} pictures; give one hint, or one per prompt")
        pictures = batch // (halves * len(per_prompt))
        return torch.cat([per_prompt.repeat_interleave(pictures, 0)] * halves)

    def _share(self, call: Call) -> tuple[float, float]:
        """Where in the sampling this call lies: from and to, as shares of all steps; all of it where unknown."""
        steps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        timestep = torch.as_tensor(self.first.timestep(call))
        if not isinstance(steps, Tensor) or timestep.ndim:
            return 0.0, 1.0
        found = (steps.to(timestep) == timestep).nonzero().flatten().tolist()
        return (found[0] / len(steps), (found[0] + 1) / len(steps)) if found else (0.0, 1.0)


def attach(pipeline: Any, **controls: Control) -> Rig:
    """Attach named controls to a pipeline; leave the `with` block, or call `detach`, to restore it exactly.

    Args:
        pipeline: any diffusers pipeline whose U-Net or transformer is of the family the controls were made for.
        controls: name=control; their residuals are summed. So are their base deltas, which are in force at once and
            until the end, whatever scale, start and end say.

    Raises: BaseError: the base is not supported. ConfigError: a control, or its base delta, does not fit it.
    """
    return Rig(pipeline, controls)


def acts(rein: Rein, begin: float, finish: float) -> bool:
    """Whether a control acts in a step that covers [begin, finish] of the sampling; bounds as diffusers counts them."""
    return rein.scale != 0 and begin >= rein.start and finish <= rein.end
