"""Checkpoints: all that a run needs to go on, in a folder that is there whole or not at all.

`step-00000100/` holds `facts.json` and a safetensors file per process that had something to write. It grows under a
hidden name; every file and the folder are on the disk before it gets its own, and only then the oldest ones go. A kill
at any moment leaves the checkpoints that there were, and perhaps the new one.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from bridle.atomic import write_text, write_with
from bridle.errors import TrainError
from bridle.kernels.precision import Precision
from bridle.train.parallel import ALONE, World, gather
from bridle.train.pieces import Piece, own_pieces, read_pieces, write_pieces

T = TypeVar("T")
NAME = re.compile(r"step-(\d{8})(?:\.(\d+))?")
HIDDEN = ".step-"
FACTS = "facts.json"
FULL = {errno.ENOSPC, errno.EDQUOT}


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any], keep: int, world: World = ALONE
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. All ranks call it together.

    Args:
        folder: of all checkpoints; with several machines, one that all of them see.
        tensors: by name, the same names on every rank: each writes its shards, and the main rank what is not sharded.
        facts: what JSON can hold; their "step" is set.

    Returns: the checkpoint's folder.
    Raises: TrainError: it could not be written, on any rank, such as for want of space; the earlier ones are intact.
    """
    temporary = folder / f"{HIDDEN}{step:08}.{gather(secrets.token_hex(4), world)[0]}"
    name, pieces = f"rank-{world.rank:05}.safetensors", own_pieces(tensors, world.main)
    try:
        together(lambda: prepare(temporary) if world.main else None, folder, step, world)
        entries = together(lambda: write_file(temporary / name, pieces), folder, step, world)
        files = {name: entry for name, entry in entries if entry}
        text = json.dumps({"facts": {**facts, "step": step}, "files": files}, indent=2)
        finished = together(lambda: finish(temporary, text, step, keep) if world.main else None, folder, step, world)
    finally:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
    path = finished[0]
    assert path is not None  # the main rank's
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; what a kill left unfinished has another name."""
    found = [(match, path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 1)))
    return [path for _, path in found]


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from, or None where there is none."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def newest_precision(folder: Path) -> Precision | None:
    """What the run computes in by its newest checkpoint; None where there is none."""
    path = newest(folder)
    return None if path is None else read_facts(path)["settings"]["precision"]


def newest_data(folder: Path) -> str | None:
    """The fingerprint of the cache that the run has trained on; None where there is no checkpoint."""
    path = newest(folder)
    return None if path is None else read_facts(path)["cache"]


def read_facts(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors, with "step". Raises: TrainError: the checkpoint is damaged."""
    facts: dict[str, Any] = read_record(path)["facts"]
    return facts


def load(path: Path, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read a checkpoint's tensors, by however many ranks it was written.

    Args:
        into: filled in place where given, whole tensors or shards; else whole ones are made, on the CPU.

    Raises: TrainError: the checkpoint is damaged, or `into` has other names, shapes or types.
    """
    try:
        return read_pieces(check_files(path, read_record(path)["files"]), into)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from None


def together(work: Callable[[], T], folder: Path, step: int, world: World) -> list[T]:
    """Do it on every rank and return what each got; where it fails on one all raise, so that none waits for another."""
    result, failure = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        failure = explain(error)
    outcomes: list[Any] = gather((result, failure), world)
    for _, failure in outcomes:
        if failure:
            message = f"checkpoint of step {step} cannot be written to {folder}: {failure}"
            raise TrainError(f"{message}, and start again: what was saved before is intact")
    return [result for result, _ in outcomes]


def explain(error: Exception) -> str:
    """What went wrong, and the remedy. safetensors tells the system's error by its number alone."""
    found = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else found and int(found[1])
    if number in FULL:
        return "the disk is full; free some space, or set train.keep lower"
    return f"{error}; put that right"


def prepare(temporary: Path) -> None:
    """Make the folder to write in, and remove those that kills left."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for left in temporary.parent.glob(f"{HIDDEN}*"):
        shutil.rmtree(left)
    temporary.mkdir()


def write_file(path: Path, pieces: Mapping[str, Piece]) -> tuple[str, dict[str, Any] | None]:
    """Returns: the file's name, and what tells whether it is whole; None where there was nothing to write."""
    if not pieces:
        return path.name, None
    write_with(path, lambda file: write_pieces(file, pieces))
    return path.name, {"bytes": path.stat().st_size, "sha256": digest(path)}


def finish(temporary: Path, text: str, step: int, keep: int) -> Path:
    """Give a checkpoint its name, and delete the oldest; every step of it is durable before the next one begins."""
    folder = temporary.parent
    write_text(temporary / FACTS, text)
    path = folder / free_name(folder, step)
    os.replace(temporary, path)
    sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        hidden = folder / f".{old.name}"
        os.replace(old, hidden)  # a kill in the middle of the deletion must not leave half a checkpoint under its name
        shutil.rmtree(hidden)
    return path


def free_name(folder: Path, step: int) -> str:
    """A folder cannot replace another in one move: a step that is saved again gets a number, and counts as newer."""
    same = [path for path in list_checkpoints(folder) if path.name.startswith(f"step-{step:08}")]
    return f"step-{step:08}" if not same else f"step-{step:08}.{int(same[-1].suffix[1:] or 1) + 1}"


def sync(folder: Path) -> None:
    """Make what was renamed in a folder durable."""
    if os.name == "posix":  # Windows cannot open a folder, and makes the rename durable by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_record(path: Path) -> dict[str, Any]:
    """Raises: TrainError: the checkpoint is damaged."""
    try:
        record = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return {"facts": dict(record["facts"]), "files": dict(record["files"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, f"{FACTS}: {error}") from None


def check_files(path: Path, entries: Mapping[str, Any]) -> list[Path]:
    """The files of a checkpoint. Raises: TrainError: one is missing, changed, or of another save."""
    found = {file.name: file for file in path.glob("*.safetensors")}
    for name in sorted(entries.keys() | found.keys()):
        if name not in found:
            raise damaged(path, f"{name} is missing")
        if name not in entries:
            raise damaged(path, f"{name} is not part of it")
        size_bytes, expected = found[name].stat().st_size, entries[name]["bytes"]
        if size_bytes != expected:
            raise damaged(path, f"{name} has {size_bytes} bytes, expected {expected}")
        if digest(found[name]) != entries[name]["sha256"]:
            raise damaged(path, f"{name} is not what was written")
    return list(found.values())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, why: str) -> TrainError:
    return TrainError(f"checkpoint {path} is damaged ({why}); delete it to go on from the one before")
