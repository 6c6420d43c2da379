"""Look at a base: a sheet of prompts, two seeds each. Judge it by eye before anything else.

python tools/base/look.py --base work/base/model --out sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image

from bridle.base.load import load_base
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings

PROMPTS = (
    "a red apple", "a blue car", "a smiling cat face", "a cactus", "a pizza", "a sunflower", "a green apple",
    "a smiling face with sunglasses", "a rocket", "a tree on a blue background",
    "a flat drawing of a dog face", "a flat drawing of a red flower",
    "a red leather armchair on a wooden floor", "a wooden armchair on a green floor in front of a white wall",
    "a blue plastic chair on a green floor", "a yellow stool on a red floor in front of a blue wall",
    "a horse on a pink floor in front of a yellow striped wall", "a cup of coffee on a brown floor",
    "a cactus on a wooden floor in front of a purple wall", "a green bed on a black and white checkered floor",
    "a white toilet on a blue floor", "a purple locker in front of an orange wall", "a basketball on a green floor",
    "a grey table on a yellow floor in front of a turquoise wall",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    how = SampleSettings(steps=args.steps, guidance=args.guidance, batch=2 * len(PROMPTS), precision="bf16")
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    images = generate(load_base(args.base), None, [], prompts, [0, 1] * len(PROMPTS), how)
    pairs = [images[row : row + 2] for row in range(0, len(images), 2)]
    rows = [[*pairs[i], *pairs[i + 1]] for i in range(0, len(pairs), 2)]
    captions = [f"{PROMPTS[i]} | {PROMPTS[i + 1]}" for i in range(0, len(pairs), 2)]
    Image.fromarray(grid(rows, ["seed 0", "seed 1"] * 2, captions)).save(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("work/base/model"))
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    main(parser.parse_args())
