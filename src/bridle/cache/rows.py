"""One shard, read row by row. In: a safetensors file. Out: rows, straight into a batch.

Read, not mapped: a mapped file's pages count as this process's memory until it is closed, gigabytes for a large data
set, and each of them costs a fault before it costs a copy.
"""

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_LENGTH_BYTES = 8  # of the header, in front of it


@dataclass(frozen=True)
class Column:
    """A tensor of the file, [N, ...].

    Attributes:
        start: where its bytes begin in the file.
        shape: of a row.
        row_bytes: of a row.
    """

    start: int
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int


class RowFile:
    """An open shard. It closes when nobody holds it any more.

    Attributes:
        columns: its tensors by name, in the order of the file.

    Raises: ValueError: it is no safetensors file of such tensors. OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        size = os.fstat(self._file.fileno()).st_size
        if not 0 < length <= size - _LENGTH_BYTES:
            raise ValueError("its header is damaged")
        header: dict[str, Any] = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        try:
            self.columns = {name: _column(entry, _LENGTH_BYTES + length, size) for name, entry in header.items()}
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ValueError("its header lacks what it should hold") from None

    def read(self, name: str, row: int, buffer: Any) -> None:
        """Fill a buffer of `row_bytes` with a row. Raises: ValueError: there is no such row. OSError: it is cut off."""
        column = self.columns.get(name)
        if column is None or not 0 <= row < column.count or len(buffer) != column.row_bytes:
            raise ValueError(f"it has no row {row} of {name} of {len(buffer)} bytes")
        if column.row_bytes and self._read_at(column.start + row * column.row_bytes, buffer) != column.row_bytes:
            raise OSError(f"row {row} of {name} is cut off")

    def _read_at(self, start: int, buffer: Any) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start)
        self._file.seek(start)  # Windows: it has no fork, so no other process moves this position
        return self._file.readinto(buffer) or 0


def read_rows(places: Sequence[tuple[RowFile, int]], name: str) -> Tensor:
    """Rows of one or several files as one tensor [B, ...].

    Raises: ValueError, OSError: see `RowFile.read`; or a file's rows differ from the first one's.
    """
    column = places[0][0].columns.get(name)
    if column is None:
        raise ValueError(f"it has no {name}")
    raw = torch.empty(len(places), column.row_bytes, dtype=torch.uint8)
    for buffer, (file, row) in zip(raw.numpy(), places, strict=True):
        file.read(name, row, buffer)
    return raw.flatten().view(column.dtype).view(len(places), *column.shape)


def _column(entry: dict[str, Any], data: int, size: int) -> Column:
    """Of a header's entry; `data` is where the tensors' bytes begin, `size` the file's."""
    count, shape, dtype = entry["shape"][0], entry["shape"][1:], TYPES[entry["dtype"]]
    start, end = entry["data_offsets"]
    row_bytes = torch.Size(shape).numel() * dtype.itemsize
    if not 0 <= start <= end <= size - data or end - start != count * row_bytes:
        raise ValueError("its header does not fit its size")
    return Column(data + start, count, tuple(shape), dtype, row_bytes)
