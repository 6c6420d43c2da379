"""A way to train, and what it takes. In: settings and a plan. Out: peak memory and time, from a process of its own."""

import json
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch

from bridle import config
from bridle.errors import TrainError
from bridle.run.settings import RunSettings
from bridle.train.memory import peak_resident_bytes
from bridle.train.regime import Phase, unlocks

LOOK_S = 0.02  # between looks at the memory of the other process; it may take more than its limit for so long


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to train. All have the same effective batch and the same draws.

    Attributes:
        batch, accumulate: pairs per forward pass, and passes per optimiser step.
        optimizer: see `TrainSettings`.
        gradient_checkpointing, base_weights, pack_weights, offload: see `MachineSettings`.
        drawn: pictures drawn at once in previews and probes, whose autoencoder may take more than training.
        phase: of the regime: the one to measure, after those before it.
    """

    batch: int
    accumulate: int
    optimizer: Literal["adamw", "adamw8bit"]
    gradient_checkpointing: bool
    base_weights: Literal["auto", "fp32", "bf16", "fp16"]
    pack_weights: bool
    offload: bool
    drawn: int
    phase: Phase

    def settings(self) -> dict[str, Any]:
        """Under the names of a run's settings."""
        wanted = {f"train.{name}": getattr(self, name) for name in ("batch", "accumulate", "optimizer")}
        for name in ("gradient_checkpointing", "base_weights", "pack_weights", "offload"):
            wanted[f"machine.{name}"] = getattr(self, name)
        wanted |= {"sample.batch": self.drawn, "sample.pack_weights": self.pack_weights}
        # Pictures are drawn with the weights that there are.
        return wanted | ({"sample.precision": self.base_weights} if self.base_weights in ("bf16", "fp16") else {})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan and what it took.

    Attributes:
        peak_memory_bytes: of the process, imports included; on a GPU, what PyTorch reserved there.
        time_per_sample_s: seconds per pair; None where it was stopped, at that peak, for taking more than it might.
    """

    plan: Plan
    peak_memory_bytes: int
    time_per_sample_s: float | None

    def fits(self, memory_bytes: int) -> bool:
        return self.time_per_sample_s is not None and self.peak_memory_bytes <= memory_bytes


Measure = Callable[[Plan, int], Measured]  # what may be taken, in bytes


def plan_of(settings: RunSettings) -> Plan:
    """The way in which a run with these settings trains."""
    train, machine = settings.train, settings.machine
    return Plan(
        batch=train.batch,
        accumulate=train.accumulate,
        optimizer=train.optimizer,
        gradient_checkpointing=machine.gradient_checkpointing,
        base_weights=machine.base_weights,
        pack_weights=machine.pack_weights,
        offload=machine.offload,
        drawn=settings.sample.batch,
        phase="unlocked" if unlocks(train) else "connected",
    )


def apply_plan(settings: RunSettings, plan: Plan) -> RunSettings:
    """The settings of a run that trains in this way."""
    tables: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in plan.settings().items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    return replace(settings, **{table: replace(getattr(settings, table), **new) for table, new in tables.items()})


def measure_plan(settings: RunSettings, plan: Plan, limit_bytes: int) -> Measured:
    """Train a few random pairs in another process; it is stopped when it takes more than the limit.

    Raises: TrainError: it failed for another reason than memory.
    """
    settings = apply_plan(settings, plan)
    settings = replace(settings, machine=replace(settings.machine, compile=False))  # that alone would take minutes
    if plan.phase == "middle":
        settings = replace(settings, train=replace(settings.train, regime="small", unlock=None))
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch, "errors"), "w+") as errors:
        path = Path(scratch, "settings.toml")
        config.save(settings, path)
        command = [sys.executable, "-m", "bridle.run.worker", str(path), plan.phase, str(limit_bytes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as worker:
            try:
                peak_bytes = watch(worker, limit_bytes if on_cpu(settings) else None)
                said = worker.communicate()[0]
            finally:
                worker.kill()
        if worker.returncode == -signal.SIGKILL:  # by `watch`, or by a system that has no more to give
            return Measured(plan=plan, peak_memory_bytes=peak_bytes, time_per_sample_s=None)
        if worker.returncode != 0:
            raise TrainError(f"training could not be measured: {last_line(errors)}")
    return Measured(plan=plan, **json.loads(said.splitlines()[-1]))


def watch(worker: "subprocess.Popen[str]", limit_bytes: int | None) -> int:
    """Wait until a process has ended, and end it beyond the limit. Returns: the most it was seen to hold, in bytes."""
    peak_bytes = 0
    while worker.poll() is None:
        peak_bytes = max(peak_bytes, peak_resident_bytes(worker.pid) or 0)
        if limit_bytes is not None and peak_bytes > limit_bytes:
            worker.kill()
        try:
            worker.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            continue
    return peak_bytes


def on_cpu(settings: RunSettings) -> bool:
    return settings.device == "cpu" or not torch.cuda.is_available()


def last_line(errors: IO[str]) -> str:
    """What a process said last, which is its error message."""
    errors.seek(0)
    return (errors.read().strip().splitlines() or ["it ended without a word"])[-1]
