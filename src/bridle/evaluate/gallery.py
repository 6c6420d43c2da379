"""The pictures of an evaluation as people look at them: the overlay of edges, and the contact sheet."""

from pathlib import Path

import numpy as np
from PIL import Image

from bridle.atomic import write_with
from bridle.errors import FileError
from bridle.evaluate.fidelity import match_edges, sharpen
from bridle.evaluate.result import Evaluation, PairResult, SeedResult
from bridle.sample.picture import grid

# Told apart by lightness and along blue to yellow, which every common colour blindness keeps.
HIT = (245, 245, 240)
MISSED = (240, 158, 20)
EXTRA = (45, 125, 255)
GROUND = (18, 22, 28)

SHEET_ROWS = 6


def load_picture(evaluation: Evaluation, name: str) -> np.ndarray:
    """One picture of the evaluation, [H, W, 3] uint8. Raises: FileError: it is missing or damaged."""
    path = evaluation.folder / name
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"picture {path} cannot be read ({error}); evaluate again") from None


def overlay(hint: np.ndarray, annotated: np.ndarray, tolerance_px: int) -> np.ndarray:
    """Colour right, missed and extra edges.

    Args:
        hint, annotated: [H, W, 3] uint8; edges, though they may be grey.

    Returns: [H, W, 3] uint8. Raises: HintError: the maps differ in shape.
    """
    match = match_edges(sharpen(hint), sharpen(annotated), tolerance_px)
    picture = np.full(hint.shape, GROUND, np.uint8)
    for edges, colour in ((match.extra, EXTRA), (match.missed, MISSED), (match.hit, HIT)):
        picture[edges.any(axis=2)] = colour
    return picture


def comparison_picture(evaluation: Evaluation, pair: PairResult, result: SeedResult) -> np.ndarray:
    """What the eye compares with the hint: coloured edges where hints are edges, else the annotated output."""
    annotated = load_picture(evaluation, result.annotated_picture)
    if not shows_edges(evaluation):
        return annotated
    return overlay(load_picture(evaluation, pair.hint_picture), annotated, evaluation.tolerance_px)


def comparison_title(evaluation: Evaluation) -> str:
    return "edges over hint" if shows_edges(evaluation) else "annotated again"


def shows_edges(evaluation: Evaluation) -> bool:
    """Whether hints are edges, so that right, missed and extra ones can be told apart."""
    return evaluation.measure == "f1"


def write_sheet(evaluation: Evaluation, path: Path, rows: int = SHEET_ROWS) -> Path:
    """Write the first pairs, drawn with the first seed, as one PNG.

    Edges over the hint are white where followed, orange where missed, blue where the hint has none.

    Raises: FileError: a picture is missing.
    """
    pairs = evaluation.pairs[:rows]
    bound = evaluation.deciding.bound
    columns = ["hint", "with control", comparison_title(evaluation), "without control", "target", bound]
    sheet = grid([_row(evaluation, pair) for pair in pairs], columns, [_caption(evaluation, pair) for pair in pairs])
    write_with(path, lambda temporary: Image.fromarray(sheet).save(temporary, "PNG", optimize=True))
    return path


def _row(evaluation: Evaluation, pair: PairResult) -> list[np.ndarray]:
    first = pair.seeds[0]
    return [
        load_picture(evaluation, pair.hint_picture),
        load_picture(evaluation, first.control_picture),
        comparison_picture(evaluation, pair, first),
        load_picture(evaluation, first.without_picture),
        load_picture(evaluation, pair.target_picture),
        load_picture(evaluation, pair.ceiling_picture),
    ]


def _caption(evaluation: Evaluation, pair: PairResult) -> str:
    # The figures of the seed that is shown, not of the pair.
    first, measure = pair.seeds[0], evaluation.deciding
    control, without, ceiling = (
        measure.text(part[evaluation.measure]) for part in (first.control, first.without, pair.ceiling)
    )
    figures = f"{measure.words} {control} with control, {without} without, {measure.bound} {ceiling}"
    return f"{pair.caption or pair.id}  ·  {figures}"
