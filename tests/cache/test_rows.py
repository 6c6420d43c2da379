"""Rows of a shard are what safetensors says they are, and reading them keeps nothing mapped and few files open."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridle.cache.rows import RowFile, read_rows

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
TENSORS = {
    "bytes": torch.arange(60, dtype=torch.uint8).view(5, 3, 4),
    "floats": torch.linspace(-1, 1, 40).view(5, 2, 4),
    "halves": torch.linspace(-1, 1, 15).view(5, 3).half(),
    "brains": torch.linspace(-1, 1, 5).bfloat16(),
    "nothing": torch.zeros(5, 0, 2),
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "shard.safetensors", metadata={"made": "here"})
    return tmp_path / "shard.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_rows_are_those_that_safetensors_reads(shard: Path, name: str) -> None:
    file, rows = RowFile(shard), [4, 0, 0, 3]
    read = read_rows([(file, row) for row in rows], name)
    assert read.dtype == TENSORS[name].dtype
    assert torch.equal(read, load_file(shard)[name][rows])


def test_rows_come_from_several_files(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"floats": TENSORS["floats"] + 5}, other)
    read = read_rows([(RowFile(other), 1), (RowFile(shard), 1)], "floats")
    assert torch.equal(read, torch.stack([TENSORS["floats"][1] + 5, TENSORS["floats"][1]]))


@LINUX
def test_what_was_read_is_neither_mapped_nor_open_afterwards(shard: Path) -> None:
    file = RowFile(shard)
    read_rows([(file, row) for row in range(5)], "floats")
    assert shard.name not in Path("/proc/self/maps").read_text()
    del file
    assert shard.resolve() not in [Path(f"/proc/self/fd/{name}").resolve() for name in os.listdir("/proc/self/fd")]


def test_reading_moves_no_position_that_a_forked_process_would_share(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RowFile(shard)
    before = os.lseek(file._file.fileno(), 0, os.SEEK_CUR)
    read = read_rows([(file, 2)], "floats")
    assert os.lseek(file._file.fileno(), 0, os.SEEK_CUR) == before or not hasattr(os, "preadv")
    monkeypatch.delattr(os, "preadv", raising=False)  # as on Windows
    assert torch.equal(read_rows([(file, 2)], "floats"), read)


def rewrite(path: Path, **entry: Any) -> None:
    """Give the only tensor of a file another header."""
    header = json.dumps({"floats": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160], **entry}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(160))


@pytest.mark.parametrize(
    "entry",
    [{}, {"dtype": "F33"}, {"shape": [6, 8]}, {"shape": 5}, {"shape": []}, {"data_offsets": [4, 164]}],
    ids=str,
)
def test_a_header_that_does_not_fit_is_an_error(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = tmp_path / "shard.safetensors"
    rewrite(path, **entry)
    if not entry:
        assert read_rows([(RowFile(path), 4)], "floats").shape == (1, 8)
        return
    with pytest.raises(ValueError, match="header"):
        RowFile(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (5).to_bytes(8, "little") + b"{no}}", bytes(20)])
def test_what_is_no_shard_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shard.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r".+"):
        RowFile(tmp_path / "shard.safetensors")


def test_rows_that_are_not_there_are_errors(shard: Path) -> None:
    file = RowFile(shard)
    with pytest.raises(ValueError, match="no row 5 of floats"):
        read_rows([(file, 5)], "floats")
    with pytest.raises(ValueError, match="no other"):
        read_rows([(file, 0)], "other")
    os.truncate(shard, shard.stat().st_size - 200)
    with pytest.raises(OSError, match="cut off"):
        read_rows([(file, 4)], "bytes" if file.columns["bytes"].start > file.columns["floats"].start else "floats")
