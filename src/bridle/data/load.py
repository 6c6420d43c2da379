"""From a listed pair to a square example, with draws that depend on nothing but (seed, id, variant)."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from bridle.data.annotate.annotator import Annotator
from bridle.data.example import HELD_OUT, Example, Pixels, Record
from bridle.data.picture import read_hint, read_picture
from bridle.data.settings import DataSettings
from bridle.data.transforms import CENTER, draw_geometry, fit, fit_image, mirror_normals
from bridle.errors import DataError

NORMALS = "normals"  # the condition whose hints say left and right in their colours


def share_out(records: Sequence[Record], held_out: int) -> tuple[list[Record], list[Record]]:
    """Which pairs are trained on, and which are previewed and measured, each in the order given.

    Where the data set holds pairs out, `held_out` of those are measured and none of them is ever trained on;
    otherwise they are taken from all pairs.

    Returns: training pairs, and at most `held_out` others.
    """
    offered = [record for record in records if record.split == HELD_OUT]
    chosen = choose_held_out([record.id for record in offered or records], held_out)
    return (
        [record for record in records if record.split != HELD_OUT and record.id not in chosen],
        [record for record in records if record.id in chosen],
    )


def choose_held_out(ids: Iterable[str], count: int) -> frozenset[str]:
    """The `count` ids with the smallest hashes: a new picture pushes out one of them at most."""
    return frozenset(sorted(ids, key=lambda id: _digest("held out", id))[:count])


def load_example(record: Record, settings: DataSettings, annotator: Annotator, variant: int, train: bool) -> Example:
    """Decode, cut and annotate one pair.

    A hint that comes from a file takes part in the cut; one that is made is made from the cut picture, at the size
    that the control sees and that `evaluate` measures at.

    Args:
        record: what the source lists.
        settings: size, crop, flip and seed.
        annotator: makes the hint where the record brings none; where it brings one, its name says what that shows.
        variant: which draw; 0 is the first.
        train: False for held-out pairs: centre cut, no flip, the annotator's fixed thresholds.

    Returns: image [size_px, size_px, 3] and hint [size_px, size_px, K].
    Raises: DataError: a file cannot be read, or picture and hint do not fit together.
    """
    rng = _generator(settings.seed, record.id, variant)
    geometry_rng, annotator_rng = rng.spawn(2)
    geometry = draw_geometry(geometry_rng, settings.crop, settings.flip) if train else CENTER
    image = read_picture(record.image)
    if record.hint is not None:
        image, hint = fit(image, read_hint(record.hint), settings.size_px, geometry)
        if geometry.flip and annotator.name == NORMALS:
            hint = mirror_normals(hint)
    else:
        image = fit_image(image, settings.size_px, geometry)
        hint = _annotate(image, annotator, annotator_rng if train else None)
    return Example(id=record.id, image=image, hint=hint, caption=record.caption)


def _annotate(image: Pixels, annotator: Annotator, rng: np.random.Generator | None) -> Pixels:
    hint = annotator(image, rng)
    expected = (*image.shape[:2], annotator.channels)
    if hint.shape != expected or hint.dtype != np.uint8:
        raise DataError(f"annotator {annotator.name} gave {hint.dtype} {hint.shape}; expected uint8 {expected}")
    return hint


def _generator(seed: int, id: str, variant: int) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(_digest(str(seed), id, str(variant))))


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
