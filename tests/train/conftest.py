"""A cache of eight small pictures encoded with the tiny base, and runs on it."""

import hashlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from bridle.base.base import Base
from bridle.cache.build import build_cache
from bridle.cache.store import Cache
from bridle.control.control import Control
from bridle.data.annotate.canny import Canny
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.train import checkpoint
from bridle.train.loop import CHECKPOINTS, Hands, Outcome, train
from bridle.train.parallel import ALONE, World
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings


@pytest.fixture(scope="session")
def base() -> Base:
    return tiny.make_base()


@pytest.fixture(scope="session")
def cache(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(base, Path(tmp_path_factory.mktemp("pairs")), 32)


@pytest.fixture(scope="session")
def wide_cache(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Wide enough for bfloat16."""
    return make_cache(base, Path(tmp_path_factory.mktemp("wide")), 64)


def make_cache(base: Base, folder: Path, size_px: int) -> Cache:
    """Five pairs to train on, three held out."""
    for number in range(8):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[2 * number + 4 : 2 * number + 12, 8:24] = 20 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"bar {number}")
    settings = DataSettings(folder=folder, size_px=size_px, held_out=3)
    return build_cache(open_source(folder), settings, Canny(), base, folder / "cache")


@dataclass
class Run:
    """One run folder. Every start is a new process as far as training can tell: fresh models, fresh settings."""

    base: Base
    cache: Cache
    folder: Path
    values: dict[str, Any]
    saved: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    previewed: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    control: Control | None = None  # as trained, not averaged

    def start(
        self,
        stop_at: int | None = None,
        stop_in: str = "progress",
        control: dict[str, Any] | None = None,
        machine: MachineSettings = MachineSettings(),  # noqa: B008
        probing: ProbeSettings = ProbeSettings(every=2, pairs=3),  # noqa: B008
        world: World = ALONE,
        force: bool = False,
        base: Base | None = None,
        **changes: Any,
    ) -> Outcome:
        """Train; `stop_at`: the step at which a SIGTERM arrives, `stop_in` its progress, preview or save."""

        def arrive(where: str, step: int) -> None:
            if where == stop_in and step == stop_at:
                signal.raise_signal(signal.SIGTERM)

        def save(average: Control, step: int) -> None:
            self.saved.append(step)
            arrive("save", step)

        def preview(average: Control, step: int, check: Callable[[], None]) -> None:
            arrive("preview", step)
            check()
            self.previewed.append(step)

        torch.manual_seed(0)
        base = base or self.base
        self.control = Control.from_base(base.pipeline, **(control or {}))
        hands = Hands(
            save=save,
            save_best=lambda average, step: self.best.append(step),
            preview=preview,
            progress=lambda step, row: arrive("progress", step),
            say=self.said.append,
        )
        settings = TrainSettings(**(self.values | changes))
        return train(
            self.control,
            base.denoiser,
            base.schedule,
            self.cache,
            settings,
            self.folder,
            hands,
            probing=probing,
            machine=machine,
            world=world,
            force=force,
        )

    @property
    def newest(self) -> Path:
        found = checkpoint.newest(self.folder / CHECKPOINTS)
        assert found is not None
        return found

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Of the newest checkpoint; those whose names begin so, without it."""
        state = checkpoint.load(self.newest)
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def facts(self) -> dict[str, Any]:
        return checkpoint.read_facts(self.newest)

    def digest(self) -> str:
        """sha256 over everything the newest checkpoint holds: weights, averages, optimiser, probes, counters."""
        digest = hashlib.sha256(repr(self.facts()).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / CHECKPOINTS).iterdir())


StartRun = Callable[..., Run]


BASIC = {
    "steps": 6,
    "batch": 2,
    "accumulate": 2,
    "lr": 1e-3,
    "warmup": 2,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 2,
    "preview_every": 3,
}


@pytest.fixture
def new_run(base: Base, cache: Cache, tmp_path: Path) -> StartRun:
    """Runs of six steps of four pairs with a high learning rate, in float32, unless the test says otherwise."""
    return lambda name, **values: Run(base, cache, tmp_path / name, BASIC | values)


@pytest.fixture(scope="session")
def whole(base: Base, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Such a run, never stopped."""
    run = Run(base, cache, Path(tmp_path_factory.mktemp("whole")), BASIC)
    assert run.start().finished
    return run
