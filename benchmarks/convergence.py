"""When does the probe say "learned", and does it stay silent where there is nothing to learn?

    python benchmarks/convergence.py true --out work/convergence
    python benchmarks/convergence.py shuffled --out work/convergence
    python benchmarks/convergence.py --plot docs/images/convergence.png --out work/convergence

A control begins as `bridle train` has it begin. "true" trains on the demo's pairs, "shuffled" on the same with the
hints exchanged among the training pairs; both are probed on the same held-out pairs, with their own hints. Run again, a
command goes on.
"""

import argparse
import os
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from bridle.base.load import load_base
from bridle.cache.store import Cache, CachedBatch
from bridle.control.control import Control
from bridle.control.unet import UNetControl
from bridle.data.annotate import get_annotator
from bridle.data.scenes import write_scenes
from bridle.data.settings import DataSettings
from bridle.files.weights import save_control
from bridle.run.controllability import Controllability
from bridle.run.pairs import load_data
from bridle.sample.settings import SampleSettings
from bridle.train.draws import generator
from bridle.train.hint_start import first_hints, scale_hint_encoder
from bridle.train.log import read_rows
from bridle.train.loop import Hands, train
from bridle.train.settings import ProbeSettings, TrainSettings

STEPS, EVERY, DRAWN = 320, 20, 8
KINDS = {"true": "#0b66c3", "shuffled": "#8a8f98"}


class ShuffledHints(Cache):
    """A cache in which each training pair has the hint of another."""

    def batch(self, ids: list[str]) -> CachedBatch:
        own = super().batch(ids)
        order = torch.randperm(len(self.train_ids), generator=generator("shuffled hints")).tolist()
        other = dict(zip(self.train_ids, (self.train_ids[place] for place in order), strict=True))
        hint = super().batch([other.get(id, id) for id in ids]).kept_hint
        return CachedBatch(mean=own.mean, std=own.std, kept_hint=hint, captions=own.captions, text=own.text)


def run(kind: str, out: Path) -> None:
    base, sample = load_base(), SampleSettings(steps=10, guidance=3.0, batch=DRAWN, precision="bf16")
    scenes = write_scenes(out / "scenes").folder
    data = load_data(
        DataSettings(folder=scenes, annotator="canny", held_out=32, variants=2), base, out / f"data-{kind}"
    )
    cache = data.cache if kind == "true" else ShuffledHints.open(data.cache.folder)
    folder, console = out / kind, Console()
    torch.manual_seed(0)
    control = Control.from_base(base.denoiser)
    scale_hint_encoder(cast(UNetControl, control), first_hints(cache), seed=0)
    annotator = get_annotator("canny")
    hands = Hands(
        save=lambda control, step: save_control(control, folder / "control", {"steps": step}),
        measure=Controllability(base, data.held_out(), annotator, sample, samples=DRAWN, steps=10),
        progress=lambda step, row: console.print(step, row) if row else None,
        say=console.print,
    )
    settings = TrainSettings(
        steps=STEPS, batch=24, lr=1e-3, warmup=30, ema_decay=0.98, weighting="balanced", checkpoint_every=80
    )
    probing = ProbeSettings(every=EVERY, samples=DRAWN)
    train(control, base.denoiser, base.schedule, cache, settings, folder, hands, probing=probing)


def plot(out: Path, path: Path) -> None:
    """Both runs over the steps: pictures, probe, and the loss that shows neither."""
    figure = Figure(figsize=(9, 7.2), dpi=130, layout="constrained")
    drawn, advantage, loss = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    for kind, colour in KINDS.items():
        probes, metrics = read_rows(out / kind / "probes.jsonl"), read_rows(out / kind / "metrics.jsonl")
        steps = [row["step"] for row in probes]
        for axes, figures in (
            (drawn, [row["controllability"]["gain"] for row in probes]),
            (advantage, [row["advantage"] for row in probes]),
        ):
            means, errors = [value["mean"] for value in figures], [value["error"] for value in figures]
            axes.plot(steps, means, color=colour, marker="o", markersize=4, label=f"{kind} hints")
            low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        loss.plot([row["step"] for row in metrics], [row["loss"] for row in metrics], color=colour)
        for step in (row["step"] for row in read_rows(out / kind / "events.jsonl") if row["kind"] == "learned"):
            for axes in (drawn, advantage, loss):
                axes.axvline(step, color=colour, linewidth=1, linestyle="--")
            drawn.annotate(
                f'"control learned\nat step {step}"',
                xy=(step, 0.95),
                xycoords=("data", "axes fraction"),
                xytext=(6, 0),
                textcoords="offset points",
                va="top",
            )
    drawn.set_title(f"Edge F1 gained over no control, {DRAWN} held-out pairs", loc="left", fontsize=10)
    advantage.set_title("Hint advantage on 16 held-out pairs", loc="left", fontsize=10)
    loss.set_title("Training loss", loc="left", fontsize=10)
    loss.set_xlabel("step")
    drawn.legend(loc="center right", frameon=False)
    for axes in (drawn, advantage, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#ececea")
        axes.set_axisbelow(True)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("--out", type=Path, default=Path("work/convergence"))
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.kind:
        run(given.kind, given.out)
    if given.plot:
        plot(given.out, given.plot)


if __name__ == "__main__":
    main()
