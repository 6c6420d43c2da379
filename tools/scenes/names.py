"""What a model is called in plain words, where it hangs or stands, and what it may be made of.

The decisions are in `names.toml`, made by eye; this only looks them up.
"""

import re
import tomllib
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parent / "names.toml"
SIZES = re.compile(r"\b\d+([x.,:]\d+)?\b|\(.*\)")


@cache
def _table() -> dict:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def is_left_out(key: str) -> bool:
    """Whether a person would not know what to call it, or it makes no picture. key: "<catalogue>/<model>"."""
    catalogue, model = key.split("/")
    rules = _table()["left_out"]
    return model in rules.get(catalogue, ()) or any(re.fullmatch(p, key) for p in rules["patterns"])


def plain_name(key: str, catalogue_name: str) -> str:
    """The reviewed name, or the catalogue's without sizes and capitals: "Bed 140x190" is a "bed"."""
    plain = " ".join(SIZES.sub(" ", catalogue_name).lower().split())
    return _table()["names"].get(key, plain)


def mount(key: str) -> str:
    """ "floor", "wall" or "ceiling"."""
    return next((where for where, keys in _table()["mount"].items() if key in keys), "floor")


def kind(name: str) -> str:
    """The first of the kinds whose pattern the whole name matches."""
    return next(kind for kind, pattern in _table()["kinds"].items() if re.fullmatch(pattern, name))
