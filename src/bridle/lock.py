"""A file that one process at a time holds."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_HELD: set[IO[str]] = set()


@contextmanager
def holding(path: Path, *, wait: bool) -> Generator[bool]:
    """Hold the lock of a file for as long as a `with` block lasts; it is let go with the process, whatever ends that.

    Processes that are forked meanwhile do not hold it. Where the system (Windows) or the file's disk has no locks,
    nobody is kept out.

    Args:
        wait: for another one that holds it.

    Yields: whether this one does; False only where another does and `wait` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        _HELD.add(file)
        try:
            yield _lock(file.fileno(), wait)
        finally:
            _HELD.discard(file)


def _let_go() -> None:
    """In a forked process, which would hold it for as long as it outlives this one."""
    for file in _HELD:
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # on Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
