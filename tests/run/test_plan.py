"""Plans: found with few measurements, each of which is a real one; the fastest that fits is the one that is taken."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import SIZE_PX

from bridle.errors import BaseError, ConfigError, TrainError
from bridle.run import RunSettings, plan, worker
from bridle.run.measure import Measured, Plan, measure_plan, plan_of, watch
from bridle.run.plan import Found, choose, describe, fit, ladder, parse_memory, plan_run, search, with_batch
from bridle.train.memory import peak_resident_bytes
from bridle.train.settings import TrainSettings
from bridle.train.trainer import Trainer

MB, FREE_BYTES = 10**6, 64 * 10**9
PLAN = Plan(
    batch=2,
    accumulate=2,
    optimizer="adamw",
    gradient_checkpointing=False,
    base_weights="fp32",
    pack_weights=True,
    offload=False,
    drawn=2,
    phase="connected",
)


class Machine:
    """Figures as a large base gives them, without one: what is saved costs time, and small micro-batches do too."""

    def __init__(self, per_pass_s: float) -> None:
        self.per_pass_s, self.asked = per_pass_s, list[tuple[Plan, int]]()

    def __call__(self, plan: Plan, limit_bytes: int) -> Measured:
        self.asked.append((plan, limit_bytes))
        fixed = 8_000 - 2_000 * plan.offload - 2_000 * (plan.optimizer == "adamw8bit")
        peak_bytes = MB * int(fixed + plan.batch * 2_000 * (0.3 if plan.gradient_checkpointing else 1))
        if peak_bytes > limit_bytes:
            return Measured(plan=plan, peak_memory_bytes=limit_bytes + 1, time_per_sample_s=None)
        slower = 1 + 0.3 * plan.gradient_checkpointing + 0.05 * (plan.optimizer == "adamw8bit")
        time_s = slower + self.per_pass_s / plan.batch
        return Measured(plan=plan, peak_memory_bytes=peak_bytes, time_per_sample_s=time_s)


def settings_for(**train: object) -> RunSettings:
    from bridle.data.settings import DataSettings

    return RunSettings(data=DataSettings(folder=Path()), train=TrainSettings(**({"batch": 16} | train)))


@pytest.fixture(autouse=True)
def eight_bits_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "has_eight_bits", lambda on_cpu: True)


@pytest.fixture(autouse=True)
def fastest(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the machine computes fastest in."""
    found = ["bf16"]
    for module in ("plan", "settings"):
        decide: Callable[..., str] = lambda wanted, *_: found[0] if wanted == "auto" else wanted  # noqa: E731
        monkeypatch.setattr(f"bridle.run.{module}.choose_precision", decide)
    return found


@pytest.mark.parametrize("per_pass_s", [0.02, 1.0])
@pytest.mark.parametrize("memory_mb", [5_000, 6_500, 8_000, 9_000, 12_000, 20_000, 37_000, 40_000])
def test_the_search_ends_where_measuring_everything_would_with_about_half_the_measurements(
    memory_mb: int, per_pass_s: float
) -> None:
    settings, memory_bytes = settings_for(), memory_mb * MB
    every = [with_batch(rung, 2**power) for rung in ladder(settings) for power in range(5)]
    best = choose([Machine(per_pass_s)(plan, memory_bytes) for plan in every], memory_bytes)
    machine = Machine(per_pass_s)
    rows = list(search(settings, memory_bytes, FREE_BYTES, machine))
    assert best is not None
    assert choose(rows, memory_bytes) == best
    plans = [plan for plan, _ in machine.asked]
    assert len(set(plans)) == len(plans) <= 14 < len(every)
    assert all(plan.batch * plan.accumulate == 16 for plan in plans)


def test_where_all_pairs_fit_at_once_nothing_is_saved_and_nothing_else_measured() -> None:
    rows = list(search(settings_for(), 50_000 * MB, FREE_BYTES, Machine(1.0)))
    assert [row.plan for row in rows] == ladder(settings_for())[:1]
    line = describe(Found(settings_for(), 50_000 * MB, tuple(rows)))
    assert line == "fastest that fits: 16 × 1 pairs, bfloat16 base; the settings as they are"


def test_where_nothing_fits_the_error_names_what_the_smallest_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0)
    monkeypatch.setattr(plan, "shown", lambda settings, console: machine)
    monkeypatch.setattr(plan, "free_memory_bytes", lambda device: FREE_BYTES)
    with pytest.raises(
        TrainError, match=r"nothing fits 0\.93 GiB: the smallest measured takes 4\.28 GiB \(1 × 16 pairs"
    ):
        fit(settings_for(), "1GB")
    assert machine.asked[-1][1] == FREE_BYTES  # it was let run to its end


def test_what_is_locked_alone_is_kept_in_bfloat16() -> None:
    locked, unlocked = settings_for(), settings_for(regime="large")
    assert {rung.base_weights for rung in ladder(locked)} == {"bf16"}
    assert {rung.base_weights for rung in ladder(unlocked)} == {"fp32"}
    assert {rung.phase for rung in ladder(unlocked)} == {"unlocked"}


def test_where_there_are_no_eight_bits_no_plan_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "has_eight_bits", lambda on_cpu: False)
    assert {rung.optimizer for rung in ladder(settings_for())} == {"adamw"}


