"""A run of several processes is the run that one process makes: through every phase, and taken over by any number."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_parallel import run_ranks

from bridle.cache.store import Cache
from bridle.control.control import Control
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.train import checkpoint, loop, watch
from bridle.train.draws import ids_of_step
from bridle.train.log import read_rows
from bridle.train.loop import CHECKPOINTS, Hands, train
from bridle.train.parallel import ALONE, World, full
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings
from bridle.train.trainer import Trainer

STEPS = 6
# All links join at step 1, the base at step 3; probes, previews and checkpoints at odd places.
VALUES: dict[str, Any] = {
    "steps": STEPS,
    "batch": 2,
    "accumulate": 2,
    "lr": 1e-4,  # AdamW makes a step of its length out of rounding, where gradients are next to nothing
    "warmup": 2,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 2,
    "preview_every": 5,
    "regime": "auto",
    "unlock": "decoder",
    "unlock_lr": 5e-5,
}
Facts = dict[str, Any]


def go(
    world: World,
    pairs: Path,
    folder: Path,
    kind: Any = "ddp",
    on_step: Callable[[World, int], None] = lambda world, step: None,
    **changes: Any,
) -> Facts:
    """Train, or go on. Returns: what this rank did.

    Args:
        pairs: folder of the cache.
        on_step: called after every step.
        changes: to the settings.
    """
    seen: Facts = {"save": [], "best": [], "preview": [], "ids": {}, "said": []}

    def preview(control: Control, step: int, check: Any) -> None:
        how = SampleSettings(steps=1, precision="fp32")
        generate(base, control, [tiny.make_hint(size_px=32)], ["a"], [0], how)  # sharded ones together
        seen["preview"].append(step)

    hands = Hands(
        save=lambda control, step: seen["save"].append(step),
        save_best=lambda control, step: seen["best"].append(step),
        preview=preview,
        progress=lambda step, row: on_step(world, step),
        say=seen["said"].append,
    )
    base, cache, settings = tiny.make_base(), Cache.open(pairs), TrainSettings(**VALUES | changes)
    torch.manual_seed(0)
    control = Control.from_base(base.pipeline)
    probing, machine = ProbeSettings(every=3, pairs=2), MachineSettings(parallel=kind)
    with pytest.MonkeyPatch.context() as patch:
        switch_when_told(patch)
        patch.setattr(Trainer, "step", noting(Trainer.step, seen["ids"]))
        models = control, base.denoiser, base.schedule
        outcome = train(*models, cache, settings, folder, hands, probing=probing, machine=machine, world=world)
    found = dict(tiny.make_base().denoiser.named_parameters())
    assert all(torch.equal(full(weight), found[name]) for name, weight in base.denoiser.named_parameters())
    return seen | {"step": outcome.step, "finished": outcome.finished}


def stop_last(at: int, world: World, step: int) -> None:
    """A SIGTERM reaches one rank alone, and not the one that writes."""
    if step == at and world.rank == world.size - 1:
        signal.raise_signal(signal.SIGTERM)


def switch_when_told(patch: pytest.MonkeyPatch) -> None:
    """The control counts as learned and settled at the first probe after a switch, so that few steps see all phases."""
    for name in ("learned", "settled"):
        patch.setattr(watch, name, lambda rows: bool(rows) and rows[-1]["step"] > 0)


def noting(real: Callable[..., Any], ids: dict[int, list[str]]) -> Callable[..., Any]:
    """`Trainer.step`, remembering what this rank trains on."""

    def step(self: Trainer, number: int, rows: Any, *rest: Any) -> Any:
        ids[number] = rows.ids
        return real(self, number, rows, *rest)

    return step


def alike(one: Path, other: Path, within: float = 1e-5) -> bool:
    """Whether two runs ended with the same state."""
    ours, theirs = (final(folder) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=0, atol=within) for name in ours)


def final(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.newest(folder / CHECKPOINTS)
    assert path is not None
    facts = checkpoint.read_facts(path)
    assert facts["step"] == STEPS
    assert facts["fits"] is None  # a rank's small share is no lack of memory, or who takes over would go on with it
    return checkpoint.load(path)


def figures(folder: Path) -> list[float]:
    """Loss and gradient norm of every step, and what every probe measured."""
    steps = [[row["loss"], row["grad_norm"]] for row in read_rows(folder / "metrics.jsonl")]
    probes = [[row["advantage"]["mean"], *row["loss"].values()] for row in read_rows(folder / "probes.jsonl")]
    assert (len(steps), len(probes)) == (STEPS, 3)
    return [figure for row in (*steps, *probes) for figure in row]


def phases(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["message"]) for row in read_rows(folder / "events.jsonl") if row["kind"] == "switch"]


@pytest.fixture(scope="module")
def alone(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    assert go(ALONE, cache.folder, folder)["finished"]
    assert len(phases(folder)) == 2
    return folder


def check_run(folder: Path, alone: Path) -> None:
    assert figures(folder) == pytest.approx(figures(alone), abs=1e-5)
    assert phases(folder)[0] == phases(alone)[0]
    assert [step for step, _ in phases(folder)] == [step for step, _ in phases(alone)]
    assert alike(folder, alone)


def check_callbacks(ranks: list[Facts], kind: str) -> None:
    """One process writes and speaks; sharded ones can only draw together."""
    main, *others = ranks
    assert all(main[what] for what in ("save", "best", "preview", "said"))
    for other in others:
        assert not any(other[what] for what in ("save", "best", "said"))
        assert other["preview"] == (main["preview"] if kind == "fsdp" else [])


def check_order(ranks: list[Facts], cache: Cache) -> None:
    """The shares of all ranks are together what one process would train on."""
    for step in ranks[0]["ids"]:
        ids = [id for rank in ranks for id in rank["ids"][step]]
        assert ids == ids_of_step(cache.train_ids, step, 4, seed=0)


def test_a_run_is_handed_from_ddp_to_fsdp_to_one_process(cache: Cache, alone: Path, tmp_path: Path) -> None:
    """Each time a SIGTERM reaches one process alone, and all stop at the same step."""
    for kind, stop_at in (("ddp", 3), ("fsdp", 5)):
        ranks = run_ranks(2, go, cache.folder, tmp_path, kind, partial(stop_last, stop_at))
        assert [(rank["step"], rank["finished"]) for rank in ranks] == [(stop_at, False)] * 2
        assert [rank["save"][-1:] for rank in ranks] == [[stop_at], []]
        check_order(ranks, cache)
    assert go(ALONE, cache.folder, tmp_path)["finished"]
    check_run(tmp_path, alone)


def go_undecided(world: World, pairs: Path, folder: Path) -> Facts:
    """On machines of which the first alone is faster in float32; in bfloat16 these pictures would be refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "choose_precision", lambda *_: "fp32" if world.main else "bf16")
        return go(world, pairs, folder, precision="auto")


def test_all_processes_compute_in_what_the_first_one_is_faster_in(cache: Cache, alone: Path, tmp_path: Path) -> None:
    assert all(rank["finished"] for rank in run_ranks(2, go_undecided, cache.folder, tmp_path))
    assert checkpoint.newest_precision(tmp_path / CHECKPOINTS) == "fp32"
    assert alike(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_make_the_run_that_one_makes(cache: Cache, alone: Path, tmp_path: Path, size: int, kind: str) -> None:
    ranks = run_ranks(size, go, cache.folder, tmp_path, kind)
    check_callbacks(ranks, kind)
    check_order(ranks, cache)
    check_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("after", [1, 4])
def test_any_number_takes_over_from_two(cache: Cache, alone: Path, tmp_path: Path, after: int, kind: str) -> None:
    """In the last phase, so that weights, averages and optimiser of all parts are handed over."""
    run_ranks(2, go, cache.folder, tmp_path, kind, partial(stop_last, 4))
    ranks = run_ranks(4, go, cache.folder, tmp_path, kind) if after == 4 else [go(ALONE, cache.folder, tmp_path, kind)]
    assert all(rank["finished"] for rank in ranks)
    check_run(tmp_path, alone)
