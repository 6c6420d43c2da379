"""Whatever a run is stopped in, and whoever goes on with it, it ends at the same weights, bit for bit."""

import random
from typing import Any

import pytest
import tiny
import torch

from bridle.train import loop, watch
from bridle.train.log import read_rows
from bridle.train.probe import Probe
from bridle.train.settings import MachineSettings, ProbeSettings
from bridle.train.trainer import Trainer

STEPS = 9
# Both switches of the regime, an epoch's end in the middle of a step, probes, previews and checkpoints at odd places.
ALL_PHASES = {"steps": STEPS, "regime": "auto", "unlock": "decoder", "checkpoint_every": 4, "preview_every": 5}
PROBING = ProbeSettings(every=2, pairs=3)


class Stops:
    """Counts the moments at which training asks whether to stop, and says yes at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.where = at, "between steps"
        self.places: list[str] = []

    def __bool__(self) -> bool:
        self.places.append(self.where)
        return self.at is not None and len(self.places) > self.at

    def check(self) -> None:
        if self:
            raise loop.Stopped

    def __enter__(self) -> "Stops":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[Stops]:
    """What training asks; the last one put in here. The regime's switches come when the test wants them."""
    made = [Stops()]
    monkeypatch.setattr(loop, "StopSignal", lambda: made[-1])
    monkeypatch.setattr(watch, "learned", lambda rows: len(rows) > 1)
    monkeypatch.setattr(watch, "settled", lambda rows: len(rows) > 1)
    for owner, name, where in ((Trainer, "step", "in a step"), (Probe, "read", "in a probe")):
        monkeypatch.setattr(owner, name, placed(getattr(owner, name), made, where))
    return made


def placed(real: Any, made: list[Stops], where: str) -> Any:
    """A method that says where it is while it runs."""

    def call(self: Any, *args: Any) -> Any:
        made[-1].where = where
        try:
            return real(self, *args)
        finally:
            made[-1].where = "between steps"

    return call


def stop_everywhere(new_run: Any, stops: list[Stops], workers: int, count: int) -> None:
    machine = MachineSettings(workers=workers)
    whole = new_run("whole", **ALL_PHASES)
    assert whole.start(base=tiny.make_base(), machine=machine, probing=PROBING).finished
    asked = stops[-1].places
    kinds = [row["kind"] for row in read_rows(whole.folder / "events.jsonl")]
    assert kinds.count("switch") == 2
    assert {"between steps", "in a step", "in a probe"} == set(asked)
    source = random.Random(workers)
    moments = [
        moment
        for place in ("in a step", "in a probe", "between steps")
        for moment in source.sample([at for at, where in enumerate(asked) if where == place], count // 3)
    ]
    for moment in moments:
        run = new_run(f"stopped-{moment}", **ALL_PHASES)
        stops.append(Stops(moment))
        assert not run.start(base=tiny.make_base(), machine=machine, probing=PROBING).finished
        stops.append(Stops())
        assert run.start(base=tiny.make_base(), machine=machine, probing=PROBING).finished
        assert run.digest() == whole.digest(), f"stopped {asked[moment]}, at moment {moment} of {len(asked)}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_anywhere_ends_as_one_that_was_not(new_run: Any, stops: list[Stops], workers: int) -> None:
    stop_everywhere(new_run, stops, workers, 3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_at_24_moments(new_run: Any, stops: list[Stops], workers: int) -> None:
    stop_everywhere(new_run, stops, workers, 24)


def test_workers_change_nothing(new_run: Any, whole: Any) -> None:
    run = new_run("run")
    run.start(machine=MachineSettings(workers=2))
    assert run.digest() == whole.digest()


def test_gradient_checkpointing_may_be_switched_on_half_way(new_run: Any, whole: Any) -> None:
    run = new_run("run")
    run.start(stop_at=3)
    run.start(machine=MachineSettings(gradient_checkpointing=True))
    assert run.digest() == whole.digest()


def test_memory_may_be_spared_half_way(new_run: Any, whole: Any) -> None:
    run = new_run("run")
    run.start(stop_at=3)
    run.start(machine=MachineSettings(pack_weights=False))
    ours, theirs = run.tensors("control."), whole.tensors("control.")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
