"""This machine, as far as it decides what is fastest, and where what was found out about it is kept."""

import os
import platform
from functools import cache
from pathlib import Path

import torch


def cache_folder() -> Path:
    """The user's, for Bridle."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridle"


@cache
def processor() -> str:
    """This processor and this PyTorch."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, torch {torch.__version__}"
