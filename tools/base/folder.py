"""Some of the Fluent emoji as an ordinary data set, for trying things out.

In: `pictures.zip`. Out: a folder of `<hexcode>.png`, on white, and `<hexcode>.txt`, their names.

    python tools/base/folder.py --out work/emoji --count 500
"""

import argparse
from pathlib import Path

import captions
import numpy as np
import pictures
from PIL import Image

WHITE = np.ones(3, np.float32)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    concepts, images = pictures.load(args.pictures)
    # One style: an emoji has the same hexcode in all of them.
    fluent = [place for place, one in enumerate(concepts) if one.style == pictures.FLUENT]
    drawn = [place for place in fluent if captions.is_drawn(concepts[place])]
    for place in np.random.default_rng(args.seed).permutation(drawn)[: args.count]:
        concept, image = concepts[place], pictures.over(images[place], WHITE)
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(args.out / f"{concept.hexcode}.png")
        (args.out / f"{concept.hexcode}.txt").write_text(
            captions.article(concept.label.lower()) + "\n", encoding="utf-8"
        )
