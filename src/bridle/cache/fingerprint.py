"""When a cache is still good: everything that its content depends on, hashed, in four parts that can be told apart."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridle.atomic import write_text
from bridle.cache.encode import Encoders
from bridle.data.annotate.annotator import Annotator
from bridle.data.example import HELD_OUT
from bridle.data.load import NORMALS
from bridle.data.settings import DataSettings
from bridle.data.sources import Source

Fingerprint = dict[str, Any]
PARTS = {"base", "annotator", "settings", "data"}
_STAMPS = "stamps.json"


def take_fingerprint(
    source: Source, settings: DataSettings, annotator: Annotator, encoders: Encoders, folder: Path
) -> Fingerprint:
    """Describe what a cache of these inputs would hold.

    Files count by their content (sha256): times change when a data set is copied to another machine, and the cache
    should travel with it. So that unchanged files are not read again, `folder` remembers each file's size, time and
    hash, and a file is hashed only when its size or time differ.

    Returns: the parts "base", "annotator", "settings" and "data", as JSON holds them.
    """
    chosen = dataclasses.asdict(settings)
    del chosen["folder"], chosen["annotator"]  # the data set may move; the annotator has a part of its own
    parts = {
        "base": encoders.fingerprint,
        "annotator": _describe_hints(source, annotator),
        "settings": chosen,
        "data": _hash_data(source, folder),
    }
    result: Fingerprint = json.loads(json.dumps(parts))  # tuples become lists here, as they will in the index
    return result


def describe_change(old: Fingerprint, new: Fingerprint) -> str | None:
    """What differs between two fingerprints, in words for the console; None: nothing."""
    changes = []
    if old["base"] != new["base"]:
        changes.append("the base")
    for part in ("annotator", "settings"):
        changes += [f"{part} {change}" for change in _list_changes(old[part], new[part])]
    if old["data"] != new["data"]:
        changes.append("pictures, hints, captions or splits")
    return ", ".join(changes) or None


def hash_fingerprint(fingerprint: Fingerprint) -> str:
    """One hash of all parts, 64 hex digits."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _describe_hints(source: Source, annotator: Annotator) -> dict[str, Any]:
    """Of hints from files, the annotator's settings are no part: only what they show, where it is known or matters."""
    if source.condition is not None:
        return {"name": source.condition, "files": True}
    if source.has_hints:
        return {"name": "files", **({"mirrored_as": NORMALS} if annotator.name == NORMALS else {})}
    return annotator.settings()


def _list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = sorted(old.keys() | new.keys())
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _hash_data(source: Source, folder: Path) -> str:
    known = _read_stamps(folder)
    stamps = {}
    total = hashlib.sha256()
    for record in source.records:
        row = [record.id, record.caption, *([HELD_OUT] if record.split == HELD_OUT else [])]
        for path in filter(None, (record.image, record.hint)):
            name = path.relative_to(source.folder).as_posix()
            stamps[name] = _stamp(path, known.get(name))
            row.append(stamps[name][2])
        total.update(json.dumps(row).encode() + b"\n")
    if stamps != known:
        write_text(folder / _STAMPS, json.dumps(stamps))
    return total.hexdigest()


def _stamp(path: Path, known: Any) -> list[Any]:
    """[size in bytes, time in ns, sha256]; the hash is taken over from `known` where size and time are the same."""
    try:
        state = path.stat()
        if isinstance(known, list) and known[:2] == [state.st_size, state.st_mtime_ns]:
            return known
        with path.open("rb") as file:
            return [state.st_size, state.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:  # decoding will say what is wrong with it
        return [0, 0, "unreadable"]


def _read_stamps(folder: Path) -> dict[str, Any]:
    """Only a memory: when it is missing or damaged, every file is hashed again."""
    try:
        stamps = json.loads((folder / _STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
