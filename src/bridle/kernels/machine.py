"""This machine, as far as it decides what is fastest, and where what was found out about it is kept."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


def cache_folder() -> Path:
    """The user's, for Bridle. Raises: OSError: there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridle"
    except RuntimeError as error:  # a user without a name, as in some containers
        raise FileNotFoundError(f"{error}; set XDG_CACHE_HOME") from None


@cache
def processor() -> str:
    """This processor and this PyTorch."""
    return f"{said('model name') or platform.processor() or platform.machine()}, torch {torch.__version__}"


def instructions() -> str:
    """What this processor can do: a virtual one may be called as another that can do more."""
    return said("flags") or said("Features")


def said(name: str) -> str:
    """What Linux says of the first processor under that name; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
