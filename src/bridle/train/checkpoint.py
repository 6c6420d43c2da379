"""Checkpoints: everything a run needs to go on, in one file, written so that a kill leaves the old or the new one."""

import re
from pathlib import Path
from typing import Any

import torch

from bridle.atomic import write_with
from bridle.errors import TrainError

NAME = re.compile(r"step-(\d{8})\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state of a step, then delete the oldest ones: never before the new one is safe."""
    path = folder / f"step-{step:08}.pt"
    write_with(path, lambda temporary: torch.save(state, temporary))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; files that a kill left half-written have other names."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest state, or None where there is none. Raises: TrainError: it cannot be read."""
    found = list_checkpoints(folder)
    if not found:
        return None
    try:
        state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise TrainError(
            f"checkpoint {found[-1]} is damaged ({error}); delete it to go on from the one before"
        ) from None
    return state
