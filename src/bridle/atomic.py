"""Writes that leave either the old file or the new one, whatever happens in between: temp, fsync, rename."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

SHORT = 40  # letters of a name that a temporary one begins with: the longest that are allowed leave no room for more


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, make it durable, and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:SHORT]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if os.name == "posix":  # Windows cannot open a folder, and makes the rename durable by itself
            _sync(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 with the line ends it has, whatever the machine's locale."""
    write_with(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a temporary folder beside `path`, and move it into place; `path` is missing or an empty folder.

    For many files that can be made again: they are not made durable one by one, so a power cut may empty some.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:SHORT]}."))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can open
        if path.is_dir():
            path.rmdir()  # Windows replaces no folder; one that is not empty is an error here
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
