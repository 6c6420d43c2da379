"""Bases at the hub, by their id: from its cache on this machine, or else fetched into it. Out: a diffusers folder."""

import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from bridle.base.folder import EXPECTED, INDEX, first_line, list_lacking, read_layout
from bridle.errors import BaseError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CONFIGURATIONS = ["*.json", "*.txt", "*.model"]  # tokenizers included


def fetch(hub_id: str, weights: bool = True) -> Path:
    """The folder of a model.

    Args: weights: False is content with, and fetches, configurations and tokenizers alone.
    Raises: BaseError: it is not in the cache and cannot be fetched, or it is of no family.
    """
    cached = cached_folder(hub_id)
    lacking = [] if cached is None else list_lacking(cached, read_layout(cached), weights)
    if cached is not None and not lacking:
        return cached
    try:
        fetched = Path(DiffusionPipeline.download(hub_id, safety_checker=None) if weights else fetch_some(hub_id))
    except Exception as error:  # of many libraries; whatever it is, the model is not to be had
        raise BaseError(explain(hub_id, lacking, error)) from error
    lacking = list_lacking(fetched, read_layout(fetched), weights)
    if lacking:  # without a network, what is there already is handed out as it is
        raise BaseError(explain(hub_id, lacking, OSError("no network, or the hub does not have them")))
    return fetched


def fetch_some(hub_id: str) -> str:
    return snapshot_download(hub_id, allow_patterns=CONFIGURATIONS)


def cached_folder(hub_id: str) -> Path | None:
    """None: the cache does not hold it."""
    index = try_to_load_from_cache(hub_id, INDEX)
    return Path(index).parent if isinstance(index, str) else None


def explain(hub_id: str, lacking: list[str], error: BaseException) -> str:
    """What is missing, and which files to put where."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    found = f"the cache lacks its {', '.join(lacking)}" if lacking else "it is not in the cache"
    while error.__cause__ is not None:  # the libraries wrap "no network" in paragraphs of their own
        error = error.__cause__
    why = first_line(error).split(". ")[0]
    return (
        f"base {hub_id!r} was not found: {found}, and it cannot be fetched ({why}); run `hf download"
        f" {hub_id}` where there is a network and copy {place} from there to here, or give the path of {EXPECTED}"
    )
