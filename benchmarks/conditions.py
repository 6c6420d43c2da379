"""A control for each condition on the embedded base: depth, normals, segmentation, canny, scribble.

Trains each on the scenes that the package carries and measures it on objects that these never show, by the condition's
own figure: without the control, with it, and at the ceiling (the target after a trip through the autoencoder). Out:
`<out>/<condition>/`, a run as `bridle train` leaves it; `conditions.json`, `conditions.md`, and `conditions.png`: one
hint of each kind, four prompts. The same command goes on where it was stopped.

    python benchmarks/conditions.py --out work/conditions
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from bridle.atomic import write_text, write_with
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.data.scenes import write_scenes
from bridle.demo.demo import COLOUR, MATERIAL, PLACE
from bridle.demo.demo import settings_for as demo_settings
from bridle.evaluate.evaluate import HeldOutPair, as_picture
from bridle.files.weights import load_control
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.run.pairs import open_data
from bridle.run.settings import read_run
from bridle.sample.picture import grid
from bridle.sample.sampler import generate

CONDITIONS = ("depth", "normals", "segmentation", "canny", "scribble")
PROMPTS = (
    "a red leather {} on a wooden floor",
    "a wooden {} on a green floor in front of a white wall",
    "a blue {} on a yellow floor",
    "a black {} on a white floor in front of a red wall",
)


def settings_for(scenes: Path, condition: str, steps: int, held_out: int) -> RunSettings:
    """The demo's recipe, for any condition."""
    demo = demo_settings(scenes, variants=1)
    return dataclasses.replace(
        demo,
        data=dataclasses.replace(demo.data, annotator=condition, held_out=held_out),
        train=dataclasses.replace(demo.train, steps=steps, preview_every=steps),
    )


def measure(condition: str, scenes: Path, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, or go on, and measure. Returns: one row of the table."""
    folder = args.out / condition
    run = train_run(settings_for(scenes, condition, args.steps, args.held_out), folder, console)
    if not run.outcome.finished:
        raise SystemExit(f"{condition} stopped at step {run.outcome.step}; the same command goes on.")
    found = evaluate_run(folder, seeds=args.seeds, base=run.base, data=run.data, console=console).evaluation
    return {
        "condition": condition,
        "pairs": len(found.pairs),
        "seeds": len(found.seeds),
        "steps": args.steps,
        "train_s": round(run.time_s, 1),
        "headline": found.measure,
        "figures": {name: dataclasses.asdict(figures) for name, figures in found.figures.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a condition and figure; the one that decides comes first."""
    lines = ["| condition | figure | without control | with control | ceiling | reached |", "|---|---|---|---|---|---|"]
    for row in rows:
        for name, figures in row["figures"].items():
            means = [
                f"{figures[arm]['mean']:.3g} ± {figures[arm]['error']:.2g}" for arm in ("without", "control", "ceiling")
            ]
            reached = "" if figures["reached"] is None else f"{figures['reached']:.0%}"
            lines.append(f"| {row['condition']} | {name} | {' | '.join(means)} | {reached} |")
    return "\n".join(lines) + "\n"


def name_of(caption: str) -> str:
    """The thing without colour and material: "a red leather armchair on a floor" is an "armchair"."""
    place = PLACE.search(caption)
    thing = re.sub(r"^an? ", "", caption[: place.start()] if place else caption)
    return MATERIAL.sub("", COLOUR.sub("", thing)).strip().replace("  ", " ")


def one_hint_four_prompts(base: Base, folder: Path, pick: str) -> tuple[list[np.ndarray], str]:
    """The first held-out hint whose caption says `pick`, under four prompts. Returns: pictures and their name."""
    settings = read_run(folder)
    pairs = open_data(settings.data, folder).held_out()
    pair: HeldOutPair = next((p for p in pairs if pick in p.caption), pairs[0])
    prompts = [prompt.format(name_of(pair.caption)) for prompt in PROMPTS]
    control = load_control(folder / "control")
    drawn = generate(base, control, [pair.hint] * len(prompts), prompts, [0] * len(prompts), settings.sample)
    return [as_picture(pair.hint), *drawn], f"{folder.name}: {name_of(pair.caption)}"


def main(args: argparse.Namespace) -> None:
    console, path = Console(stderr=True), args.out / "conditions.json"
    scenes = write_scenes(args.out / "scenes").folder
    for condition in args.conditions:
        row = measure(condition, scenes, args, console)
        write_text(args.out / condition / "row.json", json.dumps(row))  # so that several processes can share the work
    kept = [args.out / condition / "row.json" for condition in CONDITIONS]
    rows = [json.loads(file.read_text()) for file in kept if file.exists()]
    write_text(path, json.dumps(rows, indent=2) + "\n")
    write_text(args.out / "conditions.md", table(rows))
    base = load_base()
    shown = [one_hint_four_prompts(base, args.out / row["condition"], args.pick) for row in rows]
    heads = ["hint", "red leather", "wooden", "blue", "black"]
    sheet = Image.fromarray(grid([pictures for pictures, _ in shown], heads, [name for _, name in shown]))
    write_with(args.out / "conditions.png", lambda temporary: sheet.save(temporary, "PNG"))
    print(table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/conditions"))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1, help="pictures a hint")
    parser.add_argument("--pick", default="armchair", help="a word in the caption of the hint on the sheet")
    main(parser.parse_args())
