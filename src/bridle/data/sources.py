"""Which pairs a folder holds. In: a folder in one of three layouts. Out: records, and what was set aside and why.

Fill50K          prompt.json, one object a line: {"source": hint, "target": picture, "prompt": caption}
metadata.jsonl   one object a line: "file_name"; "text", "caption" or "prompt"; and if the data set brings hints, "hint"
                 or "conditioning_image", or a column for each condition, such as "depth"; "split" if it brings one
folder           pictures at any depth, each with its caption in a .txt file of the same name
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridle.data.example import HELD_OUT, TRAIN, Quarantined, Record
from bridle.errors import DataError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OTHER_PICTURES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg")
_FILL50K, _METADATA = "prompt.json", "metadata.jsonl"
_SPLITS = {TRAIN: TRAIN, **dict.fromkeys((HELD_OUT, "validation", "val", "test"), HELD_OUT)}
_SHOWN = 3  # reasons in an error message


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pairs of one folder.

    Args:
        folder: the data set.
        records: with unique ids, in a stable order; either all of them have a hint file or none has.
        quarantine: what was set aside while listing.
        condition: what the hint files show, such as "depth", where the column that names them says so.
    """

    folder: Path
    records: tuple[Record, ...]
    quarantine: tuple[Quarantined, ...]
    condition: str | None = None

    @property
    def has_hints(self) -> bool:
        """Whether the data set brings its hints, so that no annotator is needed."""
        return self.records[0].hint is not None


@dataclass(frozen=True)
class _Keys:
    """How one layout calls things; of several names the first one present counts. split: None where it has none."""

    image: tuple[str, ...]
    caption: tuple[str, ...]
    hint: tuple[str, ...]
    needs_hint: bool
    split: str | None


_LISTS = {
    _FILL50K: _Keys(("target",), ("prompt",), ("source",), True, None),
    _METADATA: _Keys(("file_name",), ("text", "caption", "prompt"), ("hint", "conditioning_image"), False, "split"),
}


