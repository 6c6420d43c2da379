"""One run, from a data set to a report: a folder that holds its settings, cache, checkpoints, control and pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridle.run.evaluating import evaluate_run
    from bridle.run.settings import RunSettings, open_run, read_run
    from bridle.run.training import train_run

# Imported when first asked for: training does not wait for what measures and draws reports.
_HOMES = {
    "RunSettings": "bridle.run.settings",
    "evaluate_run": "bridle.run.evaluating",
    "open_run": "bridle.run.settings",
    "read_run": "bridle.run.settings",
    "train_run": "bridle.run.training",
}

__all__ = ["RunSettings", "evaluate_run", "open_run", "read_run", "train_run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bridle.run' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
