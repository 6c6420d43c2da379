"""A run's settings, and the copy of them that its folder keeps."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bridle import config
from bridle.control.settings import ControlSettings
from bridle.data.settings import DataSettings
from bridle.errors import ConfigError, TrainError
from bridle.sample.settings import SampleSettings
from bridle.train.checkpoint import list_checkpoints
from bridle.train.loop import FREE as FREE_IN_TRAIN
from bridle.train.settings import TrainSettings

FILE = "settings.toml"
# What a continuation may change: machine and folder may differ, and the links of a control may be connected later on.
# How pictures are sampled is free as a whole.
FREE = {"device", "data.folder", "control.links", *(f"train.{name}" for name in FREE_IN_TRAIN)}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that a run needs to know.

    Args:
        base: "embedded", a diffusers folder, or a hub id in the local cache.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        data, control, train, sample: each described where it is defined.
    """

    base: str = "embedded"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataSettings
    control: ControlSettings = field(default_factory=ControlSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)


def check_run(folder: Path, settings: RunSettings) -> None:
    """Whether the run in a folder can go on under these settings; a folder without checkpoints takes any.

    Asked before anything in the folder is written, so that a refused call leaves the run as it was.

    Raises: TrainError: they differ in more than what is free.
    """
    if not (folder / FILE).exists() or not list_checkpoints(folder / "checkpoints"):
        return
    before, now = dict(flatten(dataclasses.asdict(read_run(folder)))), dict(flatten(dataclasses.asdict(settings)))
    fixed = [key for key in now if key not in FREE and not key.startswith("sample.")]
    changed = [f"{key} was {before[key]}, is {now[key]}" for key in fixed if before[key] != now[key]]
    if changed:
        raise TrainError(f"this run cannot go on: {'; '.join(changed)}. Undo that, or start a run in another folder")


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
