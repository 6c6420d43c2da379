"""What the run of these tests is made of, and what it leaves at hand."""

from dataclasses import dataclass

from bridle.run import RunSettings
from bridle.run.training import TrainedRun

PAIRS, HELD_OUT, STEPS = 12, 5, 4
COLOURS = {"red": (200, 30, 30), "green": (30, 140, 60), "blue": (30, 60, 200)}


@dataclass(frozen=True)
class Done:
    """The run, and what it wrote to stdout."""

    run: TrainedRun
    settings: RunSettings
    stdout: str