def open_source(folder: Path, condition: str | None = None) -> Source:
    """Recognise a folder's layout and list its pairs. Pictures are not opened here.

    A line or file that cannot be used is named in the quarantine and is no error by itself.

    Args:
        folder: the data set.
        condition: the column of a metadata.jsonl whose files are the hints, unless lines name a "hint" as such.

    Raises: DataError: the folder is missing, holds two lists, or nothing usable.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist or is no folder; give the folder that holds the pictures")
    lists = [name for name in _LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise DataError(f"data folder {folder} holds both {' and '.join(lists)}; remove the one that is not meant")
    keys = _choose_keys(folder, lists[0], condition) if lists else None
    listed = list(_read_list(folder, lists[0], keys) if keys else _read_folder(folder))
    return _collect(folder, listed, condition if keys and keys.hint == (condition,) else None)


def _choose_keys(folder: Path, name: str, condition: str | None) -> _Keys:
    """What the layout calls things; the hint is the condition's column where lines have it and name no "hint" as such.

    Settled for all lines at once, so that no two kinds of hints come together.
    """
    keys = _LISTS[name]
    if condition is None or keys.needs_hint:
        return keys
    present = {key for line in _lines(folder, name) for key in _named(line[1])}
    return replace(keys, hint=(condition,)) if condition in present and present.isdisjoint(keys.hint) else keys


def _named(line: bytes) -> set[str]:
    """The keys of a line that have a value; none where it cannot be read, which `_read_line` will say."""
    try:
        return {key for key, value in _parse(line).items() if value is not None}
    except DataError:
        return set()


def _collect(folder: Path, listed: list[Record | Quarantined], condition: str | None) -> Source:
    has_hints = any(isinstance(item, Record) and item.hint is not None for item in listed)
    records: dict[str, Record] = {}
    quarantine = []
    for item in listed:
        if isinstance(item, Quarantined):
            quarantine.append(item)
        elif item.id in records:
            quarantine.append(Quarantined(id=item.id, reason="listed twice; the first one counts"))
        elif has_hints and item.hint is None:
            quarantine.append(Quarantined(id=item.id, reason="names no hint while others do"))
        else:
            records[item.id] = item
    if not records:
        raise DataError(_describe_empty(folder, quarantine))
    return Source(
        folder=folder,
        records=tuple(records.values()),
        quarantine=tuple(quarantine),
        condition=condition if has_hints else None,
    )


def _describe_empty(folder: Path, quarantine: list[Quarantined]) -> str:
    if not quarantine:
        expected = f"{_FILL50K}, {_METADATA}, or pictures with .txt captions"
        return f"data folder {folder} holds no pictures; expected {expected}"
    shown = "; ".join(f"{item.id}: {item.reason}" for item in quarantine[:_SHOWN])
    return f"data folder {folder} holds no usable pair; {len(quarantine)} were set aside, such as {shown}"


def _read_folder(folder: Path) -> Iterator[Record | Quarantined]:
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in (*PICTURE_SUFFIXES, *_OTHER_PICTURES):
            continue
        id = path.relative_to(folder).as_posix()
        if not _is_text(id):
            yield Quarantined(
                id=id.encode(errors="backslashreplace").decode(), reason="its name is not UTF-8; rename it"
            )
            continue
        if suffix in _OTHER_PICTURES:
            yield Quarantined(id=id, reason=f"is a {suffix} file; save it as PNG, JPEG, WebP or BMP")
            continue
        try:
            image = _locate(folder, id)
            caption_name = Path(id).with_suffix(".txt").as_posix()
            caption = _locate(folder, caption_name).read_text(encoding="utf-8-sig").strip()
            yield Record(id=id, image=image, hint=None, caption=caption)
        except UnicodeDecodeError:
            yield Quarantined(id=id, reason=f"{caption_name} is not UTF-8 text")
        except (DataError, OSError) as error:
            yield Quarantined(id=id, reason=str(error))


def _read_list(folder: Path, name: str, keys: _Keys) -> Iterator[Record | Quarantined]:
    for number, line in _lines(folder, name):
        yield _read_line(folder, line, f"{name}:{number}", keys)


def _lines(folder: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a list that are not empty, with their numbers from 1."""
    with (folder / name).open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _read_line(folder: Path, line: bytes, place: str, keys: _Keys) -> Record | Quarantined:
    """`place` names a line that is too broken to have an id of its own."""
    id = place
    try:
        row = _parse(line)
        image = _take(row, keys.image)
        id = os.path.normpath(image).replace(os.sep, "/")
        caption = _take(row, keys.caption)
        with_hint = keys.needs_hint or any(row.get(key) is not None for key in keys.hint)
        hint = _locate(folder, _take(row, keys.hint)) if with_hint else None
        split = _read_split(row, keys)
        return Record(id=id, image=_locate(folder, image), hint=hint, caption=caption.strip(), split=split)
    except DataError as error:
        return Quarantined(id=id, reason=f"{error} ({place})" if id != place else str(error))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # ValueError: no UTF-8 or no JSON; RecursionError: nested too deep
        raise DataError("not a line of JSON") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    return row


def _take(row: dict[str, Any], keys: tuple[str, ...]) -> str:
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {value!r}"
        raise DataError(f"{' or '.join(keys)} {found}; expected text")
    if not _is_text(value):
        raise DataError(f"{' or '.join(keys)} holds half a character (a lone surrogate); expected text")
    return value


def _read_split(row: dict[str, Any], keys: _Keys) -> str | None:
    value = row.get(keys.split) if keys.split else None
    if value is None:
        return None
    if not isinstance(value, str) or value not in _SPLITS:
        raise DataError(f"split is {value!r}; expected one of {', '.join(_SPLITS)}")
    return _SPLITS[value]


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON escapes and old archives' file names need not be."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _locate(folder: Path, name: str) -> Path:
    """The file of that name inside the folder.

    Raises: DataError: it is missing, or lies (or links) elsewhere; or its name leads out and in again, by the folder's
        own: it would be another name for a file that has one, and another again once the folder moves.
    """
    try:
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve())
        present = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a zero byte, a loop of links
        raise DataError(f"{name!r} is no usable path") from None
    if Path(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == os.pardir or not inside:
        raise DataError(f"{name} leads out of the data folder")
    if not present:
        raise DataError(f"{name} is missing")
    return path
