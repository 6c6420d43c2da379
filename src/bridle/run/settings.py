"""A run's settings, and the copy of them that its folder keeps."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bridle import config
from bridle.control.settings import ControlSettings
from bridle.data.settings import DataSettings
from bridle.errors import ConfigError, TrainError
from bridle.kernels.precision import Precision, choose_precision
from bridle.sample.settings import SampleSettings
from bridle.train.checkpoint import list_checkpoints, newest_precision
from bridle.train.log import EVENTS, read_rows
from bridle.train.loop import CHECKPOINTS, cannot_go_on
from bridle.train.loop import FREE as FREE_IN_TRAIN
from bridle.train.regime import unlocks
from bridle.train.settings import PAPER_LR, MachineSettings, ProbeSettings, TrainSettings

FILE = "settings.toml"
CONTROL = "control"
WRITTEN = {CONTROL, CHECKPOINTS, "best", "cache", "previews", "evaluation", "tensorboard"}  # folders of a run
# What a continuation may change: machine and folder may differ, and so may what comes later.
# Another annotator is known by the cache, unless hints are files: then it says what pictures are read by.
FREE = {"device", "data.folder", "data.annotator", *(f"train.{name}" for name in FREE_IN_TRAIN)}
PRECISION = "train.precision"
FREE_TABLES = ("sample.", "probe.", "machine.")
EMBEDDED_LR = 1e-3  # what docs/performance.md measures with; the paper's is for forty times as many weights


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that a run needs to know.

    Args:
        base: as `bridle.load_base` takes it: "embedded", a diffusers folder, a checkpoint in one file, or a hub id.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        data, control, train, probe, machine, sample: each described where it is defined. A `train.lr` of "auto" becomes
            the base's own: 1e-3 for the embedded one, which is small, and the paper's 1e-5 for any other.

    Raises: ConfigError: two settings contradict each other.
    """

    base: str = "embedded"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataSettings
    control: ControlSettings = field(default_factory=ControlSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)

    def __post_init__(self) -> None:
        if self.train.lr == "auto":
            lr = EMBEDDED_LR if self.base == "embedded" else PAPER_LR
            object.__setattr__(self, "train", replace(self.train, lr=lr))
        kept = self.machine.base_weights
        if kept in ("auto", "fp32"):
            return
        for other in {self.train.precision, self.sample.precision} - {"auto", kept}:
            remedy = f"set train.precision and sample.precision to {kept!r} as well"
            raise ConfigError(
                f"setting machine.base_weights is {kept!r}, but something computes in {other!r}: {remedy}"
            )
        if unlocks(self.train):
            remedy = "steps of train.unlock_lr are lost in 16 bits; set it to 'fp32', or keep the base locked"
            raise ConfigError(f"setting machine.base_weights is {kept!r}, but the base is to be trained: {remedy}")


def base_weights(settings: RunSettings, device: torch.device, began: Precision | None = None) -> Precision:
    """What the base's weights are kept in on a device while a run trains.

    Args:
        began: the precision that the run goes on in, where it has begun: perhaps not what is fastest here.
    """
    if settings.machine.base_weights != "auto":
        return settings.machine.base_weights
    trained = began if began and settings.train.precision == "auto" else settings.train.precision
    if unlocks(settings.train):
        return "fp32"
    used = {choose_precision(wanted, device) for wanted in (trained, settings.sample.precision)}
    # Cast at every use they would take a GPU half a step more memory traffic, and twice the memory everywhere.
    return used.pop() if len(used) == 1 else "fp32"


def check_run(folder: Path, settings: RunSettings, force: bool = False) -> None:
    """Whether the run in a folder can go on under these settings; a folder that no run has written to takes any.

    Asked before anything in the folder is written, so that a refused call leaves the run as it was.

    Raises: TrainError: they differ in more than what is free, or the run's checkpoints are gone. ConfigError: what the
        run writes would be among the data, or the folder's name or a setting is no Unicode, which files of settings and
        weights ask for.
    """
    config.literal(folder, "--out")
    config.dump(settings)
    check_apart(folder, settings.data.folder)
    if force:
        return
    if lost_checkpoints(folder):
        there = f"{folder} holds a control of an earlier run, but none of its checkpoints to go on from"
        raise TrainError(f"{there}; give another --out, or --force to begin anew and write over it")
    if not has_begun(folder):
        return
    before, now = dict(flatten(dataclasses.asdict(read_run(folder)))), dict(flatten(dataclasses.asdict(settings)))
    kept = settings.machine.base_weights
    if kept not in ("auto", "fp32") and kept != (began := newest_precision(folder / CHECKPOINTS)):
        remedy = "set it to 'auto' or 'fp32'"
        raise TrainError(
            f"setting machine.base_weights is {kept!r}, but this run began computing in {began!r}: {remedy}"
        )
    if before[PRECISION] != now[PRECISION] and "auto" in (before[PRECISION], now[PRECISION]):
        decided = newest_precision(folder / CHECKPOINTS)  # what "auto" was when the run began stays
        for table in (before, now):
            table[PRECISION] = decided if table[PRECISION] == "auto" else table[PRECISION]
    fixed = [key for key in now if key not in FREE and not key.startswith(FREE_TABLES)]
    changed = [f"{key} was {before[key]}, is {now[key]}" for key in fixed if before[key] != now[key]]
    if changed:
        raise TrainError(cannot_go_on(changed))


def has_begun(folder: Path) -> bool:
    """Whether a folder holds a run that can go on."""
    return (folder / FILE).exists() and bool(list_checkpoints(folder / CHECKPOINTS))


def check_apart(folder: Path, data: Path) -> None:
    """The data may lie in a folder of their own in the run's, as the demo's do; else what it draws would become data.

    Raises: ConfigError: the run's folder is that of the data or lies in it, or the data are what a run writes.
    """
    run, pairs = folder.resolve(), data.resolve()
    if run.is_relative_to(pairs):
        raise ConfigError(f"the run's folder {folder} is, or lies in, the data's ({data}); give an --out outside of it")
    if pairs.is_relative_to(run) and pairs.relative_to(run).parts[0] in WRITTEN:
        raise ConfigError(f"data folder {data} is where the run in {folder} writes; give another --data or --out")


def lost_checkpoints(folder: Path) -> bool:
    """Whether a control is there without the checkpoint that it was saved with, and not because of a kill in between.

    The loop makes the checkpoints' folder before it saves the first control.
    """
    kept = folder / CHECKPOINTS
    if not (folder / CONTROL).exists() or any(kept.glob("step-*")):
        return False
    return not kept.exists() or any(event["kind"] == "ended" for event in read_rows(folder / EVENTS))


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys, such as "train.lr"."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def open_run(folder: Path, settings: RunSettings) -> None:
    """Keep the resolved settings with the run."""
    config.save(settings, folder / FILE)


def read_run(folder: Path) -> RunSettings:
    """The settings that a run was started with. Raises: ConfigError: the folder holds no run."""
    if not (folder / FILE).exists():
        raise ConfigError(f"{folder} holds no run ({FILE} is missing); give a folder that `bridle train` wrote")
    return config.read(RunSettings, folder / FILE)
