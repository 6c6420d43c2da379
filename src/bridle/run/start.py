"""`bridle train` in full: choose what fits the memory, then train in one process, in several, or on a Ray cluster."""

import os
from dataclasses import dataclass
from pathlib import Path

from bridle.run.launch import train_on_ray, train_processes
from bridle.run.plan import fit
from bridle.run.settings import RunSettings, check_run
from bridle.run.training import BEST, train_run
from bridle.train.log import EVENTS, read_rows


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last one done.
        finished: else the same command goes on.
        reason: why it ended.
        verdict: what the probes say, in words.
        best: whether `best/` holds a control.
    """

    step: int
    finished: bool
    reason: str
    verdict: str
    best: bool


def start(
    settings: RunSettings,
    folder: Path,
    *,
    memory: str | None = None,
    force: bool = False,
    nproc: int = 1,
    ray: str | None = None,
    as_json: bool = False,
) -> Result | None:
    """Train, or go on with the run in `folder`.

    Args:
        memory: what may be used, such as "8GB": the fastest plan that fits is measured and taken.
        force: go on although settings or data are not what the run began with.
        nproc: processes.
        ray: address of the Ray cluster that they run on.

    Returns: how it ended; None where another process says so.
    Raises: BridleError: anything the user can put right.
    """
    if "RANK" in os.environ:  # one of several already
        train_run(settings, folder, force=force)
        return read_result(folder) if os.environ["RANK"] == "0" else None
    check_run(folder, settings, force)
    if memory is not None:
        settings = fit(settings, memory)
    if ray is not None:
        train_on_ray(settings, folder, ray, nproc, force)
    elif nproc > 1:
        train_processes(settings, folder, nproc, [*(["--force"] if force else []), *(["--json"] if as_json else [])])
        return None
    else:
        train_run(settings, folder, force=force)
    return read_result(folder)


def read_result(folder: Path) -> Result:
    """How the run in a folder ended last, from what it logged."""
    events = read_rows(folder / EVENTS)
    ended = [event for event in events if event["kind"] == "ended"][-1]
    learned = [event["message"] for event in events if event["kind"] == "learned"]
    verdict = (
        learned[0][0].upper() + learned[0][1:] if learned else "The probes do not show that the control is learned"
    )
    return Result(ended["step"], ended["finished"], ended["message"], verdict + ".", (folder / BEST).exists())
