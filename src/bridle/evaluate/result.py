"""What an evaluation found: figures and per-pair rows, and the `evaluation.json` that holds them."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridle.atomic import write_text
from bridle.errors import FileError
from bridle.evaluate.measures import MEASURES, Figures, Measure

FILE = "evaluation.json"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over pairs and its standard error, None where there is one pair only."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return cls(mean=mean, error=None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean=mean, error=math.sqrt(variance / count))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure over all pairs; the seeds of a pair are averaged first, as they share its hint."""

    control: Mean
    without: Mean
    ceiling: Mean
    """The autoencoder's own reconstruction of the target: no generated picture can be expected to do better."""
    gain: Mean
    """How much better with control than without, pair by pair: above zero also where lower figures are better."""
    room: Mean
    """How much better the ceiling is than without control, pair by pair."""
    reached: float | None
    """gain / room; None where there is no room."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One pair generated with one seed, with and without the control. Paths are relative to the folder."""

    seed: int
    control: Figures
    without: Figures
    control_picture: str
    without_picture: str
    annotated_picture: str
    """The picture with control, annotated again."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """One held-out pair."""

    id: str
    caption: str
    ceiling: Figures
    seeds: tuple[SeedResult, ...]
    hint_picture: str
    target_picture: str
    ceiling_picture: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was measured."""

    folder: Path
    """Where the pictures lie."""
    condition: str
    """The annotator's name."""
    measure: str
    """What the verdict goes by: a name in `measures.MEASURES`."""
    tolerance_px: int
    scale: float
    seeds: tuple[int, ...]
    figures: dict[str, Comparison]
    pairs: tuple[PairResult, ...]
    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def headline(self) -> Comparison:
        return self.figures[self.measure]

    @property
    def deciding(self) -> Measure:
        """What the verdict goes by, with its name and unit."""
        return MEASURES[self.measure]


def compare(pairs: Sequence[PairResult], measure: str) -> Comparison:
    """Sum one measure up over pairs."""
    control = [_over_seeds(pair, "control", measure) for pair in pairs]
    without = [_over_seeds(pair, "without", measure) for pair in pairs]
    ceiling = [pair.ceiling[measure] for pair in pairs]
    gain = Mean.of(list(map(MEASURES[measure].better_by, control, without)))
    room = Mean.of(list(map(MEASURES[measure].better_by, ceiling, without)))
    return Comparison(
        control=Mean.of(control),
        without=Mean.of(without),
        ceiling=Mean.of(ceiling),
        gain=gain,
        room=room,
        reached=gain.mean / room.mean if room.mean > 0 else None,
    )


def pair_figures(pair: PairResult, measure: str) -> tuple[float, float, float]:
    """One pair's figures, over its seeds: with control, without, ceiling."""
    return (
        _over_seeds(pair, "control", measure),
        _over_seeds(pair, "without", measure),
        pair.ceiling[measure],
    )


def write_evaluation(evaluation: Evaluation) -> Path:
    """Write `evaluation.json` into the evaluation's folder."""
    table = dataclasses.asdict(evaluation)
    del table["folder"]  # the file lies in it, and may be moved together with it
    path = evaluation.folder / FILE
    write_text(path, json.dumps({"format": FORMAT, **table}, indent=2, allow_nan=False) + "\n")
    return path


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_evaluation` wrote. Raises: FileError: it is missing, damaged, or of another format."""
    path = folder / FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise FileError(f"{path} is of another format than {FORMAT}; evaluate again with this version")
        return _build(table, folder)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; run the evaluation first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is damaged ({error!r}); evaluate again") from None


def _build(table: Mapping[str, Any], folder: Path) -> Evaluation:
    fields = dict(table)
    fields["seeds"] = tuple(fields["seeds"])
    fields["figures"] = {name: _comparison(figures) for name, figures in fields["figures"].items()}
    fields["pairs"] = tuple(_pair(pair) for pair in fields["pairs"])
    return Evaluation(folder=folder, **fields)


def _comparison(table: Mapping[str, Any]) -> Comparison:
    means = {name: Mean(**value) for name, value in table.items() if name != "reached"}
    return Comparison(reached=table["reached"], **means)


def _pair(table: Mapping[str, Any]) -> PairResult:
    return PairResult(**dict[str, Any](table, seeds=tuple(SeedResult(**seed) for seed in table["seeds"])))


def _over_seeds(pair: PairResult, arm: Literal["control", "without"], measure: str) -> float:
    values = [getattr(seed, arm)[measure] for seed in pair.seeds]
    return math.fsum(values) / len(values)
