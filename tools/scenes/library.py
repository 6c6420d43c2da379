"""The models that there are: names, licences, authors, and which of them no training may see."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from bridle.errors import DataError

CC0, CC_BY, CC_BY_US = "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model. `size_m`: width (x), height (y), depth (z); the front looks along +z."""

    key: str
    name: str
    kind: str
    mount: str
    licence: str
    creator: str
    title: str
    size_m: tuple[float, float, float]
    held_out: bool = False


def load(out: Path) -> list[Model]:
    """The catalogue that `build` wrote."""
    path = out / "catalogue.jsonl"
    if not path.exists():
        raise DataError(f"{path} is missing; expected the model catalogue; run tools/scenes/catalogue.py --out {out}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Model(**{**row, "size_m": tuple(row["size_m"])}) for row in rows]


def hold_out(models: list[Model]) -> list[Model]:
    """Mark the objects that no training may see: whole models, and of every name that has three, one in four.

    So each held-out object has a name that training knows, and a shape that it does not. Chosen by hash: the same
    ones on every machine, for the base and for the controls.
    """
    groups: dict[tuple[str, bool], list[Model]] = defaultdict(list)
    for model in models:
        groups[model.name, model.licence == CC0].append(model)
    known = defaultdict(int)
    for model in models:
        known[model.name] += 1
    chosen = set()
    for (name, _), group in groups.items():
        ranked = sorted(group, key=lambda m: hashlib.sha256(f"bridle-scenes-1 {m.key}".encode()).digest())
        count = max(1, len(group) // 4) if known[name] >= 3 else 0
        chosen |= {m.key for m in ranked[: min(count, known[name] - 2)]}
    return [replace(m, held_out=m.key in chosen) for m in models]


def attribution(models: list[Model]) -> str:
    """Who made the CC-BY models, as their licence asks: author, titles, licence."""
    lines = [
        "# Authors of the 3-D models",
        "",
        "From the catalogues of Sweet Home 3D, converted to OBJ by Emmanuel Puybaret / eTeks. Rendered in changed",
        "colours and materials. CC-BY-3.0: https://creativecommons.org/licenses/by/3.0/, CC-BY-3.0-US:",
        "https://creativecommons.org/licenses/by/3.0/us/, CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/.",
        "",
    ]
    by_author: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model in models:
        by_author[model.licence, model.creator].append(model.title)
    lines += [f"- {author} ({licence}): {', '.join(titles)}" for (licence, author), titles in sorted(by_author.items())]
    return "\n".join(lines) + "\n"
