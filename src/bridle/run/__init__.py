"""One run, from a data set to a report: a folder that holds its settings, cache, checkpoints, control and pictures."""

from bridle.run.evaluating import evaluate_run
from bridle.run.settings import RunSettings, open_run, read_run
from bridle.run.training import train_run

__all__ = ["RunSettings", "evaluate_run", "open_run", "read_run", "train_run"]
