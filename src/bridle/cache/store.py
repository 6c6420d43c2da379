"""Reading a cache: a folder in, batches out. Only what a batch holds is read: a data set may be larger than memory."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridle.cache.fingerprint import hash_fingerprint
from bridle.cache.index import Index, Shard, damaged, read_index
from bridle.cache.rows import RowFile, read_rows
from bridle.control.text import Text
from bridle.data.example import HELD_OUT, TRAIN, Quarantined
from bridle.errors import CacheError

_OPEN_SHARDS = 128  # each is a file handle, of which some systems allow a process no more than 256


@dataclass(frozen=True, kw_only=True)
class CachedBatch:
    """B encoded pairs.

    Args:
        mean, std: [B, C, h, w] float32, the posterior of the latents, times the base's scaling factor.
        kept_hint: [B, K, H, W] as the cache keeps it: uint8, or as the base's kind of control prepares it, float32.
        captions: B texts.
        text: of the captions, float32.
    """

    mean: Tensor
    std: Tensor
    kept_hint: Tensor
    captions: tuple[str, ...]
    text: Text

    @property
    def hint(self) -> Tensor:
        """As the control takes it: [B, K, H, W] float32 in [0, 1], or prepared."""
        return as_taken(self.kept_hint)

    def __getitem__(self, rows: slice) -> "CachedBatch":
        return CachedBatch(
            mean=self.mean[rows],
            std=self.std[rows],
            kept_hint=self.kept_hint[rows],
            captions=self.captions[rows],
            text=self.text[rows],
        )


def as_taken(hint: Tensor) -> Tensor:
    """A kept hint as the control takes it, wherever it lies: that is four times as large, so it is made last."""
    return hint.float().div_(255) if hint.dtype == torch.uint8 else hint


class Cache:
    """A finished cache.

    Args:
        folder: where it lies.
        index: what it holds; use `Cache.open`, which reads it.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self._index = index
        ids = (row.id for shard in index.pairs for row in shard.rows)
        self._places = {id: place for place, id in enumerate(ids)}  # numbers: a tuple per pair would be as large again
        self._pair_ends = list(accumulate(len(shard.rows) for shard in index.pairs))
        self._text_ends = list(accumulate(shard.length for shard in index.text))
        self._open = lru_cache(_OPEN_SHARDS)(partial(_open_shard, folder))

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Raises: CacheError: there is no finished cache in the folder, or it is damaged."""
        return cls(folder, read_index(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself: open ones cannot travel."""
        return Cache.open, (self.folder,)

    @property
    def train_ids(self) -> tuple[str, ...]:
        """Ids such as "cat.png#1": pair and variant."""
        return self._list_ids(TRAIN)

    @property
    def held_out_ids(self) -> tuple[str, ...]:
        """Ids of the pairs kept out of training, without any random draw."""
        return self._list_ids(HELD_OUT)

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change with the base, the annotator, the data settings or the data."""
        return hash_fingerprint(self._index.fingerprint)

    @property
    def annotator(self) -> str:
        """What the hints show: an annotator's name, or "files" where the data set brought them and does not say."""
        return str(self._index.fingerprint["annotator"]["name"])

    @property
    def undecodable(self) -> tuple[Quarantined, ...]:
        """Pairs that the source lists but whose files could not be used."""
        return self._index.undecodable

    @property
    def empty_text(self) -> Text:
        """Of the empty caption, float32: one row."""
        return self._read_text([0])

    def batch(self, ids: Sequence[str]) -> CachedBatch:
        """Read the samples of the given ids, in this order; an id may be given twice.

        Raises: CacheError: an id is unknown, or a shard is damaged.
        """
        found = [self._find(id) for id in ids]
        places, rows = [(shard.name, at) for shard, at in found], [shard.rows[at] for shard, at in found]
        return CachedBatch(
            mean=self._read("mean", places),
            std=self._read("std", places),
            kept_hint=self._read("hint", places),
            captions=tuple(self._index.captions[row.caption] for row in rows),
            text=self._read_text([row.caption for row in rows]),
        )

    def summary(self) -> str:
        """One line: how many pairs, of what kind, how large, where."""
        size_px = self._index.fingerprint["settings"]["size_px"]
        size_mb = sum(shard.size_bytes for shard in self._index.shards) / 1e6
        from_files = " from files" if self._index.fingerprint["annotator"].get("files") else ""
        return (
            f"{len(self.train_ids)} training and {len(self.held_out_ids)} held-out samples at {size_px} px, hints: "
            f"{self.annotator}{from_files}, {len(self._index.captions) - 1} captions, {size_mb:.1f} MB in {self.folder}"
        )

    def _list_ids(self, split: str) -> tuple[str, ...]:
        return tuple(row.id for shard in self._index.pairs for row in shard.rows if row.split == split)

    def _find(self, id: str) -> tuple[Shard, int]:
        """The shard of a sample, and its row there."""
        try:
            place = self._places[id]
        except KeyError:
            raise CacheError(
                f"sample {id!r} is not in cache {self.folder}; expected an id such as {next(iter(self._places))!r}"
            ) from None
        number, at = _locate(self._pair_ends, place)
        return self._index.pairs[number], at

    def _read_text(self, captions: Sequence[int]) -> Text:
        found = [_locate(self._text_ends, caption) for caption in captions]
        places = [(self._index.text[number].name, at) for number, at in found]
        return Text(**{key: self._read(key, places) for key in self._open(places[0][0]).columns})

    def _read(self, key: str, places: Sequence[tuple[str, int]]) -> Tensor:
        """Rows of shards, [B, ...]. Raises: CacheError: a shard is damaged."""
        files = [(self._open(name), at) for name, at in places]
        try:
            return read_rows(files, key)
        except (ValueError, OSError) as error:
            names = ", ".join(sorted({name for name, _ in places}))
            raise damaged(self.folder, f"{names}: {error}") from None


def _locate(ends: Sequence[int], place: int) -> tuple[int, int]:
    """Of rows that are counted through all shards: which shard, and which of its rows. Args: ends: of the shards."""
    number = bisect_right(ends, place)
    return number, place - (ends[number - 1] if number else 0)


def _open_shard(folder: Path, name: str) -> RowFile:
    """Raises: CacheError: it cannot be read, or is damaged."""
    try:
        return RowFile(folder / name)
    except (ValueError, OSError) as error:
        raise damaged(folder, f"{name}: {error}") from None