@pytest.mark.parametrize(("on_cpu", "packed"), [(True, [True, False]), (False, [True])])
def test_saving_begins_with_packed_weights_on_a_cpu_which_alone_has_them(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, packed: list[bool]
) -> None:
    monkeypatch.setattr(plan, "on_cpu", lambda settings: on_cpu)
    first, *others = ladder(settings_for())
    assert [first.pack_weights, *dict.fromkeys(rung.pack_weights for rung in others)] == [True, packed[-1]]


def test_the_chosen_plan_is_what_is_trained_and_what_the_command_line_would_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "shown", lambda settings, console: Machine(0.02))
    settings = settings_for()
    fitted = fit(settings, "9GB")
    rows = tuple(search(settings, 9_000 * MB, FREE_BYTES, Machine(0.02)))
    chosen = choose(rows, 9_000 * MB)
    assert chosen is not None
    assert fitted != settings
    assert plan_of(fitted) == replace(chosen.plan, base_weights="auto")
    sets = re.findall(r"--set (\S+)", describe(Found(settings, 9_000 * MB, rows)))
    from bridle import config

    assert config.read(RunSettings, None, ["data.folder='.'", "train.batch=16", *sets]) == fitted


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("900mb", 900 * 10**6), ("900MiB", 900 * 2**20)],
)
def test_memory_is_read_with_its_unit(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["8", "8G", "GB", "-8GB", "8GB8", ""])
def test_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"memory is {text!r}; expected a number with its unit, such as 8GB"):
        parse_memory(text)


def test_a_process_is_ended_soon_after_it_takes_more_than_it_may() -> None:
    code = "import time; block = bytearray(500 * 10**6); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], text=True) as process:
        peak_bytes = watch(process, 200 * MB)
    assert process.returncode != 0
    assert peak_bytes > 200 * MB


@pytest.fixture
def measured_phases(settings: RunSettings) -> Callable[..., float | None]:
    """Seconds per pair in a phase, measured in this process."""

    def measure(phase: str, **train: object) -> float | None:
        changed = replace(settings, train=replace(settings.train, batch=2, accumulate=2, **train))
        found = worker.measure(changed, phase, FREE_BYTES)
        assert abs(found["peak_memory_bytes"] - (peak_resident_bytes("self") or 0)) < 50 * MB
        return found["time_per_sample_s"]

    return measure


@pytest.mark.parametrize(
    ("phase", "train", "switches"),
    [
        ("connected", {}, []),
        ("middle", {"regime": "small"}, []),
        ("connected", {"regime": "auto"}, ["connected"]),
        ("unlocked", {"regime": "auto", "unlock": "all"}, ["connected", "unlocked"]),
    ],
)
def test_a_phase_is_measured_after_those_before_it(
    measured_phases: Callable[..., float | None],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    train: dict[str, object],
    switches: list[str],
) -> None:
    seen: list[str] = []
    switch = Trainer.switch
    monkeypatch.setattr(Trainer, "switch", lambda self, to, step: (seen.append(to), switch(self, to, step)))
    assert (measured_phases(phase, **train) or 0) > 0
    assert seen == switches


def test_a_trainer_that_would_halve_its_batch_does_not_fit(
    measured_phases: Callable[..., float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(Trainer, "losses", fail)
    assert measured_phases("connected") is None


def test_a_plan_is_measured_in_a_process_of_its_own(settings: RunSettings) -> None:
    ballast = bytearray(2**31)  # two GiB that are not the worker's
    row = measure_plan(settings, PLAN, FREE_BYTES)
    assert row.fits(len(ballast))
    assert 200 * MB < row.peak_memory_bytes < len(ballast)


@pytest.mark.slow
def test_plans_of_a_base_are_measured_shown_and_chosen(settings: RunSettings) -> None:
    found = plan_run(settings, "64GB")
    assert found.chosen is not None
    assert found.middle is not None
    summary = json.loads(json.dumps(found.summary))
    assert summary["chosen"] | {"fits": True} in summary["plans"]
    assert summary["middle"]["plan"] == summary["chosen"]["plan"] | {"phase": "middle"}
    assert f"{SIZE_PX} px" in found.lines[0]
    stopped = measure_plan(settings, PLAN, 150 * MB)
    assert stopped.time_per_sample_s is None
    assert stopped.peak_memory_bytes > 150 * MB


@pytest.mark.slow
def test_what_is_wrong_with_the_base_is_said_in_one_line(settings: RunSettings) -> None:
    with pytest.raises(TrainError, match=r"could not be measured: base 'nowhere' was not found"):
        measure_plan(replace(settings, base="nowhere"), PLAN, FREE_BYTES)
    with pytest.raises(BaseError):
        worker.measure(replace(settings, base="nowhere"), "connected", FREE_BYTES)


def test_where_float32_is_faster_the_base_stays_in_it(fastest: list[str]) -> None:
    """But for the last rung: better slow than not at all."""
    fastest[:] = ["fp32"]
    *before, last = ladder(settings_for())
    assert {rung.base_weights for rung in before} == {"fp32"}
    assert last == replace(before[-1], base_weights="bf16")
    assert {rung.base_weights for rung in ladder(settings_for(precision="fp32"))} == {"fp32"}


def test_what_is_measured_ends_for_want_of_memory_alone() -> None:
    worker.stop("kernels", "no C compiler")
    with pytest.raises(worker.OutOfMemoryError):
        worker.stop("memory", "no room")
