"""`bridle train`: settings in, a trained control in the run's folder out. The same call goes on with a stopped run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bridle.atomic import write_with
from bridle.base.load import Base, load_base
from bridle.control.unet import Control
from bridle.evaluate.evaluate import HeldOutPair, as_picture
from bridle.files.weights import save_control
from bridle.run.pairs import RunData, load_data
from bridle.run.settings import RunSettings, check_run, open_run
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.train.loop import Outcome, train
from bridle.train.loop import Progress as OnStep

PREVIEW_PAIRS = 4
PREVIEW_SEEDS = (0, 1)


@dataclass(frozen=True)
class TrainedRun:
    """A run after training: where it ended, and what is still at hand for measuring."""

    folder: Path
    outcome: Outcome
    base: Base
    data: RunData
    time_s: float


def train_run(settings: RunSettings, folder: Path, console: Console | None = None) -> TrainedRun:
    """Train a control, or go on with the run in `folder`.

    Writes `settings.toml`, `cache/`, `checkpoints/`, `metrics.jsonl`, `previews/` and `control/`.

    Raises: BridleError: anything the user can put right, before training starts where possible.
    """
    console = console or Console(stderr=True)
    check_run(folder, settings)
    base = load_base(settings.base, device=settings.device)
    data = load_data(settings.data, base, folder)
    open_run(folder, settings)
    control = new_control(settings, base, data)
    started = time.monotonic()
    with progress_bar(console) as bar:
        outcome = train(
            control,
            base.unet,
            base.schedule,
            data.cache,
            settings.train,
            folder,
            save=lambda control, step: save_control(control, folder / "control", facts(settings, base, data, step)),
            preview=previewer(base, data.held_out(PREVIEW_PAIRS), settings, folder / "previews"),
            progress=shower(bar, settings.train.steps),
        )
    return TrainedRun(folder, outcome, base, data, time.monotonic() - started)


def new_control(settings: RunSettings, base: Base, data: RunData) -> Control:
    """An untrained control for the hints of this data set; the hint encoder's weights are drawn from the seed."""
    channels = data.cache.batch(data.cache.train_ids[:1]).hint.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        return Control.from_base(
            base.unet,
            hint_channels=channels,
            hint_encoder=settings.control.hint_encoder,
            links=settings.control.links,
            size_factor=base.size_factor,
        )


def facts(settings: RunSettings, base: Base, data: RunData, step: int) -> dict[str, Any]:
    """What a control file says about its making."""
    train = settings.train
    return {
        "base": base.name,
        "hint": data.cache.annotator,
        "size_px": settings.data.size_px,
        "pairs": len(data.cache.train_ids),
        "steps": step,
        "effective_batch": train.effective_batch,
        "lr": train.lr,
        "weighting": train.weighting,
    }


def previewer(
    base: Base, pairs: list[HeldOutPair], settings: RunSettings, folder: Path
) -> Callable[[Control, int], None] | None:
    """Draws the same held-out pairs each time, so that two previews differ by nothing but training."""
    if not pairs:
        return None
    hints, captions = [pair.hint for pair in pairs], [pair.caption for pair in pairs]
    without: list[np.ndarray] = []

    def draw(control: Control | None, seed: int) -> list[np.ndarray]:
        return generate(base, control, hints, captions, [seed] * len(pairs), settings.sample)

    def preview(control: Control, step: int) -> None:
        if not without:
            without.extend(draw(None, PREVIEW_SEEDS[0]))
        drawn = [draw(control, seed) for seed in PREVIEW_SEEDS]
        columns = ["hint", "target", *(f"seed {seed}" for seed in PREVIEW_SEEDS), "without control"]
        rows = [
            [as_picture(pair.hint), pair.image, *(images[row] for images in drawn), without[row]]
            for row, pair in enumerate(pairs)
        ]
        sheet = Image.fromarray(grid(rows, columns, captions))
        write_with(folder / f"step-{step:08}.png", lambda path: sheet.save(path, "PNG"))

    return preview


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def shower(bar: Progress, steps: int) -> OnStep:
    task = bar.add_task("training", total=steps, figures="")

    def show(step: int, row: dict[str, float] | None) -> None:
        if row is not None:
            bar.update(task, figures=f"loss {row['loss']:.4f}, {row['samples_per_s']:.1f} samples/s")
        bar.update(task, completed=step)

    return show
