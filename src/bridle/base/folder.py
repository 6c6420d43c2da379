"""A base as a folder in diffusers' format. In: its path. Out: the stock pipeline of its family.

The folder's index names classes to load; only those of diffusers and transformers are, and no code that lies beside.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from bridle.base.blank import Blank, check_filled
from bridle.base.family import Family, find_family
from bridle.errors import BaseError

INDEX = "model_index.json"
EXPECTED = f"a diffusers folder with {INDEX}, unet or transformer, vae, text_encoder, tokenizer and scheduler"
LIBRARIES = ("diffusers", "transformers")
WITHOUT_WEIGHTS = ("tokenizer", "scheduler")


def read_folder(folder: Path, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline, without a safety checker: training never draws for others to see.

    Raises: BaseError: files are missing or damaged, it is of no family, or it wants code of its own to run.
    """
    family = read_family(folder)
    lacking = list_lacking(folder, family)
    if lacking:
        raise BaseError(f"base folder {folder} lacks {', '.join(lacking)}; expected {EXPECTED}")
    options = {"variant": "fp16", **unwanted(family)} if has_half_only(folder, family) else unwanted(family)
    try:
        with Blank():
            pipeline = pipeline_class(family).from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False, **options)
    except Exception as error:  # of many kinds, whatever a damaged file makes the libraries stumble over
        raise BaseError(f"base folder {folder} cannot be loaded ({first_line(error)}); expected {EXPECTED}") from error
    check_filled(models_of(pipeline), str(folder))
    return pipeline


def read_family(folder: Path) -> Family:
    """Of the parts that the index names. Raises: BaseError: it is missing, damaged, of no family, or wants code."""
    parts = read_index(folder)
    denoiser = parts.get("unet") or parts.get("transformer") or ("", "pipeline without U-Net or transformer")
    family = find_family(denoiser[1], sum(name.startswith("text_encoder") for name in parts), f"base {folder}")
    for name in family.parts:
        if name in parts and parts[name][0] not in LIBRARIES:
            raise own_code(folder, f"{parts[name][0]}.{parts[name][1]}")
    return family


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every part. Raises: BaseError: see `read_family`."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseError(f"base folder {folder} cannot be loaded (no {INDEX}); expected {EXPECTED}") from None
    except (ValueError, RecursionError):
        raise BaseError(f"base folder {folder} cannot be loaded ({INDEX} is damaged); take another copy") from None
    if not isinstance(index, dict):
        raise BaseError(f"base folder {folder} cannot be loaded ({INDEX} is no table); take another copy")
    if not isinstance(index.get("_class_name"), str):
        raise own_code(folder, str(index.get("_class_name")))
    return {name: (value[0], value[1]) for name, value in index.items() if is_part(value)}


def is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def own_code(folder: Path, what: str) -> BaseError:
    return BaseError(
        f"base {folder} wants to run code of its own ({what}), and Bridle runs none; expected a pipeline of diffusers"
    )


def list_lacking(folder: Path, family: Family, weights: bool = True) -> list[str]:
    """What of the family's parts is not there, as patterns of files. Args: weights: whether they are needed as well."""
    lacking = []
    for part in family.parts:
        wanted = weights and not part.startswith(WITHOUT_WEIGHTS)
        if not any(folder.glob(f"{part}/*.json")):
            lacking.append(f"{part}/*.json")
        if wanted and not any([*folder.glob(f"{part}/*.safetensors"), *folder.glob(f"{part}/*.bin")]):
            lacking.append(f"{part}/*.safetensors")
    return lacking


def has_half_only(folder: Path, family: Family) -> bool:
    """Whether the denoiser's weights were fetched in float16 alone, as its publishers name them."""
    names = [path.name for path in folder.glob(f"{family.parts[0]}/*.safetensors")]
    return bool(names) and all(".fp16" in name for name in names)


def pipeline_class(family: Family) -> Any:
    return getattr(diffusers, family.text_to_image)


def unwanted(family: Family) -> dict[str, Any]:
    """Parts that its pipelines can do without, as arguments: what checks or reads pictures for others."""
    optional = {name: None for name in pipeline_class(family)._optional_components if name not in family.parts}
    return optional | ({"requires_safety_checker": False} if "safety_checker" in optional else {})


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
