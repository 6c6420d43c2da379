"""`bridle evaluate`: a run in; figures, a report page and a picture sheet out."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.data.annotate import get_annotator
from bridle.errors import DataError
from bridle.evaluate import Evaluation, Generate, evaluate, write_report, write_sheet
from bridle.files.weights import load_control, read_metadata
from bridle.kernels.precision import TYPES, choose_precision
from bridle.run.pairs import RunData, load_data
from bridle.run.settings import FILE, RunSettings, read_run
from bridle.sample.sampler import generate, reconstruct
from bridle.sample.settings import SampleSettings


@dataclass(frozen=True)
class Measured:
    """Where the figures are."""

    evaluation: Evaluation
    report: Path
    sheet: Path


def evaluate_run(
    folder: Path,
    *,
    pairs: int | None = None,
    seeds: int = 2,
    sample: SampleSettings | None = None,
    device: str | None = None,
    base: Base | None = None,
    data: RunData | None = None,
    extra_facts: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Measured:
    """Measure the control of a run on its held-out pairs.

    Args:
        folder: the run's; the result goes to `evaluation/` in it.
        pairs: how many held-out pairs; all of them where None.
        seeds: pictures per pair.
        sample: how to sample; as the run's settings say where None.
        device: as `load_base` takes it; as the run's settings say where None.
        base, data: where they are still in memory; loaded where None.
        extra_facts: further rows for the report's last table.

    Raises: DataError: the run holds out no pairs, or its data set is no longer there.
    """
    console = console or Console(stderr=True)
    settings = read_run(folder)
    if data is None and not settings.data.folder.is_dir():
        remedy = f"put it back, or set data.folder in {folder / FILE} to where it is now"
        raise DataError(f"data folder {settings.data.folder} of this run does not exist: {remedy}")
    given, base = base, base or load_base(settings.base, device=device or settings.device)
    data = data or load_data(settings.data, base, folder)
    how = sample or settings.sample
    precision = choose_precision(how.precision, base.device, base.denoiser.dtype)
    how = replace(how, precision=precision)
    control = load_control(folder / "control", device=str(base.device))
    free = given is None and settings.machine.base_weights != "fp32"
    kind = TYPES[precision]
    # What an unlocked base has learned would be lost in 16 bits.
    if free and not control.base_delta and kind is not torch.float32:
        base.halve(kind)
    control.to(dtype=base.denoiser.dtype)
    if data.cache.annotator == "files":
        console.print(f"hints are files: what pictures show is read by {settings.data.annotator!r} (data.annotator)")
    held_out = data.held_out(pairs)
    if not held_out:
        raise DataError("the run holds out no pairs to measure on; train with data.held_out of 5 or more")
    with Progress(console=console) as bar:
        task = bar.add_task("drawing held-out pairs", total=2 * seeds * len(held_out))
        evaluation = evaluate(
            held_out,
            get_annotator(settings.data.annotator),
            generator(base, control, how, lambda count: bar.advance(task, count)),
            lambda images: reconstruct(base, images),
            folder / "evaluation",
            range(seeds),
            scale=how.scale,
            settings=dataclasses.asdict(how),
        )
    facts = report_facts(settings, folder, base.device) | dict(extra_facts or {})
    report = write_report(evaluation, evaluation.folder, folder.resolve().name, facts)
    return Measured(evaluation, report, write_sheet(evaluation, evaluation.folder / "sheet.png"))


def generator(base: Base, control: Control, how: SampleSettings, advance: Callable[[int], None]) -> Generate:
    """What `evaluate` draws with: a batch at a time, so that progress shows."""

    def draw(hints: list[np.ndarray], captions: list[str], seeds: list[int], scale: float) -> list[np.ndarray]:
        images: list[np.ndarray] = []
        for start in range(0, len(captions), how.batch):
            rows = slice(start, start + how.batch)
            scaled = replace(how, scale=scale)
            images += generate(base, control, hints[rows], captions[rows], seeds[rows], scaled)
            advance(len(images) - start)
        return images

    return draw


def report_facts(settings: RunSettings, folder: Path, device: torch.device) -> dict[str, str]:
    """The report's last table: how the control was trained, and on what."""
    made = read_metadata(folder / "control")
    return {
        "Base": settings.base,
        "Data": str(settings.data.folder),
        "Hint": str(made.get("hint", "")),
        "Training pairs": str(made.get("pairs", "")),
        "Steps": f"{made.get('steps', '')} of {made.get('effective_batch', '')} pairs",
        "Learning rate": str(made.get("lr", "")),
        "Links": str(made.get("links", "")),
        "Processor": f"{os.cpu_count()} cores" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }
