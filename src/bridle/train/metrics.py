"""`metrics.jsonl`: one row per logged step. A resumed run drops the rows that its checkpoint does not know of."""

import json
from pathlib import Path
from typing import Any

from bridle.atomic import write_text
from bridle.errors import ConfigError


class Metrics:
    """Appends rows to a file, and to TensorBoard where that is asked for.

    Raises: ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._board = open_board(folder / "tensorboard", first_step) if tensorboard else None
        if self.path.exists():
            rows = read_metrics(self.path)
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))

    def add(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
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
            "setting train.tensorboard is on, but TensorBoard is not installed; pip install 'bridle[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
