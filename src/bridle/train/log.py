"""What a run tells: `metrics.jsonl`, `probes.jsonl` and `events.jsonl`, one JSON object a row, each with its step.

A continued run drops the rows that its checkpoint does not know of, so that none appears twice.
"""

import json
import re
from collections.abc import Collection, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from bridle.atomic import write_text
from bridle.errors import ConfigError

METRICS, PROBES, EVENTS = "metrics.jsonl", "probes.jsonl", "events.jsonl"
FOLLOWING = ("learned", "switch", "warning")  # kinds of events that a probe may have had follow
SHEET = re.compile(r"step-(\d+)\.png")  # another name may be a user's own


class RunLog:
    """Appends rows, and shows figures in TensorBoard where that is asked for.

    Args:
        first_step: of the checkpoint that a run goes on from; -1 where there is none.
        probed: the steps whose probes it knows.

    Raises: ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, first_step: int, probed: Collection[int] = (), tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._board = open_board(folder / "tensorboard", max(first_step, 0)) if tensorboard else None
        unknown = {row.get("step") for row in read_rows(folder / PROBES)}.difference(probed)
        for name in (METRICS, PROBES, EVENTS):
            if (folder / name).exists():
                rows = [row for row in read_rows(folder / name) if row.get("step", -1) <= first_step]
                known = [row for row in rows if row.get("step") not in unknown or not follows(name, row)]
                write_text(folder / name, "".join(map(as_line, known)))
        for sheet in (folder / "previews").glob("step-*.png"):
            if (found := SHEET.fullmatch(sheet.name)) and int(found[1]) > first_step:
                sheet.unlink()

    def metrics(self, row: dict[str, Any]) -> None:
        """Add the figures of a training step."""
        self._add(METRICS, row)
        self._show(row["step"], {name: value for name, value in row.items() if name != "step"})

    def probe(self, row: dict[str, Any]) -> None:
        """Add the figures of a probe."""
        self._add(PROBES, row)
        figures = {"probe/advantage": row["advantage"]["mean"]}
        if row["controllability"] is not None:
            figures[f"probe/{row['controllability']['measure']}"] = row["controllability"]["mean"]
        self._show(row["step"], figures)

    def event(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """Add what happened: "learned", "switch", "skipped", "memory", "kernels", "graph", "warning", "forced"."""
        self._add(EVENTS, {"step": step, "kind": kind, "message": message, **facts})

    def ended(self, step: int, finished: bool, reason: str) -> None:
        """Add why training ended; once, however often a finished run is started again."""
        row = {"step": step, "kind": "ended", "message": reason, "finished": finished}
        if row not in read_rows(self.folder / EVENTS)[-1:]:
            self._add(EVENTS, row)

    def _add(self, name: str, row: dict[str, Any]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(as_line(row))

    def _show(self, step: int, figures: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)


def as_line(row: Mapping[str, Any]) -> str:
    """A row as JSON, which knows no NaN and no infinity: figures that are not finite become null."""
    kept = {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in row.items()}
    return json.dumps(kept) + "\n"


def follows(name: str, row: Mapping[str, Any]) -> bool:
    """Whether a row of the file of that name is a probe, or what may have come of it."""
    return name == PROBES or (name == EVENTS and row.get("kind") in FOLLOWING)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows, none where there is no file; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def open_board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "setting train.tensorboard is on, but TensorBoard is not installed; pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
