"""Named tensors to one safetensors file per rank, and back at any number of ranks, sharded or whole.

A file says in its metadata where each of its tensors begins in the whole one, as PyTorch's distributed checkpoints do,
so `torch.distributed.checkpoint.HuggingFaceStorageReader` reads them too. Its writer is not used: it serialises in
memory, which takes the state's size twice over, and a third of the speed.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from bridle.errors import TrainError

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # PyTorch's names


@dataclass(frozen=True)
class Piece:
    """A box out of a whole tensor.

    Attributes:
        values: a tensor, or a slice of a mapped file, which reads what is asked of it.
        start, shape: where the box begins in the whole, and its size; of equal length, empty for a scalar.
    """

    values: Any
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.start, self.shape, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.values[tuple(slice(0, 0) for _ in self.shape)].dtype
        return dtype


def own_pieces(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Piece]:
    """What this rank has to write: its shards, and on the main one what is not sharded. Nothing is copied."""
    pieces = {name: own_piece(tensor) for name, tensor in tensors.items() if main or isinstance(tensor, DTensor)}
    return {
        name: piece for name, piece in pieces.items() if not isinstance(tensors[name], DTensor) or piece.values.numel()
    }


def own_piece(tensor: Tensor) -> Piece:
    """The part of a tensor that lies in this process: all of it, or a shard, which may be empty."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    (chunk,) = tensor.__create_chunk_list__()
    return Piece(tensor.to_local(), tuple(chunk.offsets), tuple(chunk.sizes))


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write a file, straight from where the tensors lie if that is the CPU."""
    sharding = {name: {OFFSETS: piece.start} for name, piece in pieces.items()}
    save_file(to_write(pieces), path, {"format": "pt", SHARDING: json.dumps(sharding)})


def to_write(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """As safetensors wants them: on the CPU, contiguous, and no two in the same memory."""
    tensors: dict[str, Tensor] = {}
    taken = set()  # 8-bit optimisers keep one table under many names
    for name, piece in pieces.items():
        tensor = piece.values.cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return tensors


def read_pieces(paths: Iterable[Path], into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The whole tensors out of the files of all ranks.

    Args:
        into: filled in place where given, each rank its own shards, without a word between the ranks; its names,
            shapes and types must be those of the files.

    Returns: `into`, or new tensors on the CPU.
    Raises: TrainError: they do not fit. SafetensorError, OSError: a file cannot be read.
    """
    with ExitStack() as files, torch.no_grad():
        saved = index(paths, files)
        wholes = {name: (whole_shape(pieces), pieces[0].dtype) for name, pieces in saved.items()}
        if into is None:
            into = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wholes.items()}
        check_fit(wholes, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in into.items()})
        for name, tensor in into.items():
            target = own_piece(tensor)
            for piece in saved[name]:
                copy_overlap(piece, target)
    return dict(into)


def index(paths: Iterable[Path], files: ExitStack) -> dict[str, list[Piece]]:
    """The pieces of each tensor, mapped, not read; the files stay open as long as the stack."""
    found = defaultdict(list)
    for path in paths:
        file = files.enter_context(safe_open(path, framework="pt"))
        sharding = json.loads(file.metadata()[SHARDING])
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            values = file.get_slice(name)
            found[name].append(Piece(values, tuple(sharding[name][OFFSETS]), tuple(values.get_shape())))
    return found


def whole_shape(pieces: list[Piece]) -> tuple[int, ...]:
    return tuple(max(ends) for ends in zip(*(piece.end for piece in pieces), strict=True))


def check_fit(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises: TrainError: names, shapes or types differ; it shows the first three that do."""
    names = sorted(saved.keys() | wanted.keys())
    wrong = [name for name in names if saved.get(name) != wanted.get(name)]
    if wrong:
        shown = [f"{name} was {show(saved.get(name))}, is {show(wanted.get(name))}" for name in wrong[:3]]
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        remedy = "undo what changed the base, the control or its training, or start a run in another folder"
        raise TrainError(f"the checkpoint is of another run: {'; '.join(shown)}{more}: {remedy}")


def show(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not there" if kind is None else f"{list(kind[0])} {str(kind[1]).removeprefix('torch.')}"


def copy_overlap(saved: Piece, target: Piece) -> None:
    """Copy what two boxes of one tensor share."""
    low = [max(pair) for pair in zip(saved.start, target.start, strict=True)]
    high = [min(pair) for pair in zip(saved.end, target.end, strict=True)]
    if all(start < end for start, end in zip(low, high, strict=True)):
        target.values[box(target, low, high)].copy_(saved.values[box(saved, low, high)])


def box(piece: Piece, low: list[int], high: list[int]) -> tuple[slice, ...]:
    """Where the box from `low` to `high` of the whole lies in a piece."""
    return tuple(slice(a - start, b - start) for a, b, start in zip(low, high, piece.start, strict=True))
