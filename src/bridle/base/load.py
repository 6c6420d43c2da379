"""Bases: the embedded one, a folder, a checkpoint, or a hub id. Out: a `Base`, a stock pipeline and its encoders."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from bridle.base.base import Base
from bridle.base.checkpoint import SUFFIXES, read_checkpoint
from bridle.base.folder import EXPECTED, read_folder
from bridle.base.hub import HUB_ID, fetch
from bridle.errors import BaseError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def embedded_folder() -> Path:
    """The newest base that the package carries: `embedded/v0`, `embedded/v1`, ..."""
    versions = sorted(EMBEDDED_FOLDER.glob("v*"), key=lambda path: int(path.name[1:]))
    if not versions:
        raise BaseError(f"this installation carries no embedded base in {EMBEDDED_FOLDER}; install the package again")
    return versions[-1]


def load_base(where: str | Path = EMBEDDED, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
    """Load a base.

    Args:
        where: "embedded", a folder in diffusers format, a checkpoint in one file (.safetensors, or .ckpt, of which only
            weights are read), or the id of a model at the hub, which is fetched unless it is in the local cache.
        dtype: of the weights in memory; training keeps float32 and computes in bfloat16. A base on pixels is float32.
        device: a torch device, or "auto": a GPU where there is one.

    Raises: BaseError: nothing is found there, files are missing or damaged, it is of no family that is supported, or
        the device is not there.
    """
    device = pick_device(device)
    embedded = str(where) == EMBEDDED
    with quiet():
        path = embedded_folder() if embedded else find(str(where))
        pipeline = read_folder(path, dtype) if path.is_dir() else read_checkpoint(path, dtype)
    return Base(pipeline.to(device), f"{EMBEDDED}/{path.name}" if embedded else str(where))


def find(where: str) -> Path:
    """A folder or checkpoint on this machine. Raises: BaseError: there is none, and it cannot be fetched."""
    path = Path(where).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in SUFFIXES):
        return path
    if path.is_file():
        raise BaseError(
            f"base {where} is a {path.suffix or 'bare'} file; expected {' or '.join(SUFFIXES)}, or a folder"
        )
    if HUB_ID.fullmatch(where) and path.suffix not in SUFFIXES:
        return fetch(where)
    expected = f'give "embedded", the path of {EXPECTED}, a checkpoint ({" or ".join(SUFFIXES)}), or a hub id'
    raise BaseError(f"base {where!r} was not found; {expected}")


def pick_device(name: str) -> str:
    """ "auto" is a GPU where there is one; any other name stays. Raises: BaseError: there is no such device here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not is_there(name):
        usable = f"expected {'cpu or cuda' if torch.cuda.is_available() else 'cpu'}, or auto, which takes what is there"
        raise BaseError(f"device {str(name)!r} is none that PyTorch can use on this machine; {usable}")
    return name


def is_there(name: str) -> bool:
    """Asked by counting, because to try a GPU would take memory on it."""
    try:
        device = torch.device(name)
        count: int = torch.get_device_module(device).device_count()
    except RuntimeError:  # no device of any machine, or nothing that computes
        return False
    return (device.index or 0) < count


@contextmanager
def quiet() -> Generator[None]:
    """Without the libraries' bars for loading, which end before anyone has read them, and their advice."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    levels = [(library, library.get_verbosity()) for library in (*libraries, hub_logging)]
    for library, _ in levels:
        library.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in shown:
            library.enable_progress_bar()
