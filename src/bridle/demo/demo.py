"""`bridle demo`: teach the embedded base to follow edges, and measure that it does.

It trains on the scenes that the package carries, and measures on objects that these never show; `--data` puts a folder
of your own in their place.
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
from bridle.data.example import HELD_OUT as HELD_OUT_SPLIT
from bridle.data.scenes import write_scenes
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.data.words import counted
from bridle.errors import DataError
from bridle.evaluate import sentence
from bridle.evaluate.evaluate import HeldOutPair
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.train.settings import TrainSettings

HELD_OUT = 12
FEWEST = 4  # pairs; a standard error takes two that are held out
COLOURS = ("red", "yellow", "green", "blue")
NAMED = "red|orange|yellow|green|blue|turquoise|purple|pink|brown|beige|black|white|grey|golden|silver|copper"
COLOUR = re.compile(rf"\b(?:(?:light|dark) )?(?:{NAMED})(?= \w)")  # with a word after it: "an orange" is a fruit
MATERIAL = re.compile(r"\b(?:wooden|plastic|metal|leather|fabric|ceramic)(?= \w)")
PLACE = re.compile(r" (?:on|in front of) ")
SHOWN = 4  # hints on the sheet of colours


@dataclass(frozen=True)
class DemoResult:
    """What the demo leaves behind."""

    sentence: str
    report: Path
    sheet: Path
    colours: Path | None
    summary: dict[str, Any]


def settings_for(folder: Path, variants: int) -> RunSettings:
    """A short run for a small base: a learning rate far above the paper's, averaged weights, and guidance by the hint.

    Args:
        folder: the data set.
        variants: draws of each training pair that are encoded, at some 30 ms of one core each.
    """
    steps = 320
    return RunSettings(
        data=DataSettings(folder=folder, annotator="canny", held_out=count_held_out(folder), variants=variants),
        train=TrainSettings(
            steps=steps,
            batch=24,
            lr=1.5e-3,
            warmup=30,
            decay=0.4,
            ema_decay=0.98,
            weighting="balanced",
            checkpoint_every=100,
            preview_every=steps,
        ),
        sample=SampleSettings(steps=15, guidance=3.0, half="conditional", batch=HELD_OUT),
    )


def count_held_out(folder: Path) -> int:
    """As many pairs as are shown, but no more than half of what the folder has; its own, where it holds some out.

    Raises: DataError: there are too few to train on some and to measure on others.
    """
    records = open_source(folder).records
    if any(record.split == HELD_OUT_SPLIT for record in records):
        return HELD_OUT
    if len(records) < FEWEST:
        remedy = f"the demo trains on half and measures on half: give {FEWEST} or more"
        raise DataError(f"{folder} has {counted(len(records), 'pair')}; {remedy}")
    return min(HELD_OUT, len(records) // 2)


def run_demo(data: Path | None, out: Path) -> DemoResult:
    """Train, measure, report. Called again, it goes on where it was stopped.

    Args:
        data: a folder of captioned pictures; where None, the package's own, which are then written to `out`/scenes.
        out: the run's folder.
    """
    console, started = Console(stderr=True), time.monotonic()
    settings = settings_for(data, variants=2) if data else settings_for(write_scenes(out / "scenes").folder, variants=1)
    console.print(f"Teaching the embedded base to follow edges, on the pictures in {settings.data.folder}")
    run = train_run(settings, out, console)
    if not run.outcome.finished:
        raise SystemExit(f"Stopped at step {run.outcome.step}; the same command goes on.")
    facts = {"Training time": minutes(run.time_s), "Time so far": minutes(time.monotonic() - started)}
    measured = evaluate_run(out, seeds=1, base=run.base, data=run.data, extra_facts=facts, console=console)
    colours = write_colours(run.base, run.control, out, run.data.held_out(), settings.sample)
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
    """The same caption with its first thing in four colours; empty where it names neither its colour nor material.

    The colour goes in place of the first colour word before the caption says where the thing is, or else of the
    material: it is never the floor's or the wall's.
    """
    place = PLACE.search(caption)
    thing = caption[: place.start()] if place else caption
    found = COLOUR.search(thing) or MATERIAL.search(thing)
    if not found:
        return []
    before = re.sub(r"\ban $", "a ", thing[: found.start()])  # none of the colours begins with a vowel
    return [before + colour + caption[found.end() :] for colour in COLOURS]


def write_colours(
    base: Base, control: Control, folder: Path, pairs: list[HeldOutPair], how: SampleSettings
) -> Path | None:
    """One hint, four prompts: the shape is the hint's, colour the prompt's. None where no caption names one."""
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
