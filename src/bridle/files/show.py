"""What a person sees while a file is written: a bar on stderr."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def byte_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A bar for as long as it lasts. Yields: what to call with the bytes done and those in all."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, visible=False)  # until there is something to show
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes, visible=True)
