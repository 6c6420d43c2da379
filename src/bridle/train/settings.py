"""How a control is trained."""

from dataclasses import dataclass
from typing import Literal

from bridle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every field can be set in the run's TOML under [train], or with `--set train.lr=1e-5`.

    Args:
        steps: optimiser steps in all.
        batch: pairs per forward pass.
        accumulate: forward passes per optimiser step; the effective batch is their product.
        lr: peak learning rate of AdamW. The paper's is 1e-5; a small base takes far more.
        warmup: steps over which the learning rate rises from zero.
        decay: share of the steps, at the end, over which it falls to zero again; 0, as in the paper, keeps it.
        weight_decay: of AdamW.
        clip_norm: gradients are scaled down to this L2 norm.
        prompt_dropout: share of captions replaced by the empty one, drawn afresh each time (the paper: 0.5).
        weighting: of the loss over noise levels: "uniform" as in the paper, or "balanced", which learns shapes sooner.
        ema_decay: of the averaged weights, which are what is saved; 0 turns averaging off.
        precision: "bf16" computes in bfloat16 and keeps float32 weights; "fp32" is for comparing.
        seed: of every draw.
        checkpoint_every, preview_every, log_every: in steps.
        keep: how many checkpoints stay.
        tensorboard: also write TensorBoard events; needs the extra of that name.

    Raises: ConfigError: a value is out of range.
    """

    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    lr: float = 1e-5
    warmup: int = 50
    decay: float = 0.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    prompt_dropout: float = 0.5
    weighting: Literal["uniform", "balanced"] = "uniform"
    ema_decay: float = 0.99
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    checkpoint_every: int = 200
    preview_every: int = 200
    log_every: int = 10
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "preview_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting train.{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"setting train.{name} is {getattr(self, name)}; expected more than 0")
        for name in ("warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"setting train.{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.prompt_dropout <= 1:
            raise ConfigError(f"setting train.prompt_dropout is {self.prompt_dropout}; expected a share from 0 to 1")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"setting train.decay is {self.decay}; expected a share from 0 to 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"setting train.ema_decay is {self.ema_decay}; expected from 0 to below 1")
        if self.weighting not in ("uniform", "balanced"):
            raise ConfigError(f"setting train.weighting is {self.weighting!r}; expected 'uniform' or 'balanced'")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"setting train.precision is {self.precision!r}; expected 'bf16' or 'fp32'")

    @property
    def effective_batch(self) -> int:
        """Pairs per optimiser step."""
        return self.batch * self.accumulate
