"""`bridle train` in full: in which way it trains, what it refuses before anything takes time, and what it says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridle.errors import ConfigError, TrainError
from bridle.run import RunSettings, start
from bridle.run.settings import open_run
from bridle.train.loop import CHECKPOINTS

ENDED = {"step": 7, "kind": "ended", "message": "asked to stop", "finished": False}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been called; each leaves a run that was stopped."""
    made: list[tuple[Any, ...]] = []

    def record(name: str) -> Callable[..., int]:
        def call(settings: RunSettings, folder: Path, *rest: Any, **named: Any) -> int:
            made.append((name, *rest, *named.values()))
            write(folder, [ENDED])
            return 0

        return call

    for name in ("train_run", "train_processes", "train_on_ray"):
        monkeypatch.setattr(start, name, record(name))
    monkeypatch.delenv("RANK", raising=False)
    return made


def write(folder: Path, events: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize(
    ("asked", "called", "told"),
    [
        ({}, ("train_run", False), True),
        ({"force": True}, ("train_run", True), True),
        ({"nproc": 2}, ("train_processes", 2, []), False),
        ({"nproc": 4, "force": True, "as_json": True}, ("train_processes", 4, ["--force", "--json"]), False),
        ({"ray": "auto", "nproc": 2}, ("train_on_ray", "auto", 2, False), True),
    ],
)
def test_it_trains_as_it_is_asked_to_and_one_process_tells_the_result(
    calls: list[Any], settings: RunSettings, tmp_path: Path, asked: dict[str, Any], called: Any, told: bool
) -> None:
    result = start.start(settings, tmp_path, **asked)
    assert calls == [called]
    assert (result is not None) == told


def test_of_several_processes_the_main_one_tells_the_result(
    calls: list[Any], settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert (start.start(settings, tmp_path) is not None) == told
    assert calls == [("train_run", False)] * 2


def test_processes_that_cannot_share_a_step_are_refused_before_anything_takes_time(
    calls: list[Any], settings: RunSettings, tmp_path: Path
) -> None:
    for more in ({"ray": "auto"}, {}):
        with pytest.raises(ConfigError, match="4 pairs a step cannot be shared equally by 3 processes: set train"):
            start.start(settings, tmp_path / "run", nproc=3, **more)
    assert not calls
    assert not (tmp_path / "run").exists()


def test_what_several_processes_cannot_do_is_refused(calls: list[Any], settings: RunSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--memory measures training in one process, but --nproc is 2: leave one"):
        start.start(settings, tmp_path, nproc=2, memory="8GB")
    machine, train = replace(settings.machine, parallel="fsdp"), replace(settings.train, optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="'fsdp' shares out optimiser state, which 8 bits cannot"):
        start.start(replace(settings, machine=machine, train=train), tmp_path, nproc=2)
    assert not calls


def test_memory_is_measured_for_a_new_run_and_kept_to_by_its_continuation(
    calls: list[Any], settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan may ask another optimiser, with which the run could not go on."""
    fitted = replace(settings, train=replace(settings.train, batch=1, accumulate=4, optimizer="adamw8bit"))
    monkeypatch.setattr(start, "fit", lambda *_: fitted)
    given = []
    monkeypatch.setattr(
        start, "train_run", lambda settings, folder, **_: given.append(settings) or write(folder, [ENDED])
    )
    start.start(settings, tmp_path, memory="8GB")
    open_run(tmp_path, fitted)
    (tmp_path / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "step-00000001" / "facts.json").write_text("{}")
    monkeypatch.setattr(start, "fit", lambda *_: pytest.fail("measured anew"))
    start.start(settings, tmp_path, memory="8GB")
    assert given == [fitted, fitted]
    with pytest.raises(TrainError, match=r"train\.lr was"):
        start.start(replace(settings, train=replace(settings.train, lr=0.5)), tmp_path, memory="8GB")


@pytest.mark.parametrize(("option", "value"), [("memory", "8GB"), ("nproc", 2), ("ray", "auto")])
def test_one_of_several_processes_starts_no_others(
    calls: list[Any], settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=f"--{option} starts processes, .*RANK is set.*: leave it out"):
        start.start(settings, tmp_path, **{option: value})
    assert not calls


def test_what_processes_failed_with_is_the_exit_status(
    calls: list[Any], settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "train_processes", lambda *_: 2)
    with pytest.raises(SystemExit) as ended:
        start.start(settings, tmp_path, nproc=2)
    assert ended.value.code == 2


def test_the_result_is_what_the_run_logged_last(tmp_path: Path) -> None:
    write(tmp_path, [ENDED])
    stopped = "The probes do not show that the control is learned."
    assert start.read_result(tmp_path) == start.Result(7, False, "asked to stop", stopped, control=False, best=False)
    for name in ("control", "best"):
        (tmp_path / name).mkdir()
    learned = {"step": 8, "kind": "learned", "message": "control learned at step 8 (advantage 0.31 ± 0.02)"}
    done = {"step": 9, "kind": "ended", "message": "all 9 steps are done", "finished": True}
    write(tmp_path, [ENDED, learned, done])
    said = "Control learned at step 8 (advantage 0.31 ± 0.02)."
    assert start.read_result(tmp_path) == start.Result(9, True, "all 9 steps are done", said, control=True, best=True)
