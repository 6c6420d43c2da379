"""How a control is trained (`TrainSettings`), how it is watched (`ProbeSettings`), on what (`MachineSettings`)."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from bridle.errors import ConfigError

Regime = Literal["standard", "small", "large", "auto"]
Unlock = Literal["decoder", "all"]
PAPER_LR = 1e-5


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every field can be set in the run's TOML under [train], or with `--set train.lr=1e-5`.

    Args:
        steps: optimiser steps in all.
        batch: pairs per forward pass of one process.
        accumulate: `batch * accumulate` pairs make an optimiser step, whatever the number of processes.
        recipe: how a new control begins. "paper": as in the released code. "scaled": with a hint encoder whose random
            weights are scaled so that they let the hints through, see `bridle.train.hint_start`; learns far sooner.
        lr: peak learning rate of AdamW. "auto": what is known to be right for the run's base (`RunSettings`); the
            paper's 1e-5 where nobody says which that is.
        warmup: steps over which the learning rate rises from zero; again for what joins at a switch of the regime.
        decay: share of the steps, at the end, over which it falls to zero again; 0, as in the paper, keeps it.
        weight_decay: of AdamW.
        optimizer: "adamw", or "adamw8bit", whose state takes a quarter of the memory; needs bitsandbytes on a
            GPU, and where there is no C compiler.
        clip_norm: gradients are scaled down to this L2 norm.
        prompt_dropout: share of captions replaced by the empty one, drawn afresh each time (the paper: 0.5).
        weighting: of the loss over noise levels: "uniform" as in the paper, or "balanced", which learns shapes sooner.
        ema_decay: of the averaged weights, which are what is saved; 0 turns averaging off.
        precision: "bf16" and "fp16" compute in 16 bits and keep float32 weights, "fp32" computes in float32; "auto" is
            what is fastest here: a processor without instructions for bfloat16 is many times slower in it, and so are
            GPUs before NVIDIA's Ampere, which compute in float16. The loss is then scaled, see
            `bridle.train.loss_scale`.
        seed: of every draw.
        regime: the paper's three. "standard": all links, base locked. "small": the middle link alone, then all.
            "large": all links, then the base unlocked. "auto": small at first, each switch when the probe says so.
        reconnect: in "small": the step at which all links join, or "auto": when the probe says so.
        unlock: what of the base is trained in the end: "decoder", as the official code, or "all", as the paper says.
            None: "decoder" in "large", nothing in "auto".
        unlock_after: in "large": the step at which the base is unlocked, or "auto": when the probe says so.
        unlock_lr: learning rate of the base once it is unlocked.
        patience: probes in a row without a better control after which training stops; 0 never stops early.
        skips: steps in a row with a loss or gradient that is not finite after which training gives up.
        checkpoint_every, preview_every, log_every: in steps.
        keep: how many checkpoints stay.
        tensorboard: also write TensorBoard events; needs the package tensorboard.

    Raises: ConfigError: a value is out of range.
    """

    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    recipe: Literal["scaled", "paper"] = "scaled"
    lr: float | Literal["auto"] = "auto"
    warmup: int = 50
    decay: float = 0.0
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    clip_norm: float = 1.0
    prompt_dropout: float = 0.5
    weighting: Literal["uniform", "balanced"] = "uniform"
    ema_decay: float = 0.99
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    seed: int = 0
    regime: Regime = "standard"
    reconnect: int | Literal["auto"] = "auto"
    unlock: Unlock | None = None
    unlock_after: int | Literal["auto"] = 50_000
    unlock_lr: float = 2e-6
    patience: int = 0
    skips: int = 10
    checkpoint_every: int = 200
    preview_every: int = 200
    log_every: int = 10
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require(self, "train", 1, "steps", "batch", "accumulate", "skips", "checkpoint_every", "preview_every")
        require(self, "train", 1, "log_every", "keep")
        require(self, "train", 0, "warmup", "weight_decay", "seed", "patience")
        if not 0 < self.peak_lr < inf:
            raise ConfigError(f"setting train.lr is {self.lr}; expected 'auto', or a number above 0")
        if not 0 < self.unlock_lr < inf:
            raise ConfigError(f"setting train.unlock_lr is {self.unlock_lr}; expected a number above 0")
        if not self.clip_norm > 0:
            raise ConfigError(f"setting train.clip_norm is {self.clip_norm}; expected more than 0")
        if not 0 <= self.prompt_dropout <= 1:
            raise ConfigError(f"setting train.prompt_dropout is {self.prompt_dropout}; expected a share from 0 to 1")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"setting train.decay is {self.decay}; expected a share from 0 to 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"setting train.ema_decay is {self.ema_decay}; expected from 0 to below 1")
        choose(self, "train", "recipe", "scaled", "paper")
        choose(self, "train", "optimizer", "adamw", "adamw8bit")
        choose(self, "train", "weighting", "uniform", "balanced")
        choose(self, "train", "precision", "auto", "bf16", "fp16", "fp32")
        choose(self, "train", "regime", "standard", "small", "large", "auto")
        choose(self, "train", "unlock", "decoder", "all", None)
        for name in ("reconnect", "unlock_after"):
            if getattr(self, name) != "auto" and not getattr(self, name) >= 1:
                raise ConfigError(f"setting train.{name} is {getattr(self, name)!r}; expected 'auto', or 1 or more")
        if self.unlock is not None and self.regime not in ("large", "auto"):
            remedy = "set train.regime to 'large' or 'auto', or leave train.unlock out"
            raise ConfigError(f"setting train.unlock is {self.unlock!r}, but train.regime {self.regime!r}: {remedy}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return PAPER_LR if self.lr == "auto" else self.lr

    @property
    def effective_batch(self) -> int:
        """Pairs per optimiser step."""
        return self.batch * self.accumulate


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How training is watched; under [probe]. A probe changes no weight.

    Args:
        every: steps between probes, or "auto": so that probing adds about a twentieth of the time, not counting
            the probes before the first step and after the last.
        pairs: held-out pairs whose denoising error is measured with the true, another and no hint.
        samples: held-out pairs that are drawn and measured as `bridle evaluate` does; 0 draws none.
        steps: denoising steps of these.

    Raises: ConfigError: a value is out of range.
    """

    every: int | Literal["auto"] = "auto"
    pairs: int = 16
    samples: int = 6
    steps: int = 10

    def __post_init__(self) -> None:
        if self.every != "auto" and not self.every >= 1:
            raise ConfigError(f"setting probe.every is {self.every!r}; expected 'auto', or 1 or more")
        require(self, "probe", 2, "pairs")
        if self.samples < 0 or self.samples == 1:
            raise ConfigError(f"setting probe.samples is {self.samples}; expected 0, or 2 or more")
        require(self, "probe", 1, "steps")


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """What fits this machine; under [machine]. None of it changes what is learned, but for rounding.

    Args:
        workers: processes that read pairs ahead of training; 0 reads in the training process.
        gradient_checkpointing: keep fewer activations and compute them again: less memory, more time.
        base_weights: "bf16" and "fp16" halve the locked base's memory; "auto" does so where all is computed in that and
            the base stays locked.
        pack_weights: on a CPU, keep locked weights a second time, in the order in which they are multiplied: faster
            steps, for up to 1.8 times the memory of the base in bfloat16.
        offload: drop what training does not need (autoencoder, text encoder) from the device between probes.
        cuda_graph: on one GPU, for a U-Net whose steps are one pass without checkpointing: start a step's kernels all
            at once, which a fast GPU would otherwise wait for. A step's memory then stays taken from step to step, but
            not while something is drawn or saved.
        compile: on one GPU, for U-Nets: have PyTorch's compiler make a step's kernels. Faster steps, after some minutes
            at the start, at a switch of the regime and where memory halves the pairs of a pass.
        parallel: with several processes: "ddp" copies the models to each, "fsdp" shares them out, which a large or
            unlocked base asks for.

    Raises: ConfigError: a value is out of range.
    """

    workers: int = 0
    gradient_checkpointing: bool = False
    base_weights: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    pack_weights: bool = True
    offload: bool = False
    cuda_graph: bool = True
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        require(self, "machine", 0, "workers")
        choose(self, "machine", "base_weights", "auto", "fp32", "bf16", "fp16")
        choose(self, "machine", "parallel", "ddp", "fsdp")


def require(settings: Any, table: str, least: int, *names: str) -> None:
    """Raises: ConfigError: one of these is less than that."""
    for name in names:
        if not getattr(settings, name) >= least:
            value = getattr(settings, name)
            raise ConfigError(f"setting {table}.{name} is {value}; expected {least} or more")


def choose(settings: Any, table: str, name: str, *known: str | None) -> None:
    """Raises: ConfigError: the value is none of these."""
    value = getattr(settings, name)
    if value not in known:
        shown = [repr(choice) for choice in known if choice is not None]
        raise ConfigError(f"setting {table}.{name} is {value!r}; expected {', '.join(shown[:-1])} or {shown[-1]}")
