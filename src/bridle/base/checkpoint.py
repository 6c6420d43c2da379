"""A base as one file, as Stable Diffusion is often passed on. In: a .safetensors or .ckpt. Out: the stock pipeline.

Such a file holds weights alone. What they are configured as, and the tokenizer, comes from a diffusers folder without
weights: one beside the file, or that of the model which the weights look like, from the hub's cache or the hub.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

from bridle.base.blank import Blank, check_filled, in_memory
from bridle.base.folder import INDEX, first_line, list_lacking, models_of, read_layout
from bridle.base.hub import fetch
from bridle.errors import BaseError

SUFFIXES = (".safetensors", ".ckpt")
DENOISERS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")


def read_checkpoint(path: Path, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline of its family.

    Raises: BaseError: the file is damaged, holds no base, or needs a folder of configurations that is not there.
    """
    folder = find_configuration(path)
    layout = read_layout(folder)
    lacking = list_lacking(folder, layout, weights=False)
    if lacking:
        raise BaseError(f"base {path} needs {', '.join(lacking)}, which {folder} lacks; copy the whole folder")
    try:
        with in_memory(), Blank():
            pipeline = layout.pipeline.from_single_file(
                str(path), config=str(folder), local_files_only=True, torch_dtype=dtype, **layout.unwanted
            )
    except Exception as error:  # of many kinds, whatever a damaged file makes the libraries stumble over
        raise unreadable(path, f"{first_line(error)}, configured as {folder}") from error
    check_filled(models_of(pipeline), str(path))
    return pipeline


def find_configuration(path: Path) -> Path:
    """The folder with the index, the configurations and the tokenizer that belong to a file.

    Raises: BaseError: none lies beside the file, and the usual one cannot be fetched.
    """
    for folder in (path.with_suffix(""), path.parent):
        if (folder / INDEX).exists():
            return folder
    try:
        return fetch(usual_configuration(path), weights=False)
    except BaseError as error:
        beside = f"put the folder of its model, without weights, beside it as {path.with_suffix('')}"
        raise BaseError(f"base {path} comes without configuration and tokenizer: {beside}; or: {error}") from error


def usual_configuration(path: Path) -> str:
    """The hub id of the model that the weights look like. Raises: BaseError: it is no base."""
    try:
        weights: Any = load_single_file_checkpoint(str(path))
        names, usual = list(weights), fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    except Exception as error:
        raise unreadable(path, first_line(error)) from error
    if not any(isinstance(name, str) and name.startswith(DENOISERS) for name in names):
        raise BaseError(f"{path} holds no base; `bridle info {path}` says what it is")
    return str(usual)


def unreadable(path: Path, why: str) -> BaseError:
    remedy = "take another copy"
    if path.suffix == ".ckpt":
        remedy = "it may hold more than weights, and Bridle runs nothing from files: take it as .safetensors"
    return BaseError(f"base {path} cannot be loaded ({why}); {remedy}")
