"""What a pair is, before and after it is decoded, and what is kept of one that cannot be used."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A pair as a source lists it; nothing has been opened yet.

    Args:
        id: the picture's path inside the data folder, with "/"; unique, and the same on every machine.
        image: the picture's file.
        hint: the hint's file, or None where an annotator makes the hint.
        caption: may be empty.
        split: `TRAIN` or `HELD_OUT` where the data set says which; None where it does not.
    """

    id: str
    image: Path
    hint: Path | None
    caption: str
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A decoded pair.

    Args:
        id: as in `Record`.
        image: [H, W, 3] uint8, RGB.
        hint: [H, W, K] uint8.
        caption: may be empty.
    """

    id: str
    image: Pixels
    hint: Pixels
    caption: str


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A pair that was set aside: which one (or which line of which list), and why."""

    id: str
    reason: str
