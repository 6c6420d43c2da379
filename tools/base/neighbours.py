"""How much of a sample is memory? Each of 24 samples beside the training picture that is nearest to it.

Nearness is the cosine distance of Inception's features. Three rulers for it: held-out real pictures to their nearest
training picture (what something new measures), and training pictures through the base's autoencoder to the nearest
(what a perfect copy measures). The sheet is for the eye, which decides; the figures only say where to look.

    python tools/base/neighbours.py --base work/base/model --out work/proof
"""

import argparse
import json
from pathlib import Path
from typing import Any

import kept
import numpy as np
import pictures
import prompts
import proof
import real
from PIL import Image

from bridle import atomic
from bridle.errors import BridleError
from bridle.sample.picture import grid
from bridle.sample.settings import SampleSettings

ACROSS = 4
RULERS = 200  # pictures of each


def nearest(found: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `training`, and cosine distances in [0, 2]."""
    similar = prompts.unit(found) @ prompts.unit(training).T
    return similar.argmax(1), 1 - similar.max(1)


def spread(distances: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(distances, (0.05, 0.5, 0.95))
    return {"5%": round(float(low), 3), "median": round(float(middle), 3), "95%": round(float(high), 3)}


def ask(training: list[real.Real], count: int, listed: Path, rng: np.random.Generator) -> list[str]:
    """Half captions of training pictures, equally many of each kind, half prompts of the prompt test."""
    by_kind = [[one for one in training if one.kind == kind] for kind in dict.fromkeys(one.kind for one in training)]
    share = count // 2 // len(by_kind)
    known = [one.caption for found in by_kind for one in proof.pick(found, share, rng)]
    others = [one.text for one in prompts.read_prompts(listed, lambda _: set())]
    return known + proof.pick(others, count - len(known), rng)


def search(args: argparse.Namespace, keep: kept.Kept) -> tuple[dict[str, Any], np.ndarray]:
    """Returns: distances as JSON values, and the sheet."""
    rng = np.random.default_rng(0)
    everything, pack = real.load_scenes(args.scenes), real.Pack(args.pictures)
    for style in args.styles:
        everything += pack.load(style, range(args.views))
    seen = keep.features([one.picture for one in everything])
    known = [i for i, one in enumerate(everything) if not one.held_out]
    new = [i for i, one in enumerate(everything) if one.held_out]
    texts = ask([everything[i] for i in known], args.count, args.prompts, rng)
    how = SampleSettings(steps=args.steps, guidance=args.guidance, batch=kept.CHUNK, precision=args.precision)
    drawn = keep.samples(args.base, texts, range(proof.SEED, proof.SEED + len(texts)), how)
    rows, distances = nearest(keep.features(drawn), seen[known])
    shown = [everything[known[row]] for row in rows]
    originals = proof.pick(range(len(known)), RULERS, rng)
    copied = keep.reconstructed(args.base, [everything[known[row]].picture for row in originals])
    found, copies = nearest(keep.features(copied), seen[known])
    report = {
        "samples": spread(distances),
        "held-out real pictures": spread(nearest(seen[proof.pick(new, RULERS, rng)], seen[known])[1]),
        "training pictures, decoded by the base": spread(copies),
        "of these, nearest to their original": round(float(np.mean(found == originals)), 3),
        "training pictures searched": len(known),
        "each": [
            {"prompt": text, "distance": round(float(distance), 3), "nearest": one.caption}
            for text, distance, one in zip(texts, distances, shown, strict=True)
        ],
    }
    return report, lay_out(texts, drawn, shown, distances)


def lay_out(texts: list[str], drawn: list[np.ndarray], shown: list[real.Real], distances: np.ndarray) -> np.ndarray:
    """Sample and nearest side by side, the nearest to training first."""
    order = np.argsort(distances)[: len(texts) - len(texts) % ACROSS]
    rows, lines = [], []
    for start in range(0, len(order), ACROSS):
        some = order[start : start + ACROSS]
        rows.append([picture for i in some for picture in (drawn[i], shown[i].picture)])
        lines.append(" | ".join(f"{texts[i]} ({distances[i]:.2f})" for i in some))
    return grid(rows, ["sample", "nearest"] * ACROSS, lines)


def main(args: argparse.Namespace) -> None:
    report, sheet = search(args, proof.keep_of(args))
    atomic.write_text(args.out / "neighbours.json", json.dumps(report, indent=1))
    atomic.write_with(args.out / "neighbours.png", Image.fromarray(sheet).save)
    print(json.dumps({key: value for key, value in report.items() if key != "each"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proof.add_shared(parser)
    parser.add_argument("--prompts", type=Path, default=prompts.LIST)
    parser.add_argument("--count", type=int, default=24, help="samples, a multiple of four")
    parser.add_argument("--styles", nargs="*", default=[pictures.FLUENT, pictures.NOTO], help="of emoji to search in")
    parser.add_argument("--views", type=int, default=1, help="of each emoji to search in; the first is unmoved")
    try:
        main(parser.parse_args())
    except BridleError as error:
        raise SystemExit(f"{error}") from None
