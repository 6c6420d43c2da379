"""What the quicker speeds of sampling cost in obedience and in quality: a trained run in; a table, and JSON, out.

Each speed draws the run's held-out pairs with the same noise as "exact". Obedience is the edge F1 of `bridle evaluate`,
compared picture by picture, with the standard error of the mean change. Quality is the distance of Inception's features
to those of real pictures of the data set (KID; FID is biased for so few), where the network is there; see
`bridle.evaluate.quality`. A speed that loses more than 2% of obedience is not for shipping.

    python benchmarks/speeds.py --run runs/edges --seeds 0 1 --inception default_1.pt --json speeds.json
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch

from bridle.atomic import write_text
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.data.annotate import get_annotator
from bridle.data.picture import read_picture
from bridle.evaluate.evaluate import HeldOutPair
from bridle.evaluate.fidelity import TOLERANCE_PX
from bridle.evaluate.measures import MEASURES
from bridle.evaluate.quality import features, kid, load_inception
from bridle.files.weights import load_control
from bridle.run.pairs import load_data
from bridle.run.settings import read_run
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings, Speed

REAL = 240  # pictures of the data set that KID compares with


@dataclass(frozen=True)
class Drawn:
    """All pictures of one speed, their obedience, and the CPU seconds they took."""

    pictures: list[np.ndarray]
    obedience: np.ndarray
    cpu_s: float


def draw(base: Base, control: Control | None, pairs: list[HeldOutPair], seeds: list[int], how: SampleSettings) -> Drawn:
    hints, captions = [pair.hint for pair in pairs], [pair.caption for pair in pairs]
    annotator, compare = get_annotator("canny"), MEASURES["f1"].compute
    pictures: list[np.ndarray] = []
    started_s = time.process_time()
    for seed in seeds:
        pictures += generate(base, control, hints, captions, [seed] * len(hints), how)
    cpu_s = time.process_time() - started_s
    drawn = zip(hints * len(seeds), pictures, strict=True)
    return Drawn(pictures, np.array([compare(hint, annotator(one), TOLERANCE_PX) for hint, one in drawn]), cpu_s)


def compare(drawn: Drawn, exact: Drawn) -> dict[str, float]:
    change = (drawn.obedience - exact.obedience) / exact.obedience.mean()
    levels = [np.abs(a.astype(int) - b).mean() for a, b in zip(drawn.pictures, exact.pictures, strict=True)]
    return {
        "f1": float(drawn.obedience.mean()),
        "change": float(change.mean()),
        "error": float(change.std(ddof=1) / len(change) ** 0.5),
        "levels": float(np.mean(levels)),
        "speed": exact.cpu_s / drawn.cpu_s,
    }


def distance_to(folder: Path, inception: Path) -> Callable[[list[np.ndarray]], float]:
    """KID of pictures to some of a folder's."""
    network, files = load_inception(inception), sorted(folder.iterdir())

    def see(pictures: list[np.ndarray]) -> np.ndarray:
        return features(pictures, network, precision="bf16")

    real = see([read_picture(file) for file in files[:: max(1, len(files) // REAL)][:REAL]])
    return lambda pictures: kid(see(pictures), real, np.random.default_rng(0)).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run with the canny annotator")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--inception", type=Path, help="for KID; left out where not given")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_run(options.run)
    base = load_base(settings.base)
    data = load_data(settings.data, base, options.run)
    pairs, control = data.held_out(), load_control(options.run / "control")
    how = SampleSettings(steps=options.steps, guidance=settings.sample.guidance, batch=12, precision="bf16")
    far = distance_to(settings.data.folder / "pictures", options.inception) if options.inception else None
    table, exact = {}, None
    for name in (*get_args(Speed), "no control"):
        speed = cast(Speed, name if name in get_args(Speed) else "exact")
        found = draw(base, None if name == "no control" else control, pairs, options.seeds, replace(how, speed=speed))
        exact = exact or found
        table[name] = compare(found, exact)
        if far:
            table[name]["kid"] = far(found.pictures)
        print(name, " ".join(f"{key} {value:.4f}" for key, value in table[name].items()), flush=True)
    if options.json:
        facts = {"pairs": len(pairs), "seeds": options.seeds, "steps": options.steps, "torch": torch.__version__}
        write_text(options.json, json.dumps(facts | {"speeds": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
