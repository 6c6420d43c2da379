"""A safetensors file written tensor by tensor, so that memory holds one at a time whatever the file's size."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bridle.atomic import write_with
from bridle.files.tensors import DTYPES, Weights

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    path: Path, weights: Weights, metadata: Mapping[str, str], progress: Callable[[int], None] = lambda done_bytes: None
) -> None:
    """Write the file atomically.

    Args:
        weights: read one after another, while they are written.
        metadata: text for the header.
        progress: called after each tensor with the number of its bytes.

    Raises: FileError: a tensor cannot be read; nothing is left behind then.
    """
    # Wide types first, so that every tensor lies aligned in a mapped file.
    names = sorted(weights.specs, key=lambda name: (-weights.specs[name].dtype.itemsize, name))

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write_header(file, weights, names, metadata)
            for name in names:
                file.write(to_bytes(weights[name]))
                progress(weights.specs[name].size_bytes)

    write_with(path, fill)


def write_header(file: BinaryIO, weights: Weights, names: list[str], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        spec = weights.specs[name]
        end = offset + spec.size_bytes
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def to_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
