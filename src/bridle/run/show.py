"""What a person sees while a run trains: a bar, and a line for everything that happens."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Shown:
    """A bar for as long as training takes."""

    def __init__(self, console: Console, steps: int) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.task = self.bar.add_task("training", total=steps, figures="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def progress(self, step: int, row: dict[str, Any] | None) -> None:
        if row is not None:
            self.bar.update(self.task, figures=f"loss {row['loss']:.4f}, {row['samples_per_s']:.1f} samples/s")
        self.bar.update(self.task, completed=step)

    def say(self, message: str) -> None:
        self.bar.console.print(message, highlight=False, markup=False, soft_wrap=True)
