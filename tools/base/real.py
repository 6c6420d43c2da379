"""Real pictures with their captions, as the base is trained on them: rendered scenes and emoji, split into training
and held out. For the tools that measure a base."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import captions
import latents
import numpy as np
import pictures

from bridle.errors import DataError

SCENES = "scenes"
KINDS = (SCENES, pictures.FLUENT, pictures.NOTO)


@dataclass(frozen=True, kw_only=True)
class Real:
    """picture: [H, W, 3] uint8. group: what it shows, model or concept; pictures of one group are not independent.
    name: of the thing or concept. about: a scene's facts."""

    kind: str
    group: str
    name: str
    caption: str
    held_out: bool
    picture: np.ndarray
    colour: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


def read_scenes(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Facts and picture of each scene: of `<number>.npz`, or of `pictures.zip` as tools/scenes/pack.py writes it."""
    packed = folder / "pictures.zip"
    if packed.exists():
        yield from pictures.read_scenes(packed)
        return
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield json.loads(str(arrays["about"])), arrays["picture"]


def load_scenes(folders: Sequence[Path]) -> list[Real]:
    """Every finished scene. Raises: DataError: there is none."""
    found = [
        Real(
            kind=SCENES, group=about["things"][0]["model"], name=about["things"][0]["name"],
            caption=captions.scene_caption(about, np.random.default_rng((7, about["seed"], about["number"]))),
            held_out=about["split"] == "held_out", picture=picture, about=about,
        )
        for folder in folders
        for about, picture in read_scenes(folder)
    ]  # fmt: skip
    if not found:
        raise DataError(
            f"no scenes in {', '.join(map(str, folders))}; expected <number>.npz or pictures.zip; render some"
        )
    return found


class Pack:
    """The emoji's pack, read once."""

    def __init__(self, path: Path) -> None:
        self.concepts, self.rgba = pictures.load(path)

    def load(self, style: str, views: Sequence[int], names: Collection[str] | None = None) -> list[Real]:
        """Every concept of a style that the base draws, in these views; see `latents.draw_view`. names: only these."""
        rows = [i for i, one in enumerate(self.concepts) if one.style == style and captions.is_drawn(one)]
        rows = [row for row in rows if names is None or self.concepts[row].label.lower() in names]
        return [_emoji(self.concepts, self.rgba, row, view) for view in views for row in rows]


def _emoji(concepts: list[pictures.Concept], rgba: np.ndarray, row: int, number: int) -> Real:
    concept, rng = concepts[row], np.random.default_rng((8, row, number))
    image, view = latents.draw_view(concepts, rgba, row, number)
    said = captions.caption(concept, view.colour, view.ground, view.recoloured, rng)
    if concept.style != pictures.FLUENT:  # the 3-D ones need no word for it, and the first base knows none
        said = captions.in_style(said, concept.style, rng)
    return Real(
        kind=concept.style, group=concept.hexcode, name=concept.label.lower(), caption=said,
        held_out=concept.held_out, picture=np.round(image * 255).astype(np.uint8), colour=view.colour,
    )  # fmt: skip
