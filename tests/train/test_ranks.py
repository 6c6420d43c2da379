"""A run of several processes is the run that one process makes: through every phase, and taken over by any number."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_parallel import run_ranks

from bridle.cache.store import Cache
from bridle.control.unet import Control
from bridle.train import checkpoint, watch
from bridle.train.draws import ids_of_step
from bridle.train.log import read_rows
from bridle.train.loop import CHECKPOINTS, Hands, train
from bridle.train.parallel import World
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings
from bridle.train.trainer import Trainer

STEPS = 9
# Both switches of the regime, probes, previews and checkpoints at odd places.
VALUES: dict[str, Any] = {
    "steps": STEPS,
    "batch": 2,
    "accumulate": 2,
    "lr": 1e-3,
    "warmup": 2,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 4,
    "preview_every": 5,
    "regime": "auto",
    "unlock": "decoder",
    "unlock_lr": 1e-3,
}
KINDS = ("ddp", "fsdp")
Facts = dict[str, Any]


def go(world: World, pairs: Path, folder: Path, kind: Any, term: tuple[int, int] | None = None) -> Facts:
    """Train, or go on. Returns: what this rank did.

    Args:
        pairs: folder of the cache.
        term: rank and step at which a SIGTERM reaches that rank alone.
    """
    seen: Facts = {"save": [], "best": [], "preview": [], "ids": {}, "said": []}

    def progress(step: int, row: dict[str, float] | None) -> None:
        if term == (world.rank, step):
            signal.raise_signal(signal.SIGTERM)

    hands = Hands(
        save=lambda control, step: seen["save"].append(step),
        save_best=lambda control, step: seen["best"].append(step),
        preview=lambda control, step, check: seen["preview"].append(step),
        progress=progress,
        say=seen["said"].append,
    )
    base, cache, settings = tiny.make_base(), Cache.open(pairs), TrainSettings(**VALUES)
    torch.manual_seed(0)
    control = Control.from_base(base.pipeline)
    probing, machine = ProbeSettings(every=2, pairs=3), MachineSettings(parallel=kind)
    with pytest.MonkeyPatch.context() as patch:
        switch_when_told(patch)
        patch.setattr(Trainer, "step", noting(Trainer.step, seen["ids"]))
        models = control, base.unet, base.schedule
        outcome = train(*models, cache, settings, folder, hands, probing=probing, machine=machine, world=world)
    return seen | {"step": outcome.step, "finished": outcome.finished}


def switch_when_told(patch: pytest.MonkeyPatch) -> None:
    """The control counts as learned and settled after two probes, so that nine steps see all phases."""
    for name in ("learned", "settled"):
        patch.setattr(watch, name, lambda rows: len(rows) > 1)


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
    assert checkpoint.read_facts(path)["step"] == STEPS
    return checkpoint.load(path)


def figures(folder: Path) -> list[list[float]]:
    """Loss and gradient norm of every step, and what every probe measured."""
    steps = [[row["loss"], row["grad_norm"]] for row in read_rows(folder / "metrics.jsonl")]
    probes = [[row["advantage"]["mean"], *row["loss"].values()] for row in read_rows(folder / "probes.jsonl")]
    return [*steps, *probes]
