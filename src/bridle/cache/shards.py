"""Writing tensors to safetensors shards, so that a data set larger than memory can be built and read.

Latents stay float32: a Stable Diffusion posterior's standard deviation reaches 1e-7, which float16 rounds away, and the
hint takes most of the space anyway.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bridle.atomic import write_with
from bridle.cache.encode import Encoders
from bridle.cache.index import Row, Shard, TextShard
from bridle.control.text import Text, join_texts

PAIRS_PER_SHARD = 256  # at 512 px about 200 MB, of which most is the hint
TEXT_SHARD_BYTES = 2**28  # of Stable Diffusion about 1,100 captions, of Flux 32


class PairWriter:
    """Collects encoded pairs and writes `pairs-00000.safetensors`, `pairs-00001.safetensors`, ...

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._rows: list[Row] = []
        self._parts: list[Mapping[str, Tensor]] = []

    def add(self, rows: list[Row], mean: Tensor, std: Tensor, hint: Tensor) -> None:
        """Add B pairs: `mean`, `std` [B, C, h, w]; `hint` [B, K, H, W] uint8, or prepared floats [B, ...]."""
        self._rows += rows
        self._parts.append({"mean": mean.cpu().float(), "std": std.cpu().float(), "hint": hint})
        if len(self._rows) >= PAIRS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected, if anything."""
        if not self._rows:
            return
        name = f"pairs-{len(self.shards):05}.safetensors"
        tensors = {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}
        size_bytes = _write(self._folder / name, tensors)
        self.shards.append(Shard(name=name, size_bytes=size_bytes, rows=tuple(self._rows)))
        self._rows, self._parts = [], []


def write_captions(folder: Path, captions: list[str], encoders: Encoders, batch: int) -> list[TextShard]:
    """Encode captions and write `text-00000.safetensors`, ...: the tensors of `Text`, float32."""
    shards: list[TextShard] = []
    for text in _gather(captions, encoders, batch):
        name = f"text-{len(shards):05}.safetensors"
        shards.append(TextShard(name=name, size_bytes=_write(folder / name, text.tensors), length=len(text)))
    return shards


def _gather(captions: list[str], encoders: Encoders, batch: int) -> Iterator[Text]:
    """Encoded captions, as many at once as a shard takes; those of large bases are megabytes each."""
    parts: list[Text] = []
    for row in range(0, len(captions), batch):
        parts.append(encoders.encode_captions(captions[row : row + batch]).to("cpu", torch.float32))
        size_bytes = sum(tensor.nbytes for part in parts for tensor in part.tensors.values())
        if size_bytes >= TEXT_SHARD_BYTES:
            yield join_texts(parts)
            parts = []
    if parts:
        yield join_texts(parts)


def _write(path: Path, tensors: dict[str, Tensor]) -> int:
    """Returns: bytes written."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_with(path, lambda temporary: save_file(whole, temporary))
    return path.stat().st_size
