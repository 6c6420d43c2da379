"""Hints made from pictures. A new annotator is one file here and one row in the table below."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from bridle.errors import ConfigError

if TYPE_CHECKING:
    from bridle.data.annotate.annotator import Annotator

_TABLE = {
    "canny": ("bridle.data.annotate.canny", "Canny"),
    "depth": ("bridle.data.annotate.scene_maps", "Depth"),
    "normals": ("bridle.data.annotate.scene_maps", "Normals"),
    "scribble": ("bridle.data.annotate.scribble", "Scribble"),
    "segmentation": ("bridle.data.annotate.scene_maps", "Segmentation"),
    "soft_edge": ("bridle.data.annotate.soft_edge", "SoftEdge"),
}
NAMES = tuple(_TABLE)


def get_annotator(name: str) -> "Annotator":
    """The annotator of that name, with its default settings. Raises: ConfigError: there is none."""
    check_name(name)
    module, kind = _TABLE[name]
    annotator: Annotator = getattr(import_module(module), kind)()
    return annotator


def check_name(name: str) -> None:
    """Raises: ConfigError: no annotator has this name; the message offers the nearest one."""
    if name not in _TABLE:
        near = difflib.get_close_matches(name, NAMES, 1)
        remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NAMES)}"
        raise ConfigError(f"unknown annotator {name!r}; {remedy}")
