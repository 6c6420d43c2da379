"""Bases: the embedded one, a diffusers folder, or a hub id. Out: a `Base`, a stock pipeline with encoders at hand."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from bridle.base.base import Base
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
        where: "embedded", a folder in diffusers format, or a hub id that is already in the local cache.
        dtype: of the weights in memory; training keeps float32 and computes in bfloat16.
        device: a torch device, or "auto": a GPU where there is one.

    Raises: BaseError: nothing is found there, or it is of no family that is supported.
    """
    embedded = str(where) == EMBEDDED
    folder = embedded_folder() if embedded else where
    device = pick_device(device)
    try:
        with quiet():
            pipeline = read_pipeline(folder, dtype)
    except (OSError, ValueError) as error:
        raise BaseError(explain(str(where), error)) from None
    return Base(pipeline.to(device), f"{EMBEDDED}/{Path(folder).name}" if embedded else str(where))


def read_pipeline(where: str | Path, dtype: torch.dtype) -> Any:
    """The stock pipeline, without a safety checker: training never draws for others to see."""
    index = Path(where) / DiffusionPipeline.config_name
    parts = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
    return DiffusionPipeline.from_pretrained(where, dtype=dtype, low_cpu_mem_usage=False, **unchecked)


def pick_device(name: str) -> str:
    """ "auto" is a GPU where there is one; any other name stays."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@contextmanager
def quiet() -> Generator[None]:
    """Without the libraries' bars for loading, which end before anyone has read them."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def explain(where: str, error: Exception) -> str:
    """One line for what went wrong, with what to do."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(where).exists():
        expected = "a diffusers folder with model_index.json, unet, vae, text_encoder, tokenizer and scheduler"
        return f"base folder {where} cannot be loaded ({first}); expected {expected}"
    remedy = 'give "embedded", the path of a diffusers folder, or the id of a model that is in the local cache'
    return f"base {where!r} was not found ({first}); {remedy}"
