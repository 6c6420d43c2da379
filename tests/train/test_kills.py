"""Killed or stopped at any moment, on a full disk: what was saved is whole, little is lost, and the end is the same."""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import PRELOAD
from test_ranks import VALUES, go

from bridle.errors import TrainError
from bridle.train import checkpoint, pieces
from bridle.train.log import EVENTS, RunLog, read_rows
from bridle.train.loop import CHECKPOINTS
from bridle.train.parallel import ALONE, World

ENOUGH_S = 30.0  # between a SIGTERM and the end, as Kubernetes gives


@dataclass
class Child:
    """A process that trains, and tells of every step."""

    process: Any
    reports: Connection
    steps: list[int] = field(default_factory=list)

    def wait_for(self, count: int) -> bool:
        """Until it has told of so many steps, the first being where it begins. Returns: whether it lived that long."""
        while len(self.steps) < count:
            try:
                self.steps.append(self.reports.recv())
            except EOFError:
                return False
        return True

    def end(self, number: int | None = None) -> float:
        """Send it a signal, if any is given, and hear its last words. Returns: the seconds until it was gone."""
        started = time.monotonic()
        if number is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
        self.wait_for(10**9)
        self.process.join()
        return time.monotonic() - started


def start(pairs: Path, folder: Path) -> Child:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(pairs, folder, its))
    process.start()
    its.close()  # so that reading ends when the child does
    return Child(process, mine)


def train(pairs: Path, folder: Path, reports: Connection) -> None:
    torch.set_num_threads(1)
    go(ALONE, pairs, folder, on_step=partial(tell, reports))


def tell(reports: Connection, world: World, step: int) -> None:
    reports.send(step)


@pytest.fixture(scope="module")
def never_stopped(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run, and the seconds that a step of it took."""
    folder = tmp_path_factory.mktemp("never_stopped")
    child = start(cache.folder, folder)
    child.wait_for(1)
    started = time.monotonic()
    child.end()
    assert child.process.exitcode == 0
    return folder, (time.monotonic() - started) / VALUES["steps"]


def interrupt(
    new_run: Any, never_stopped: tuple[Path, float], number: int, count: int, least: int, look: Callable[..., None]
) -> None:
    """Start a run again and again and signal it at random moments; one that comes to its end is followed by another.

    Args:
        least: reports to wait for at every start, before the moment is drawn.
        look: called with the child, the run's checkpoints and the seconds that its end took.
    """
    whole, step_s = new_run("whole"), never_stopped[1]
    whole.folder = never_stopped[0]
    source, done, runs = random.Random(count), 0, [new_run("run-0")]
    while done < count or not finished(runs[-1].folder):
        if finished(runs[-1].folder):
            runs.append(new_run(f"run-{len(runs)}"))
        child = start(whole.cache.folder, runs[-1].folder)
        if done < count and child.wait_for(least + source.randrange(3)):
            time.sleep(source.uniform(0, 2 * step_s))
            done += child.process.is_alive()
            look(child, runs[-1].folder / CHECKPOINTS, child.end(number))
        child.end()
        if finished(runs[-1].folder):
            assert runs[-1].digest() == whole.digest()


def finished(folder: Path) -> bool:
    """Whether the run said so: one stopped in its last probe has done all steps, and still that to do."""
    return any(row.get("finished") for row in read_rows(folder / EVENTS))


def check_killed(child: Child, checkpoints: Path, took_s: float) -> None:
    newest = checkpoint.newest(checkpoints)
    saved = 0
    if newest is not None:
        saved = checkpoint.read_facts(newest)["step"]
        assert checkpoint.load(newest)
    assert child.steps[-1] - saved <= VALUES["checkpoint_every"]


def check_stopped(child: Child, checkpoints: Path, took_s: float) -> None:
    assert child.process.exitcode == 0 or finished(checkpoints.parent)  # then no one listens any more
    assert took_s < ENOUGH_S
    newest = checkpoint.newest(checkpoints)
    assert newest is not None
    assert checkpoint.read_facts(newest)["step"] == child.steps[-1]


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_loses_an_interval_at_most_and_changes_nothing(new_run: Any, never_stopped: Any, count: int) -> None:
    interrupt(new_run, never_stopped, signal.SIGKILL, count, 1, check_killed)


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_stop_loses_nothing_and_changes_nothing(new_run: Any, never_stopped: Any, count: int) -> None:
    interrupt(new_run, never_stopped, signal.SIGTERM, count, 2, check_stopped)


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (pieces, "save_file", r"checkpoint of step 2 cannot be written to .*: the disk is full; free some space"),
        (RunLog, "metrics", r"training broke off after step 3: the disk is full; free some space"),
    ],
)
def test_a_full_disk_ends_training_with_the_last_checkpoint_intact(
    new_run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, said: str
) -> None:
    run = new_run("run")
    run.start(stop_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(TrainError, match=said):
            run.start()
    assert run.facts()["step"] == 2
    assert run.start().finished
    assert run.digest() == whole.digest()
