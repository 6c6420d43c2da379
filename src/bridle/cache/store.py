"""Reading a cache: a folder in, batches out. Tensors are mapped, not loaded: a data set may be larger than memory."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridle.cache.fingerprint import hash_fingerprint
from bridle.cache.index import Index, Row, damaged, read_index
from bridle.control.text import Text, join_texts
from bridle.data.example import HELD_OUT, TRAIN, Quarantined
from bridle.errors import CacheError

_OPEN_SHARDS = 64  # mapped at once; each is a file handle


@dataclass(frozen=True, kw_only=True)
class CachedBatch:
    """B encoded pairs.

    Args:
        mean, std: [B, C, h, w] float32, the posterior of the latents, times the base's scaling factor.
        hint: [B, K, H, W] float32 in [0, 1], or as the base's kind of control prepares it.
        captions: B texts.
        text: of the captions, float32.
    """

    mean: Tensor
    std: Tensor
    hint: Tensor
    captions: tuple[str, ...]
    text: Text

    def __getitem__(self, rows: slice) -> "CachedBatch":
        return CachedBatch(
            mean=self.mean[rows],
            std=self.std[rows],
            hint=self.hint[rows],
            captions=self.captions[rows],
            text=self.text[rows],
        )


class Cache:
    """A finished cache.

    Args:
        folder: where it lies.
        index: what it holds; use `Cache.open`, which reads it.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self._index = index
        self._places = {row.id: (shard.name, at, row) for shard in index.pairs for at, row in enumerate(shard.rows)}
        self._text_ends = list(accumulate(shard.length for shard in index.text))
        self._map = lru_cache(_OPEN_SHARDS)(self._map_shard)

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Raises: CacheError: there is no finished cache in the folder, or it is damaged."""
        return cls(folder, read_index(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself: what is mapped here cannot travel."""
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
        places = [self._find(id) for id in ids]
        rows, hint = [row for _, _, row in places], self._read_pairs("hint", places)
        return CachedBatch(
            mean=self._read_pairs("mean", places),
            std=self._read_pairs("std", places),
            hint=hint.float() / 255 if hint.dtype == torch.uint8 else hint,
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

    def _find(self, id: str) -> tuple[str, int, Row]:
        try:
            return self._places[id]
        except KeyError:
            raise CacheError(
                f"sample {id!r} is not in cache {self.folder}; expected an id such as {next(iter(self._places))!r}"
            ) from None

    def _read_pairs(self, key: str, places: Sequence[tuple[str, int, Row]]) -> Tensor:
        return torch.cat([self._read(name, key, at) for name, at, _ in places])

    def _read_text(self, captions: Sequence[int]) -> Text:
        parts = []
        for row in captions:
            shard = bisect_right(self._text_ends, row)
            start = self._text_ends[shard - 1] if shard else 0
            name, at = self._index.text[shard].name, row - start
            parts.append(Text(**{key: self._read(name, key, at) for key in self._keys(name)}))
        return join_texts(parts)

    def _keys(self, name: str) -> list[str]:
        try:
            return list(self._map(name).keys())
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder, f"{name}: {error}") from None

    def _read(self, name: str, key: str, at: int) -> Tensor:
        """One row, [1, ...]."""
        try:
            row: Tensor = self._map(name).get_slice(key)[at : at + 1]
        except (SafetensorError, OSError) as error:
            raise damaged(self.folder, f"{name}: {error}") from None
        return row

    def _map_shard(self, name: str) -> Any:
        return safe_open(self.folder / name, framework="pt")
