"""A file that one process at a time holds."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def holding(path: Path, *, wait: bool) -> Generator[bool]:
    """Hold the lock of a file for as long as a `with` block lasts; it is let go with the process, whatever ends that.

    Where the system or the file's disk has no locks, nobody is kept out.

    Args:
        wait: for another one that holds it.

    Yields: whether this one does; False only where another does and `wait` is off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        yield _lock(file.fileno(), wait)


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
