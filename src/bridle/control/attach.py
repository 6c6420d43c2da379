"""Steer a stock diffusers pipeline: one reversible hook on its U-Net that sums all controls.

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

from bridle.control.delta import apply_delta, check_delta
from bridle.control.hint import check_hint, to_hint
from bridle.control.residuals import Residuals
from bridle.control.unet import Control, check_base
from bridle.errors import ConfigError, HintError


class Rein:
    """One attached control and how strongly it pulls. Change it at any time between two calls of the pipeline."""

    def __init__(self, name: str, control: Control) -> None:
        self.name, self.control = name, control
        self.scale: float | tuple[float, ...] = 1.0
        self.start, self.end = 0.0, 1.0
        self.mask: Tensor | None = None
        self._hint: Tensor | None = None
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
            self._hint, self._features = to_hint(hint, self.control.hint_channels), None
        if mask is not None:
            self.mask = to_hint(mask, 1)
        if scale is not None:
            self.scale = scale
        start, end = self.start if start is None else start, self.end if end is None else end
        if not 0 <= start <= end <= 1:
            raise ConfigError(f"control acts from {start} to {end}; expected 0 <= start <= end <= 1")
        self.start, self.end = start, end
        return self

    def features(self, latents: Tensor) -> Tensor:
        """The encoded hint, computed once for all steps. Raises: HintError: no hint was set, or its size is wrong."""
        if self._hint is None:
            raise HintError(
                f'control "{self.name}" has no hint; call rig["{self.name}"].set(hint=...) before the pipeline'
            )
        factor = self.control.size_factor
        size_px = (latents.shape[-2] * factor, latents.shape[-1] * factor)
        check_hint(self._hint, self.control.hint_channels, size_px)
        if self._features is None or torch.is_grad_enabled():
            hint = self._hint.to(latents.device)
            if torch.is_grad_enabled():
                return self.control.encode(hint)
            self._features = self.control.encode(hint)
        return self._features


class Rig:
    """All controls on one pipeline. `rig["name"]` is one of them; `detach` restores the pipeline exactly."""

    def __init__(self, pipeline: Any, controls: dict[str, Control]) -> None:
        check_base(pipeline.unet)
        if not controls:
            raise ConfigError("attach was given no control; name at least one: attach(pipeline, edge=control)")
        for name, control in controls.items():
            check_fit(name, control, pipeline.unet)
        self.pipeline = pipeline
        self.reins = {name: Rein(name, control) for name, control in controls.items()}
        with ExitStack() as undo:  # should one fail, what came before it is undone
            for control in controls.values():
                undo.callback(apply_delta(pipeline.unet, control.base_delta))
            undo.callback(pipeline.unet.register_forward_pre_hook(self._steer, with_kwargs=True).remove)
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

    def _steer(
        self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the U-Net runs: put the summed residuals among its arguments, on top of any that are there."""
        values = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        latents, timestep, text = values["sample"], values["timestep"], values["encoder_hidden_states"]
        timesteps = torch.as_tensor(timestep, device=latents.device)
        share = self._share(timesteps)
        pulled = [self._pull(rein, latents, timesteps, text) for rein in self.reins.values() if acts(rein, *share)]
        if kwargs.get("mid_block_additional_residual") is not None:
            before = kwargs["down_block_additional_residuals"], kwargs["mid_block_additional_residual"]
            pulled.insert(0, Residuals(tuple(before[0]), before[1]))
        if not pulled:
            return args, kwargs
        total = reduce(add, pulled).to(latents.dtype)
        given = {"down_block_additional_residuals": total.down, "mid_block_additional_residual": total.mid}
        return args, kwargs | given

    def _pull(self, rein: Rein, latents: Tensor, timesteps: Tensor, text: Tensor) -> Residuals:
        features = self._spread(rein.features(latents), len(latents))
        residuals = rein.control.residuals(latents, timesteps, text, features)
        if rein.scale != 1.0:
            residuals = residuals.scaled(rein.scale)
        if rein.mask is not None:
            residuals = residuals.masked(self._spread(rein.mask.to(latents.device), len(latents)))
        return residuals

    def _spread(self, per_prompt: Tensor, batch: int) -> Tensor:
        """One row per hint to one row per latent: pipelines order a batch as guidance half, prompt, picture."""
        if len(per_prompt) == 1:
            return per_prompt.expand(batch, -1, -1, -1)
        halves = 2 if getattr(self.pipeline, "do_classifier_free_guidance", False) else 1
        if batch % (halves * len(per_prompt)):
            raise HintError(f"{len(per_prompt)} hints for {batch // halves} pictures; give one hint, or one per prompt")
        pictures = batch // (halves * len(per_prompt))
        return per_prompt.repeat_interleave(pictures, 0).repeat(halves, 1, 1, 1)

    def _share(self, timesteps: Tensor) -> tuple[float, float]:
        """Where in the sampling this step lies: from and to, as shares of all steps; all of it where unknown."""
        steps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if not isinstance(steps, Tensor) or timesteps.ndim:
            return 0.0, 1.0
        found = (steps.to(timesteps) == timesteps).nonzero().flatten().tolist()
        return (found[0] / len(steps), (found[0] + 1) / len(steps)) if found else (0.0, 1.0)


def attach(pipeline: Any, **controls: Control) -> Rig:
    """Attach named controls to a pipeline; leave the `with` block, or call `detach`, to restore it exactly.

    Args:
        pipeline: any diffusers pipeline whose `unet` is of the family that the controls were made for.
        controls: name=control; their residuals are summed. So are their base deltas, which are in force at once and
            until the end, whatever scale, start and end say.

    Raises: BaseError: the U-Net is not supported. ConfigError: a control, or its base delta, does not fit it.
    """
    return Rig(pipeline, controls)


def acts(rein: Rein, begin: float, finish: float) -> bool:
    """Whether a control acts in a step that covers [begin, finish] of the sampling; bounds as diffusers counts them."""
    return rein.scale != 0 and begin >= rein.start and finish <= rein.end


def check_fit(name: str, control: Control, unet: Any) -> None:
    """Raises: ConfigError: widths, text width, device or type differ from the base's, or the delta does not fit."""
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        ours, theirs = control.config[key], unet.config[key]
        if tuple_of(ours) != tuple_of(theirs):
            remedy = "attach it to the base it was trained on, or to one of the same family"
            raise ConfigError(f'control "{name}" has {key} {ours}, the pipeline {theirs}: {remedy}')
    if (control.device, control.dtype) != (unet.device, unet.dtype):
        ours, theirs = f"{control.device} {control.dtype}", f"{unet.device} {unet.dtype}"
        remedy = "move it with control.to(pipeline.device, pipeline.dtype)"
        raise ConfigError(f'control "{name}" is on {ours}, the pipeline on {theirs}: {remedy}')
    check_delta(dict(unet.named_parameters()), control.base_delta, f'control "{name}"')


def tuple_of(value: Any) -> Any:
    """JSON turns tuples into lists; compare them as one."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
