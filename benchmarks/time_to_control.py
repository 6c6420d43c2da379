"""How long until the control works: diffusers' and the paper's recipes against Bridle's, on the same pairs.

    python benchmarks/time_to_control.py bridle paper peer --seeds 0 1 2
    python benchmarks/time_to_control.py brief --steps 160 --seeds 0 1 2
    python benchmarks/time_to_control.py --plot docs/images/time-to-control.png
    python benchmarks/time_to_control.py --draw --inception default_1.pt

Edges on the embedded base and the package's scenes; probed on 24 held-out pairs of objects that training never shows.
"peer" is what diffusers' script does: the released code's start, every noise level alike, no averaged weights. "paper"
is that with the demo's weighting of the loss and averaging, "bridle" has the demo's start as well (`train.recipe`), and
"brief" is that for somebody in a hurry: the learning rate falls to zero over the second half of few steps.
Learning rate, batch and pairs are the same for all, and all are run by Bridle's own step, so that only the recipes are
compared; `step.py` compares the steps. The moment is the first probe that reaches 90% of the hint advantage that the
best run of all ends with, counted in steps and in CPU seconds of training. Run again, a command goes on. What the runs
end with is also drawn: the held-out pairs, and how they obey (edge F1) and look (KID to pictures of the data set).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from speeds import distance_to, draw

from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.control.unet import UNetControl
from bridle.data.scenes import write_scenes
from bridle.data.settings import DataSettings
from bridle.files.weights import load_control, save_control
from bridle.run.pairs import load_data
from bridle.sample.settings import SampleSettings
from bridle.train.hint_start import first_hints, scale_hint_encoder
from bridle.train.log import read_rows
from bridle.train.loop import Hands, train
from bridle.train.settings import ProbeSettings, TrainSettings

EVERY = 25
ENOUGH = 0.9  # of the advantage that long training reaches
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bridle": ("#0b66c3", {"recipe": "scaled", "weighting": "balanced", "ema_decay": 0.98}),
    "brief": ("#15803d", {"recipe": "scaled", "weighting": "balanced", "ema_decay": 0.98, "decay": 0.5}),
    "paper": ("#c2410c", {"recipe": "paper", "weighting": "balanced", "ema_decay": 0.98}),
    "peer": ("#8a8f98", {"recipe": "paper", "weighting": "uniform", "ema_decay": 0.0}),
}


def run(recipe: str, seed: int, steps: int, out: Path) -> None:
    """One training; `probes.jsonl` has its advantage, `cpu_s.jsonl` what each step took."""
    folder, base, scenes = out / f"{recipe}-{seed}", load_base(), write_scenes(out / "scenes").folder
    started, encoding = time.process_time(), out / "encoding.json"
    data = load_data(DataSettings(folder=scenes, annotator="canny", held_out=24, variants=1), base, out / "data")
    if not encoding.exists():
        took = {"pairs": len(data.cache.train_ids), "cpu_s": time.process_time() - started}
        encoding.write_text(json.dumps(took))
    how = {"steps": steps, "batch": 24, "lr": 1e-3, "warmup": 30, "seed": seed}
    settings = TrainSettings(**how | {"checkpoint_every": 100} | RECIPES[recipe][1])
    torch.manual_seed(seed)
    control = Control.from_base(base.pipeline)
    clock = folder / "cpu_s.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not clock.exists():
        started = time.process_time()
        if settings.recipe == "scaled":
            scale_hint_encoder(cast(UNetControl, control), first_hints(data.cache), seed)
        clock.write_text(json.dumps({"step": 0, "cpu_s": time.process_time() - started}) + "\n")
    before = time.process_time()

    def progress(step: int, row: dict[str, float] | None) -> None:
        nonlocal before
        with clock.open("a") as file:
            file.write(json.dumps({"step": step, "cpu_s": time.process_time() - before}) + "\n")
        before = time.process_time()

    hands = Hands(
        save=lambda control, step: save_control(control, folder / "control", {"steps": step}),
        progress=progress,
        say=lambda message: print(f"{recipe} {seed}: {message}", flush=True),
    )
    probing = ProbeSettings(every=EVERY, pairs=24, samples=0)
    train(control, base.denoiser, base.schedule, data.cache, settings, folder, hands, probing=probing)


def curves(out: Path) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """By recipe and seed: the advantage at each probe's step."""
    found: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for recipe in RECIPES:
        for folder in sorted(out.glob(f"{recipe}-*")):
            rows = [(row["step"], row["advantage"]["mean"]) for row in read_rows(folder / "probes.jsonl")]
            found.setdefault(recipe, {})[int(folder.name.rpartition("-")[2])] = rows
    return found


