"""`index.json`: what a cache holds and what it was made from. Written last: a folder without it is no cache."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridle.atomic import write_text
from bridle.cache.fingerprint import PARTS, Fingerprint
from bridle.collector import uncollected
from bridle.data.example import Quarantined
from bridle.errors import CacheError

INDEX = "index.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)  # slots: there may be millions
class Row:
    """One sample of a shard of pairs.

    Args:
        id: the pair's id, "#" and the variant, such as "cat.png#1".
        caption: its row among all captions; 0 is the empty one.
        split: "train" or "held_out".
    """

    id: str
    caption: int
    split: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of pairs: its name in the folder, its size, and what is in its rows."""

    name: str
    size_bytes: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class TextShard:
    """A file of caption states: its name in the folder, its size, and how many rows it has."""

    name: str
    size_bytes: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """Everything about a cache but its tensors.

    Args:
        fingerprint: what it was made from.
        undecodable: pairs that the source lists but whose files could not be used.
        captions: distinct ones; row 0 is empty.
        pairs: shards of pairs.
        text: shards of caption states, rows in the order of `captions`.
    """

    fingerprint: Fingerprint
    undecodable: tuple[Quarantined, ...]
    captions: tuple[str, ...]
    pairs: tuple[Shard, ...]
    text: tuple[TextShard, ...]

    @property
    def shards(self) -> list[Shard | TextShard]:
        """Every file of tensors."""
        return [*self.pairs, *self.text]


def write_index(folder: Path, index: Index) -> None:
    write_text(folder / INDEX, json.dumps({"version": _VERSION, **asdict(index)}, ensure_ascii=False))


@uncollected()
def read_index(folder: Path) -> Index:
    """Read the index and check that every shard is there at its full size.

    Raises: CacheError: there is no index, it is damaged or of another version, or a shard is missing or cut short.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CacheError(f"{folder} holds no finished cache ({INDEX} is missing); build it") from None
    except (OSError, ValueError):
        raise damaged(folder, f"{INDEX} cannot be read") from None
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise damaged(folder, f"{INDEX} is not of version {_VERSION}")
    try:
        index = _parse(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged(folder, f"{INDEX} lacks what it should hold") from None
    _check_sizes(folder, index)
    return index


def damaged(folder: Path, what: str) -> CacheError:
    return CacheError(f"cache {folder} is damaged: {what}; delete the folder, it is rebuilt")


def _parse(content: dict[str, Any]) -> Index:
    """Raises: KeyError, TypeError, ValueError: the content is not what `write_index` writes."""
    if content["fingerprint"].keys() != PARTS:
        raise ValueError(content["fingerprint"])
    pairs: list[dict[str, Any]] = [
        {**shard, "rows": tuple(Row(**row) for row in shard["rows"])} for shard in content["pairs"]
    ]
    return Index(
        fingerprint=content["fingerprint"],
        undecodable=tuple(Quarantined(**item) for item in content["undecodable"]),
        captions=tuple(content["captions"]),
        pairs=tuple(Shard(**shard) for shard in pairs),
        text=tuple(TextShard(**shard) for shard in content["text"]),
    )


def _check_sizes(folder: Path, index: Index) -> None:
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            raise damaged(folder, f"{shard.name} is missing")
        if path.stat().st_size != shard.size_bytes:
            raise damaged(folder, f"{shard.name} has {path.stat().st_size} bytes, expected {shard.size_bytes}")
