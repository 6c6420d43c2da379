"""What rows of probes say: do results depend on the hint, do pictures obey, do they still obey better?

Pure rules; how they were chosen is in docs/training.md. A row is one of `probes.jsonl`.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bridle.train.probe import Estimate, mean_of

Row = Mapping[str, Any]

SURE = 5  # standard errors: no luck goes so far, and probes share theirs, so a second one would confirm little
LEAST = 0.02  # of the advantage, twenty times what shuffled training hints ever gave
VISIBLE = 2  # standard errors of the gain of drawn pictures, which confirm what the advantage says
SPAN = 3  # probes that are compared with as many before them
SLIGHT, LIKELY = 0.01, 3  # of the advantage, and standard errors: results depend on the hint, pictures may not show it


def learned(rows: Sequence[Row]) -> bool:
    """Whether pictures obey as of the newest row.

    Measured on the embedded base (see `SURE`, `LEAST`): the advantage stays at zero, then rises steeply, and drawn
    pictures follow within the same 20 steps. Hints shuffled among the training pairs never bring it to 0.001, although
    pictures alone do look better with such a control than without: it still teaches the base the data set's look.
    """
    advantage, drawn = rows[-1]["advantage"], rows[-1]["controllability"]
    clear = advantage["mean"] >= LEAST and advantage["mean"] > SURE * advantage["error"]
    return clear and (drawn is None or drawn["gain"]["mean"] > VISIBLE * drawn["gain"]["error"])


def settled(rows: Sequence[Row]) -> bool:
    """Whether the last probes obey no better than those before them, beyond the standard error of the difference."""
    if len(rows) < 2 * SPAN:
        return False
    drawn = [row["controllability"] for row in rows[-2 * SPAN :]]
    if any(drawn):
        # Pair by pair, because pairs differ more than probes do.
        figures = [[better(row, figure) for figure in row["figures"]] if row else [] for row in drawn]
        if len({len(row) for row in figures}) > 1:
            return False  # `probe.samples` was changed in between
        rise = mean_of([fmean(pair[SPAN:]) - fmean(pair[:SPAN]) for pair in zip(*figures, strict=True)])
    else:
        means = [row["advantage"]["mean"] for row in rows[-2 * SPAN :]]
        rise = Estimate(fmean(means[SPAN:]) - fmean(means[:SPAN]), rows[-1]["advantage"]["error"])
    return rise.mean <= rise.error


def associated(rows: Sequence[Row]) -> bool:
    """Whether results depend on the right hint, however weakly, in two probes in a row."""
    last = [row["advantage"] for row in rows[-2:]]
    return len(last) == 2 and all(f["mean"] >= SLIGHT and f["mean"] > LIKELY * f["error"] for f in last)


def figures(row: Row) -> str:
    """The figures of a row, in words."""
    said = f"advantage {row['advantage']['mean']:.2f} ± {row['advantage']['error']:.2f}"
    drawn = row["controllability"]
    return said + (f", {label(drawn)} {drawn['mean']:.2f} ± {drawn['error']:.2f}" if drawn else "")


def better(drawn: Row, figure: float) -> float:
    """A figure of drawn pictures, turned over where lower ones are better: the higher the better."""
    return -figure if drawn.get("lower_is_better") else figure


def label(drawn: Row) -> str:
    """What the measure of drawn pictures is called; rows of older runs have its name alone."""
    return str(drawn.get("label") or drawn["measure"].upper())
