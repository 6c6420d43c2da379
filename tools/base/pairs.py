"""Make the demo's pictures: the embedded base draws captions of its own world, so their rights are ours.

Out: `<number>.webp` and `<number>.txt`, an ordinary data set. Pictures with hardly any edges, or with noise for edges,
are drawn again under another caption.

    python tools/base/pairs.py --out src/bridle/demo/pairs --count 400
"""

import argparse
import shutil
from pathlib import Path

import captions
import cv2
import numpy as np
import pictures
from PIL import Image

from bridle.base.load import load_base
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings

GROUPS = {"animals-nature", "food-drink", "objects", "travel-places", "activities", "smileys-emotion"}
EDGES = (0.015, 0.16)  # share of edge pixels that a clear picture of one thing has


def draw_caption(concepts: list[pictures.Concept], rng: np.random.Generator) -> str:
    concept = concepts[rng.integers(len(concepts))]
    paint = concept.group in captions.RECOLOURED and rng.random() < 0.5
    colour = str(rng.choice(["red", "orange", "yellow", "green", "blue", "purple", "pink"])) if paint else None
    ground = str(rng.choice(list(captions.GROUNDS))) if rng.random() < 0.2 else None
    plain = pictures.Concept(**{**vars(concept), "tags": ()})
    return captions.caption(plain, colour, ground if ground != colour else None, paint, rng)


def edge_share(image: np.ndarray) -> float:
    return float((cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 100, 200) > 0).mean())


def main(args: argparse.Namespace) -> None:
    concepts, _ = pictures.load(args.pictures)
    chosen = [c for c in concepts if captions.is_drawn(c) and not c.held_out and c.group in GROUPS]
    base, how, rng = (
        load_base(args.base),
        SampleSettings(steps=args.steps, guidance=args.guidance, batch=32, precision="bf16"),
        np.random.default_rng(1),
    )
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    kept = seed = 0
    while kept < args.count:
        said = [draw_caption(chosen, rng) for _ in range(32)]
        images = generate(base, None, [], said, list(range(seed, seed + 32)), how)
        seed += 32
        for caption, image in zip(said, images, strict=True):
            if EDGES[0] <= edge_share(image) <= EDGES[1] and kept < args.count:
                Image.fromarray(image).save(args.out / f"{kept:04}.webp", quality=90, method=6)
                (args.out / f"{kept:04}.txt").write_text(caption + "\n")
                kept += 1
        print(f"{kept} of {args.count}, {seed} drawn", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--out", type=Path, default=Path("src/bridle/demo/pairs"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    main(parser.parse_args())
