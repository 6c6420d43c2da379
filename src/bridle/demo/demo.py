"""`bridle demo`: teach the embedded base to follow edges, and measure that it does.

The pictures beside this file were drawn by the embedded base itself; `--data` puts a folder of your own in their place.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from bridle.atomic import write_with
from bridle.base.base import Base
from bridle.control.control import Control
from bridle.data.settings import DataSettings
from bridle.evaluate import sentence
from bridle.evaluate.evaluate import HeldOutPair
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.train.settings import TrainSettings

PAIRS = Path(__file__).parent / "pairs"
HELD_OUT = 12
COLOURS = ("red", "yellow", "green", "blue")
NAMED = {*COLOURS, "orange", "purple", "pink", "brown", "black", "white", "grey"}
SHOWN = 4  # hints on the sheet of colours


@dataclass(frozen=True)
class DemoResult:
    """What the demo leaves behind."""

    sentence: str
    report: Path
    sheet: Path
    colours: Path | None
    summary: dict[str, Any]


def settings_for(folder: Path) -> RunSettings:
    """A short run for a small base: a learning rate far above the paper's, and averaged weights."""
    steps = 600
    return RunSettings(
        data=DataSettings(folder=folder, annotator="canny", held_out=HELD_OUT, variants=2),
        train=TrainSettings(
            steps=steps,
            batch=24,
            lr=1e-3,
            warmup=30,
            decay=0.4,
            ema_decay=0.98,
            weighting="balanced",
            checkpoint_every=100,
            preview_every=steps,
        ),
        sample=SampleSettings(steps=15, guidance=3.0, batch=HELD_OUT, precision="bf16"),
    )


def run_demo(data: Path | None, out: Path) -> DemoResult:
    """Train, measure, report. Called again, it goes on where it was stopped.

    Args:
        data: a folder of captioned pictures; the package's own where None.
        out: the run's folder.
    """
    console, started = Console(stderr=True), time.monotonic()
    settings = settings_for(data or PAIRS)
    console.print(f"Teaching the embedded base to follow edges, on the pictures in {settings.data.folder}")
    run = train_run(settings, out, console)
    if not run.outcome.finished:
        raise SystemExit(f"Stopped at step {run.outcome.step}; the same command goes on.")
    facts = {"Training time": minutes(run.time_s), "Time so far": minutes(time.monotonic() - started)}
    measured = evaluate_run(out, seeds=1, base=run.base, data=run.data, extra_facts=facts, console=console)
    colours = write_colours(run.base, run.outcome.control, out, run.data.held_out(), settings.sample)
    figures = measured.evaluation.headline
    summary = {
        "sentence": sentence(measured.evaluation),
        "f1_with_control": figures.control.mean,
        "f1_without_control": figures.without.mean,
        "f1_ceiling": figures.ceiling.mean,
        "time_s": round(time.monotonic() - started, 1),
        "report": str(measured.report),
    }
    return DemoResult(summary["sentence"], measured.report, measured.sheet, colours, summary)


def recolour(caption: str) -> list[str]:
    """The same caption in four colours; empty where it names no colour."""
    words = caption.split()
    named = [place for place, word in enumerate(words) if word in NAMED]
    if not named:
        return []
    captions = [" ".join([*words[: named[0]], colour, *words[named[0] + 1 :]]) for colour in COLOURS]
    return [re.sub(r"\ban? (?=\w)", "a ", caption, count=1) for caption in captions]


def write_colours(
    base: Base, control: Control, folder: Path, pairs: list[HeldOutPair], how: SampleSettings
) -> Path | None:
    """One hint, four prompts: the shape is the hint's, colour the prompt's. None where no caption names a colour."""
    rows, captions = [], []
    for pair in [pair for pair in pairs if recolour(pair.caption)][:SHOWN]:
        prompts = recolour(pair.caption)
        drawn = generate(base, control, [pair.hint] * len(prompts), prompts, [0] * len(prompts), how)
        rows.append([pair.hint, *drawn])
        captions.append(", ".join(prompts))
    if not rows:
        return None
    sheet, path = Image.fromarray(grid(rows, ["hint", *COLOURS], captions)), folder / "evaluation" / "colours.png"
    write_with(path, lambda temporary: sheet.save(temporary, "PNG"))
    return path


def minutes(time_s: float) -> str:
    return f"{time_s / 60:.1f} minutes"
