"""The training loop. In: a control, a locked U-Net, a cache. Out: a run folder with checkpoints and metrics.

Nothing here knows pictures: the caller hands in what draws previews and what saves the control.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from bridle.cache.store import Cache
from bridle.control.unet import Control
from bridle.errors import TrainError
from bridle.train.checkpoint import load_newest, save_checkpoint
from bridle.train.draws import Draws, draw, ids_of_step
from bridle.train.metrics import Metrics
from bridle.train.objective import add_noise, loss_per_sample, loss_weights, sample_posterior, target
from bridle.train.settings import TrainSettings
from bridle.train.signals import StopSignal

# Settings that may differ between a run and its continuation: they change how long and how often, not what.
FREE = {"steps", "checkpoint_every", "preview_every", "log_every", "keep", "tensorboard"}
SHORT_ATTENTION = 256  # tokens up to which plain products beat flash attention on CPU, whose backward is slow there

Save = Callable[[Control, int], None]


class Progress(Protocol):
    """What shows a run to the person in front of it."""

    def __call__(self, step: int, row: dict[str, float] | None) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """Where training ended: at which step, whether all steps were done, and the averaged control."""

    step: int
    finished: bool
    control: Control


def train(
    control: Control,
    unet: Any,
    schedule: Any,
    cache: Cache,
    settings: TrainSettings,
    folder: Path,
    *,
    save: Save,
    preview: Save | None = None,
    progress: Progress = lambda step, row: None,
) -> Outcome:
    """Train a control, or go on where the run in `folder` stopped.

    Args:
        control: trained in place, float32.
        unet: the base's; stays locked.
        schedule: the noise schedule the base was trained with (`alphas_cumprod`, `config.prediction_type`).
        save: called with the averaged control at every checkpoint.
        preview: called with the averaged control at every preview step.
        progress: called after every step; with a row of metrics at every logged one.

    Raises: TrainError: the run in `folder` was another one, its checkpoint is damaged, or the loss is not finite.
    """
    trainer = Trainer(control, unet, schedule, cache, settings)
    step = trainer.restore(load_newest(folder / "checkpoints"))
    metrics, started, first = Metrics(folder, step, settings.tensorboard), time.monotonic(), step
    progress(step, None)
    with StopSignal() as stop:
        last = step >= settings.steps
        while not last:  # not `stop` itself: what comes in during a preview waits for the next step's checkpoint
            loss, norm = trainer.step(step)
            step += 1
            row = None
            if step % settings.log_every == 0 or step == settings.steps:
                speed = (step - first) * settings.effective_batch / (time.monotonic() - started)
                row = {"step": step, "loss": loss, "grad_norm": norm, "lr": trainer.lr(step - 1)}
                row["samples_per_s"] = speed
                metrics.add(row)
            progress(step, row)
            last = step == settings.steps or bool(stop)
            if last or step % settings.checkpoint_every == 0:
                save(trainer.average, step)  # first: a run killed in between does these steps, and this, again
                save_checkpoint(folder / "checkpoints", step, trainer.state(step), settings.keep)
            if preview is not None and (step % settings.preview_every == 0 or step == settings.steps):
                preview(trainer.average, step)
    return Outcome(step, step >= settings.steps, trainer.average)


class Trainer:
    """One control in training: what a step does, and the state between two steps."""

    def __init__(self, control: Control, unet: Any, schedule: Any, cache: Cache, settings: TrainSettings) -> None:
        self.control, self.unet, self.cache, self.settings = control.train(), unet, cache, settings
        self.average = copy.deepcopy(control).requires_grad_(False).eval()
        self.prediction = schedule.config.prediction_type
        self.alphas_cumprod = schedule.alphas_cumprod.to(control.device)
        self.empty_text = cache.empty_text.to(control.device)
        self.ids = cache.train_ids
        self.shape = cache.batch(self.ids[:1]).mean.shape[1:]
        if settings.precision == "bf16" and control.device.type == "cpu":
            check_width(control, self.shape[-1])
        self.parameters = list(control.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        if control.device.type == "cpu" and self.shape[-1] * self.shape[-2] <= SHORT_ATTENTION:
            set_plain_attention(control, unet)

    def step(self, step: int) -> tuple[float, float]:
        """One optimiser step. Returns: loss and gradient norm. Raises: TrainError: the loss is not finite."""
        settings = self.settings
        ids = ids_of_step(self.ids, step, settings.effective_batch, settings.seed)
        draws = draw(
            ids,
            step,
            seed=settings.seed,
            shape=self.shape,
            timesteps=len(self.alphas_cumprod),
            prompt_dropout=settings.prompt_dropout,
        )
        total = 0.0
        for start in range(0, len(ids), settings.batch):
            rows = slice(start, start + settings.batch)
            loss = self.loss(ids[rows], draws[rows]) / settings.accumulate
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm).item()
        if not (torch.tensor([total, norm]).isfinite().all()):
            remedy = "the last checkpoint is intact: lower train.lr, or look at these pairs"
            raise TrainError(
                f"loss {total} and gradient norm {norm} at step {step + 1}, samples {ids[:4]}...; {remedy}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average(step)
        return total, norm

    def loss(self, ids: list[str], draws: Draws) -> Tensor:
        """Mean over a micro-batch of the denoising error, with the hint and half of the captions."""
        device = self.control.device
        batch = self.cache.batch(ids)
        latents = sample_posterior(batch.mean, batch.std, draws.posterior).to(device)
        noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
        text = torch.where(draws.drop_prompt.to(device)[:, None, None], self.empty_text, batch.text.to(device))
        noisy = add_noise(latents, noise, timesteps, self.alphas_cumprod)
        wanted = target(latents, noise, timesteps, self.alphas_cumprod, self.prediction)
        autocast = torch.autocast(device.type, torch.bfloat16) if self.settings.precision == "bf16" else nullcontext()
        with autocast:
            residuals = self.control(noisy, timesteps, text, batch.hint.to(device))
            output = self.unet(
                noisy,
                timesteps,
                text,
                down_block_additional_residuals=residuals.down,
                mid_block_additional_residual=residuals.mid,
            ).sample
        weights = loss_weights(timesteps, self.alphas_cumprod, self.prediction, self.settings.weighting)
        return (weights * loss_per_sample(output, wanted)).mean()

    def lr(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then constant, then a linear fall where one is asked for."""
        settings = self.settings
        rise = (step + 1) / max(1, settings.warmup)
        fall = (settings.steps - step) / (settings.decay * settings.steps) if settings.decay else 1.0
        return settings.lr * min(1.0, rise, fall)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the averaged weights; while training is young the average is short, or it would remember the start."""
        weight = 1 - min(self.settings.ema_decay, (step + 1) / (step + 10))
        for average, trained in zip(self.average.parameters(), self.parameters, strict=True):
            average.lerp_(trained, weight)

    def state(self, step: int) -> dict[str, Any]:
        """All that a continuation needs. Random numbers are keyed by the step, so there are none in it."""
        return {
            "step": step,
            "control": self.control.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": dataclasses.asdict(self.settings),
            "cache": self.cache.fingerprint,
        }

    def restore(self, state: dict[str, Any] | None) -> int:
        """Go on from a state; returns its step, 0 for none. Raises: TrainError: it belongs to another run."""
        if state is None:
            return 0
        now = dataclasses.asdict(self.settings)
        changed = [
            f"train.{k} was {v}, is {now[k]}" for k, v in state["settings"].items() if k not in FREE and now[k] != v
        ]
        if shapes(state["control"]) != shapes(self.control.state_dict()):
            changed.append("the control was made otherwise: its base, hint encoder or hint channels changed")
        if state["cache"] != self.cache.fingerprint:
            changed.append("the data, its settings or the base changed")
        if changed:
            raise TrainError(
                f"this run cannot go on: {'; '.join(changed)}. Undo that, or start a run in another folder"
            )
        self.control.load_state_dict(state["control"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def check_width(control: Control, width: int) -> None:
    """Raises: TrainError: a strided convolution would see a width of 1.

    There PyTorch 2.13 on CPU leaves parts of the bfloat16 weight gradient as they were in memory: NaN, or worse, not.
    """
    least = 2 ** (len(control.config["block_out_channels"]) - 1)
    if width < least:
        size_px, least_px = width * control.size_factor, least * control.size_factor
        remedy = f'set size_px to {least_px} or more, or train.precision to "fp32"'
        raise TrainError(f"pictures are {size_px} px wide, too small for train.precision 'bf16' on a CPU: {remedy}")


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def set_plain_attention(control: Control, unet: Any) -> None:
    """Use plain products for attention in both; changes nothing but rounding."""
    unet.set_attn_processor(AttnProcessor())
    for module in control.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
