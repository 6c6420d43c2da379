"""`bridle train` in full: choose what fits the memory, then train in one process, in several, or on a Ray cluster."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bridle.errors import ConfigError
from bridle.run.launch import train_on_ray, train_processes
from bridle.run.measure import apply_plan, plan_of
from bridle.run.plan import fit
from bridle.run.settings import CONTROL, RunSettings, check_run, has_begun, read_run
from bridle.run.training import BEST, train_run
from bridle.train.log import EVENTS, read_rows
from bridle.train.parallel import World, share


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: the last one done.
        finished: else the same command goes on.
        reason: why it ended.
        verdict: what the probes say, in words.
        control, best: whether the folders of these names are there: they may have been moved since.
    """

    step: int
    finished: bool
    reason: str
    verdict: str
    control: bool
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
        memory: what may be used, such as "8GB": the fastest plan that fits is measured and taken, or, where the run
            goes on, that which it began with.
        force: go on although settings or data are not what the run began with.
        nproc: processes.
        ray: the Ray cluster that they run on, see `train_on_ray`.
        as_json: how the process that says the result is to say it.

    Returns: how it ended; None where another process says so.
    Raises: BridleError: anything the user can put right. SystemExit: one of several processes has said what went wrong.
    """
    if "RANK" in os.environ:
        check_alone(memory, nproc, ray)
        train_run(settings, folder, force=force)
        return read_result(folder) if os.environ["RANK"] == "0" else None
    goes_on = has_begun(folder)
    if memory is not None and goes_on:
        settings = keep_plan(settings, read_run(folder))
    check_run(folder, settings, force)
    check_processes(settings, nproc, memory)
    if memory is not None and not goes_on:
        settings = fit(settings, memory)
    if ray is not None:
        train_on_ray(settings, folder, ray, nproc, force)
    elif nproc > 1:
        options = [name for name, wanted in (("--force", force), ("--json", as_json)) if wanted]
        if status := train_processes(settings, folder, nproc, options):
            sys.exit(status)
        return None
    else:
        train_run(settings, folder, force=force)
    return read_result(folder)


def check_processes(settings: RunSettings, nproc: int, memory: str | None) -> None:
    """What several processes cannot do. Raises: ConfigError: they are asked to."""
    share(range(settings.train.effective_batch), World(size=nproc))
    if nproc > 1 and memory is not None:
        remedy = "leave one of them out, or run `bridle plan` first and give its settings"
        raise ConfigError(f"--memory measures training in one process, but --nproc is {nproc}: {remedy}")
    if nproc > 1 and settings.machine.parallel == "fsdp" and settings.train.optimizer == "adamw8bit":
        remedy = "set train.optimizer to 'adamw', or machine.parallel to 'ddp'"
        raise ConfigError(f"setting machine.parallel 'fsdp' shares out optimiser state, which 8 bits cannot: {remedy}")


def keep_plan(settings: RunSettings, before: RunSettings) -> RunSettings:
    """The settings with the plan of the run that they continue: by another it might be another run.

    Where the pairs per step differ, theirs stay, so that the difference is told.
    """
    plan = plan_of(before)
    if settings.train.effective_batch != before.train.effective_batch:
        plan = replace(plan, batch=settings.train.batch, accumulate=settings.train.accumulate)
    return apply_plan(settings, plan)


def check_alone(memory: str | None, nproc: int, ray: str | None) -> None:
    """Raises: ConfigError: one of several processes is asked to start others."""
    given = {"--memory": memory is not None, "--nproc": nproc > 1, "--ray": ray is not None}
    for option in (option for option, wanted in given.items() if wanted):
        remedy = "leave it out, or unset RANK if there are no others"
        raise ConfigError(f"{option} starts processes, but this is one of several already (RANK is set): {remedy}")


def read_result(folder: Path) -> Result:
    """How the run in a folder ended last, from what it logged."""
    events = read_rows(folder / EVENTS)
    ended = [event for event in events if event["kind"] == "ended"][-1]
    learned = [event["message"] for event in events if event["kind"] == "learned"]
    verdict = (
        learned[0][0].upper() + learned[0][1:] if learned else "The probes do not show that the control is learned"
    )
    there = [(folder / name).exists() for name in (CONTROL, BEST)]
    return Result(ended["step"], ended["finished"], ended["message"], verdict + ".", *there)
