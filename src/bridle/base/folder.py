"""A base as a folder in diffusers' format. In: its path. Out: the stock pipeline of its family.

The folder's index names classes to load; only those of diffusers and transformers are, and no code that lies beside.
"""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layout:
    """What a folder's index says.

    Attributes:
        family: of its denoiser and text encoders.
        parts: of the family's, the optional ones only where they are there; the denoiser first.
    """

    family: Family
    parts: tuple[str, ...]

    @property
    def pipeline(self) -> Any:
        """diffusers' class from text to image, whatever class the index names."""
        return getattr(diffusers, self.family.text_to_image)

    @property
    def unwanted(self) -> dict[str, Any]:
        """What it can do without, as arguments: parts that check or read pictures for others."""
        known = (*self.pipeline._optional_components, *self.family.optional)
        optional = {name: None for name in known if name not in self.parts}
        return optional | ({"requires_safety_checker": False} if "safety_checker" in optional else {})


def read_folder(folder: Path, dtype: torch.dtype) -> Any:
    """The text-to-image pipeline, without a safety checker: training never draws for others to see.

    One on pixels comes in float32 whatever is asked for: the stock pipeline hands its pictures to NumPy as they are.

    Raises: BaseError: files are missing or damaged, it is of no family, or it wants code of its own to run.
    """
    layout = read_layout(folder)
    lacking = list_lacking(folder, layout)
    if lacking:
        raise BaseError(f"base folder {folder} lacks {', '.join(lacking)}; expected {EXPECTED}")
    options = layout.unwanted | ({"variant": "fp16"} if has_half_only(folder, layout) else {})
    dtype = dtype if "vae" in layout.parts else torch.float32
    try:
        with Blank():
            pipeline = layout.pipeline.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False, **options)
    except Exception as error:  # of many kinds, whatever a damaged file makes the libraries stumble over
        raise BaseError(f"base folder {folder} cannot be loaded ({first_line(error)}); expected {EXPECTED}") from error
    check_filled(models_of(pipeline), str(folder))
    return pipeline


def read_layout(folder: Path) -> Layout:
    """Raises: BaseError: the index is missing, damaged, of no family, or wants code of its own to run."""
    index = read_index(folder)
    denoiser = index.get("unet") or index.get("transformer") or ("", "pipeline without U-Net or transformer")
    encoders = sum(name.startswith("text_encoder") for name in index)
    family = find_family(denoiser[1], encoders, f"base {folder}")
    parts = (*family.parts, *(name for name in family.optional if index.get(name)))
    for library, kind in filter(None, map(index.get, parts)):
        if library not in LIBRARIES:
            raise own_code(folder, f"{library}.{kind}")
    return Layout(family, parts)


def read_index(folder: Path) -> dict[str, tuple[str, str] | None]:
    """Library and class of every part, None where it is left out. Raises: BaseError: see `read_layout`."""
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
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (str(value[0]), str(value[1])) if value[0] else None for name, value in parts.items()}


def own_code(folder: Path, what: str) -> BaseError:
    return BaseError(
        f"base {folder} wants to run code of its own ({what}), and Bridle runs none; expected a pipeline of diffusers"
    )


def list_lacking(folder: Path, layout: Layout, weights: bool = True) -> list[str]:
    """What of the parts is not there, as patterns of files. Args: weights: whether they are needed as well."""
    lacking = []
    for part in layout.parts:
        wanted = weights and not part.startswith(WITHOUT_WEIGHTS)
        if not any(folder.glob(f"{part}/*.json")):
            lacking.append(f"{part}/*.json")
        if wanted and not any([*folder.glob(f"{part}/*.safetensors"), *folder.glob(f"{part}/*.bin")]):
            lacking.append(f"{part}/*.safetensors")
    return lacking


def has_half_only(folder: Path, layout: Layout) -> bool:
    """Whether the denoiser's weights were fetched in float16 alone, as its publishers name them."""
    names = [path.name for path in folder.glob(f"{layout.parts[0]}/*.safetensors")]
    return bool(names) and all(".fp16" in name for name in names)


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
