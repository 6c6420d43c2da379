"""The picture at the head of docs/sampling.md: three hints, and what a control can be told.

In: the runs `canny` and `depth` that `benchmarks/conditions.py` left, of the same held-out pairs. Out: a PNG or WebP.

    python benchmarks/use.py --runs work/conditions --out docs/images/use.webp
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from conditions import name_of
from PIL import Image

from bridle.atomic import write_with
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.evaluate.evaluate import HeldOutPair, as_picture
from bridle.files.weights import load_control
from bridle.run.pairs import open_data
from bridle.run.settings import read_run
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Init, Steering

PICKS = ("armchair", "wooden table", "sofa in front")  # words in the captions of the hints
SEED, STRENGTH, ANEW = 1, 0.7, "a red {} on a white floor"


@dataclass(frozen=True)
class Studio:
    """What every picture is drawn with."""

    base: Base
    edges: Control
    depth: Control
    settings: SampleSettings

    def draw(self, prompt: str, hint: np.ndarray, strength: Strength, init: Init | None = None, **told: Any) -> Any:
        """One picture by edges. Args: told: to `Steering`."""
        steering = {"edges": Steering(control=self.edges, hints=[hint], strength=strength, **told)}
        return self.together(prompt, steering, init)

    def together(self, prompt: str, steering: dict[str, Steering], init: Init | None = None) -> np.ndarray:
        return generate(self.base, steering, [], [prompt], [SEED], self.settings, init=init)[0]


def rows(studio: Studio, pair: HeldOutPair, other: HeldOutPair) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pictures of one hint by their titles. Args: other: its depth map is asked for as well, on the right."""
    hint, prompt = pair.hint, pair.caption
    height, width = hint.shape[:2]
    left = np.zeros((height, width), np.uint8)
    left[:, : width // 2] = 255
    own = Strength(half=studio.settings.half)
    controlled = studio.draw(prompt, hint, own)
    two = {
        "edges": Steering(control=studio.edges, hints=[hint], strength=own, mask=left),
        "depth": Steering(control=studio.depth, hints=[other.hint], strength=own, mask=255 - left),
    }
    again = Init(image=controlled, strength=1.0, mask=255 - left)
    first = {
        "hint": as_picture(hint),
        "no control": studio.draw(prompt, hint, replace(own, scale=0.0)),
        "control": controlled,
        "scale 0.5": studio.draw(prompt, hint, replace(own, scale=0.5)),
        "until 0.3 of the steps": studio.draw(prompt, hint, replace(own, end=0.3)),
        "in the left half": studio.draw(prompt, hint, own, mask=left),
    }
    second = {
        "left edges, right depth": studio.together(prompt, two),
        "empty prompt": studio.draw("", hint, own),
        "guess: official": studio.draw("", hint, Strength(half="conditional", weights="official")),
        "guess: paper": studio.draw("", hint, Strength(half="conditional", weights="paper")),
        "from a blue disc": studio.draw(prompt, hint, own, Init(image=disc(height, width), strength=STRENGTH)),
        "right half anew": studio.draw(ANEW.format(name_of(prompt)), hint, own, again),
    }
    return first, second


def disc(height: int, width: int) -> np.ndarray:
    """Blue, on white."""
    down, across = np.mgrid[:height, :width]
    inside = np.hypot(down - height / 2, across - width / 2) < 0.35 * min(height, width)
    return np.where(inside[..., None], (40, 90, 220), (255, 255, 255)).astype(np.uint8)


def held_out(run: Path) -> Sequence[HeldOutPair]:
    return open_data(read_run(run).data, run).held_out()


def main(args: argparse.Namespace) -> None:
    edges, depth = args.runs / "canny", args.runs / "depth"
    studio = Studio(
        load_base(), load_control(edges / "control"), load_control(depth / "control"), read_run(edges).sample
    )
    pairs, maps = held_out(edges), {pair.id: pair for pair in held_out(depth)}
    picked = [next(pair for pair in pairs if word in pair.caption) for word in PICKS]
    others = [maps[pair.id] for pair in (*picked[1:], picked[0])]
    panels = zip(*(rows(studio, pair, other) for pair, other in zip(picked, others, strict=True)), strict=True)
    sheets = [grid([list(row.values()) for row in panel], list(panel[0])) for panel in panels]
    sheet = Image.fromarray(np.concatenate(sheets))
    sheet = sheet.resize((round(sheet.width * 0.7), round(sheet.height * 0.7)), Image.Resampling.LANCZOS)
    kind = args.out.suffix[1:].upper()
    write_with(args.out, lambda temporary: sheet.save(temporary, kind, quality=88))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("work/conditions"))
    parser.add_argument("--out", type=Path, default=Path("use.webp"))
    main(parser.parse_args())
