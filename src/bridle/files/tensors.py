"""Weight files from anywhere, opened without running code. Out: `Weights`, tensors that are read when asked for.

In: `.safetensors`, torch's `.pth`, `.ckpt`, `.pt` and `.bin` (nothing but tensors is unpickled), or a diffusers folder
of one file or of shards. Names, shapes and types are known at once; a tensor's bytes stay in memory as long as it does.
"""

import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridle.errors import FileError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = (".pth", ".ckpt", ".pt", ".bin")
# What a diffusers folder may hold, the first one found is read.
FOLDER_NAMES = (
    WEIGHTS,
    f"{WEIGHTS}.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAPPED_BYTES = 1 << 28
DEEPEST = 4  # dictionaries in dictionaries; a pickle can hold one that holds itself


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.count * self.dtype.itemsize


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each read anew whenever it is asked for.

    Args:
        path: what messages name.
        specs: what is there.
        read: gives the tensor of a name, on the CPU.
        metadata: the text in the file's header.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.specs, self.metadata, self._read = path, dict(specs), dict(metadata or {}), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs.values())

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """Some of them under other names. Args: names: new name to the one in here."""
        specs = {new: self.specs[old] for new, old in names.items()}
        return Weights(self.path, specs, lambda new: self[names[new]], self.metadata)

    def cast(self, dtype: torch.dtype) -> "Weights":
        """All of them in another type. Raises, when it is read: FileError: a value is too large for it."""

        def read(name: str) -> Tensor:
            tensor = self[name].to(dtype)
            if not torch.isfinite(tensor).all():
                raise FileError(f"{name} in {self.path} has values too large for {dtype}; expected a wider type")
            return tensor

        specs = {name: Spec(dtype, spec.shape) for name, spec in self.specs.items()}
        return Weights(self.path, specs, read, self.metadata)

    def checked(self) -> "Weights":
        """Refuses, when it is read, a tensor with values that are no numbers."""

        def read(name: str) -> Tensor:
            tensor = self[name]
            wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
            if not torch.isfinite(wide).all():
                raise FileError(f"{name} in {self.path} holds NaN or infinity; take another copy, or an earlier save")
            return tensor

        return Weights(self.path, self.specs, read, self.metadata)


def open_weights(path: Path) -> Weights:
    """Open a file, or the weights of a diffusers folder.

    Raises: FileError: nothing is there, it is of another type, damaged, or would have to run code.
    """
    if path.is_dir():
        return open_weights(find_weights(path))
    if not path.exists():
        raise FileError(f"{path} does not exist; give a weight file, or a folder with {CONFIG}")
    if path.name.endswith(".safetensors.index.json"):
        return open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in PICKLED:
        return open_pickle(path)
    raise FileError(f"{path} is no weight file; expected .safetensors, {', '.join(PICKLED)}, or a diffusers folder")


def weight_files(path: Path) -> list[Path]:
    """The files that `open_weights` reads tensors from."""
    if path.is_dir():
        path = find_weights(path)
    if not path.name.endswith(".safetensors.index.json"):
        return [path]
    return sorted({path.parent / name for name in read_index(path).values()})


def find_weights(folder: Path) -> Path:
    for name in FOLDER_NAMES:
        if (folder / name).exists():
            return folder / name
    inside = folder / "control"  # where a run keeps it
    remedy = f"did you mean {inside}?" if inside.is_dir() else "expected a diffusers folder with its weights"
    raise FileError(f"{folder} has no {WEIGHTS}; {remedy}")


def open_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            specs = {name: read_spec(path, name, part) for name, part in slices.items()}
            metadata = file.metadata()
    except (SafetensorError, OSError, MemoryError) as error:
        raise damaged(path, error) from None
    return Weights(path, specs, MappedFile(path, specs), metadata)


class MappedFile:
    """Reads tensors from one safetensors file, and lets go of what it has read every now and then.

    A mapped file keeps each page that was ever read in memory; mapping it anew frees them.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path, self.specs = path, specs
        self.file: Any = None
        self.read_bytes = 0

    def __call__(self, name: str) -> Tensor:
        try:
            if self.file is None or self.read_bytes > MAPPED_BYTES:
                self.file, self.read_bytes = safe_open(self.path, framework="pt"), 0
            self.read_bytes += self.specs[name].size_bytes
            return self.file.get_tensor(name)
        except (SafetensorError, OSError, MemoryError) as error:
            raise damaged(self.path, error) from None


def read_spec(path: Path, name: str, part: Any) -> Spec:
    if part.get_dtype() not in DTYPES:
        raise FileError(f"{name} in {path} is of type {part.get_dtype()}; expected one of {', '.join(DTYPES)}")
    return Spec(DTYPES[part.get_dtype()], tuple(part.get_shape()))


def open_pickle(path: Path) -> Weights:
    """Nothing but tensors and plain containers is unpickled, so the file runs no code."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        tensors = dict(flatten(path, unwrap(found)))
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "weights only" in str(error).lower():
            remedy = "take the .safetensors of the same model; Bridle runs no code from a file"
            raise FileError(f"{path} holds more than tensors and would have to run code; {remedy}") from None
        raise damaged(path, error) from None
    except Exception as error:  # a damaged pickle can end in any of Python's errors
        raise damaged(path, error) from None
    if not tensors:
        raise FileError(f"{path} holds no tensors; expected the weights of a model")
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Weights(path, specs, lambda name: tensors[name].detach())


def unwrap(found: Any) -> Any:
    """Trainers wrap what they save: {"state_dict": {...}, "epoch": 3, ...}."""
    for _ in range(DEEPEST):
        if not (isinstance(found, dict) and isinstance(found.get("state_dict"), dict)):
            break
        found = found["state_dict"]
    return found


def flatten(path: Path, found: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dictionary, those of inner ones under dotted names. What is no tensor is no weight."""
    if not isinstance(found, dict) or depth > DEEPEST:
        raise FileError(f"{path} is no dictionary of tensors; expected the weights of a model")
    for name, value in found.items():
        if isinstance(value, dict):
            yield from flatten(path, value, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise FileError(f"{prefix}{name} in {path} is no plain tensor; expected dense ones, not quantised")
            yield f"{prefix}{name}", value


def open_shards(path: Path) -> Weights:
    """Several files and the list that says which tensor lies in which."""
    index = read_index(path)
    files = {name: open_weights(path.parent / name) for name in sorted(set(index.values()))}
    lost = [name for name, file in index.items() if name not in files[file].specs]
    if lost:
        raise FileError(f"{path.parent / index[lost[0]]} has no {lost[0]}, as {path.name} says; copy the folder again")
    specs = {name: files[file].specs[name] for name, file in index.items()}
    metadata = {key: text for file in files.values() for key, text in file.metadata.items()}
    return Weights(path, specs, lambda name: files[index[name]][name], metadata)


def read_index(path: Path) -> dict[str, str]:
    """Tensor to file, all of them beside the list. Raises: FileError: it names files elsewhere."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise FileError(f"{path} is damaged (no weight_map); copy the folder again")
    for name in index.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise FileError(f"{path} is damaged (it names the file {name!r}); copy the folder again")
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Raises: FileError: it is missing, or no table of settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path.parent} has no {path.name}; expected a control folder, such as RUN/control") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(found, dict):
        raise FileError(f"{path} is damaged (no table of settings); copy it again")
    return found


def damaged(path: Path, error: BaseException) -> FileError:
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return FileError(f"{path} is damaged ({first}); copy it again")
