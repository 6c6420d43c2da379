"""Pictures on the way: the same held-out pairs each time, so that two sheets differ by nothing but training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bridle.atomic import write_with
from bridle.base.base import Base
from bridle.control.control import Control
from bridle.evaluate.evaluate import HeldOutPair, as_picture
from bridle.sample.picture import grid
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings

PAIRS = 4
SEEDS = (0, 1)


class Previews:
    """Draws `step-00000200.png` and so on into a folder.

    Args:
        pairs: held-out ones; the first few are drawn.
        how: they are sampled.
    """

    def __init__(self, base: Base, pairs: list[HeldOutPair], how: SampleSettings, folder: Path) -> None:
        self.base, self.pairs, self.how, self.folder = base, pairs[:PAIRS], how, folder
        self.without: list[np.ndarray] = []

    def __call__(self, control: Control, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Draw a sheet, unless it is there. `check` is called after every denoising step; what it raises ends it."""
        path = self.folder / f"step-{step:08}.png"
        if path.exists():
            return
        self.without = self.without or self._draw(None, SEEDS[0], check)
        drawn = [self._draw(control, seed, check) for seed in SEEDS]
        columns = ["hint", "target", *(f"seed {seed}" for seed in SEEDS), "without control"]
        rows = [
            [as_picture(pair.hint), pair.image, *(images[row] for images in drawn), self.without[row]]
            for row, pair in enumerate(self.pairs)
        ]
        sheet = Image.fromarray(grid(rows, columns, [pair.caption for pair in self.pairs]))
        write_with(path, lambda temporary: sheet.save(temporary, "PNG"))

    def _draw(self, control: Control | None, seed: int, check: Callable[[], None]) -> list[np.ndarray]:
        hints, captions = [pair.hint for pair in self.pairs], [pair.caption for pair in self.pairs]
        seeds = [seed] * len(self.pairs)  # a preview that overflows is no reason to end a run
        return generate(self.base, control, hints, captions, seeds, self.how, on_step=check, strict=False)
