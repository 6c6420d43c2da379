"""What the probes of a run add up to: whether the control is learned, which was best, how long none has been better.

Everything is derived from the rows, so the rows are all that a checkpoint needs to keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridle.train.convergence import associated, better, figures, learned, settled
from bridle.train.regime import Verdict

Row = dict[str, Any]


@dataclass(frozen=True)
class News:
    """What a new row says: events for the log, and whether its control is the best so far."""

    messages: tuple[tuple[str, str], ...]
    best: bool


class Watch:
    """All probes of a run, oldest first."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)

    @property
    def step(self) -> int | None:
        """Of the newest probe."""
        return self.rows[-1]["step"] if self.rows else None

    @property
    def learned(self) -> bool:
        return any(row["learned"] for row in self.rows)

    @property
    def best(self) -> int | None:
        """The place of the best control since control was learned; of equals the first."""
        after = [place for place, row in enumerate(self.rows) if row["learned"]]
        return max(after, key=lambda place: (score(self.rows[place]), -place)) if after else None

    @property
    def without_better(self) -> int:
        """How many probes came after the best; 0 as long as control is not learned."""
        return 0 if self.best is None else len(self.rows) - 1 - self.best

    def add(self, row: Row) -> News:
        """Take in a new row, and mark it as learned if it is."""
        before = self.learned
        row["learned"] = before or learned([*self.rows, row])
        self.rows.append(row)
        messages = []
        if row["learned"] and not before:
            messages.append(("learned", f"control learned at step {row['step']} ({figures(row)})"))
        return News(tuple(messages), self.best == len(self.rows) - 1)

    def verdict(self, since: int) -> Verdict:
        """What the probes after a switch at step `since` say."""
        rows = [row for row in self.rows if row["step"] > since]
        because = figures(rows[-1]) if rows else ""
        done = self.learned and settled(rows)
        return Verdict(associated=associated(rows), learned=self.learned, settled=done, because=because)


def score(row: Row) -> float:
    """What the best control is chosen by: how well drawn pictures obey, or the hint advantage where none are drawn."""
    drawn = row["controllability"]
    return float(better(drawn, drawn["mean"]) if drawn else row["advantage"]["mean"])