def moment(rows: list[tuple[int, float]], wanted: float) -> int | None:
    """The first probe's step with that advantage; None where there was none."""
    return next((step for step, advantage in rows if advantage >= wanted), None)


def cpu_s_until(folder: Path, step: int) -> float:
    """Of training up to a step. A probe falls to the step after it, so every step counts as the median one."""
    rows = read_rows(folder / "cpu_s.jsonl")
    a_step = statistics.median(row["cpu_s"] for row in rows if row["step"] > 0)
    return sum(row["cpu_s"] for row in rows if row["step"] == 0) + a_step * step


def summary(out: Path) -> dict[str, Any]:
    found = curves(out)
    best = max(rows[-1][1] for seeds in found.values() for rows in seeds.values())
    result: dict[str, Any] = {"long_training": best, "wanted": ENOUGH * best}
    # Once per data set, and not in the times below; the peer's script encodes in every step.
    result["encoding"] = json.loads((out / "encoding.json").read_text())
    for recipe, seeds in found.items():
        steps = {seed: moment(rows, ENOUGH * best) for seed, rows in seeds.items()}
        cpu_s = {s: cpu_s_until(out / f"{recipe}-{s}", step) for s, step in steps.items() if step is not None}
        result[recipe] = {
            "steps": steps,
            "cpu_s": cpu_s,
            "final": {seed: rows[-1] for seed, rows in seeds.items()},
        }
    return result


def drawn(out: Path, inception: Path | None) -> dict[str, Any]:
    """By recipe and seed: what the control that a run ended with draws of the held-out pairs, with two seeds each."""
    base, scenes = load_base(), write_scenes(out / "scenes").folder
    data = DataSettings(folder=scenes, annotator="canny", held_out=24, variants=1)
    pairs = load_data(data, base, out / "data").held_out()
    far = distance_to(scenes / "pictures", inception) if inception else None
    how = SampleSettings(steps=20, guidance=3.0, batch=12, precision="bf16")
    controls = {folder.name: folder / "control" for recipe in RECIPES for folder in sorted(out.glob(f"{recipe}-*"))}
    result: dict[str, Any] = {}
    for name, path in {"none": None, **controls}.items():
        found = draw(base, load_control(path) if path else None, pairs, [0, 1], how)
        error = found.obedience.std(ddof=1) / len(found.obedience) ** 0.5
        result[name] = {"f1": float(found.obedience.mean()), "error": float(error)}
        if far:
            result[name]["kid"] = far(found.pictures)
        print(name, result[name], flush=True)
    return result


def plot(out: Path, path: Path) -> None:
    """Advantage over steps; a line a seed."""
    figure = Figure(figsize=(9, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for recipe, seeds in curves(out).items():
        for number, rows in enumerate(seeds.values()):
            steps, advantages = zip(*rows, strict=True)
            label = recipe if number == 0 else None
            axes.plot(steps, advantages, color=RECIPES[recipe][0], marker="o", markersize=3, label=label)
    wanted = summary(out)["wanted"]
    label = "90% of what long training reaches"
    axes.axhline(wanted, color="#44403c", linewidth=1, linestyle="--", label=label)
    axes.set_title("Hint advantage on held-out objects", loc="left", fontsize=10)
    axes.set_xlabel("step of 24 pairs")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#ececea")
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("work/time-to-control"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--draw", action="store_true", help="what the runs ended with")
    parser.add_argument("--inception", type=Path, help="for KID; see benchmarks/speeds.py")
    given = parser.parse_args()
    for recipe in given.recipes:
        for seed in given.seeds:
            run(recipe, seed, given.steps, given.out)
    print(json.dumps(summary(given.out), indent=1))
    if given.plot:
        plot(given.out, given.plot)
    if given.draw:
        (given.out / "drawn.json").write_text(json.dumps(drawn(given.out, given.inception), indent=1))


if __name__ == "__main__":
    main()
