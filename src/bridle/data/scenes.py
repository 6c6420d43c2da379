"""The rendered scenes that the package carries, written out as an ordinary data set with exact hints.

In: the zips in `embedded/`, whose README.md says what they show. Out, in the given folder: `pictures/`, and of each
picture its `depth/`, `normals/` and `segmentation/`, 128 px; and `metadata.jsonl`, which names them, captions, splits.

depth          8-bit grey: inverse depth of the picture's own range, near is 255
normals        red, green, blue: (n + 1) / 2 * 255 with x right, y up, z towards the camera
segmentation   the colours of `palette.SEGMENTATION`
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bridle.atomic import write_folder
from bridle.data.example import HELD_OUT, Pixels
from bridle.data.palette import SEGMENTATION
from bridle.errors import DataError

PACKED = Path(__file__).parent / "embedded"
_FACTS = "scenes.jsonl"
_METADATA = "metadata.jsonl"
_KEPT = ("things", "floor", "wall", "near", "far")  # of a scene's facts, beside caption and split


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A written data set: how many scenes it has to train on, and how many of objects that those never show."""

    folder: Path
    train: int
    held_out: int


def write_scenes(folder: Path) -> Scenes:
    """Write the data set, whole or not at all; one that is there already is left as it is.

    Raises: DataError: the folder holds anything else.
    """
    folder = folder.resolve()
    if folder.is_file():
        raise DataError(f"{folder} is a file; expected a folder to write scenes to; give another name")
    if not folder.is_dir() or not any(folder.iterdir()):
        write_folder(folder, _fill)
    elif (name := _find_difference(folder)) is not None:
        raise DataError(
            f"{folder} is not empty, and its {name} is missing or another one; give another folder, or empty it"
        )
    splits = [scene["split"] for scene in read_facts()]
    return Scenes(folder=folder, train=len(splits) - splits.count(HELD_OUT), held_out=splits.count(HELD_OUT))


def read_facts() -> list[dict[str, Any]]:
    """What is known of each scene, in the order of their numbers: "number", "caption", "split", "things", ..."""
    with zipfile.ZipFile(PACKED / "pictures.zip") as archive:
        return [json.loads(line) for line in archive.read(_FACTS).decode().splitlines()]


def _fill(folder: Path) -> None:
    for name, content in _list_files():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _find_difference(folder: Path) -> str | None:
    """The first file that is missing or has other bytes; None: all are as they would be written."""
    for name, content in _list_files():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            return name
    return None


def _list_files() -> Iterator[tuple[str, bytes]]:
    """Every file by its path in the data set; metadata.jsonl comes first, so that a strange folder is soon seen."""
    scenes = read_facts()
    yield _METADATA, "".join(json.dumps(_row(scene)) + "\n" for scene in scenes).encode()
    with ExitStack() as stack:
        archives = {name: stack.enter_context(zipfile.ZipFile(PACKED / f"{name}.zip")) for name in ("pictures", *_MAPS)}
        for scene in scenes:
            packed = f"{scene['number']:06}.webp"
            yield f"pictures/{packed}", archives["pictures"].read(packed)
            for name, (column, decode) in _MAPS.items():
                yield _map_path(scene, column), _to_png(decode(archives[name].read(packed)))


def _row(scene: dict[str, Any]) -> dict[str, Any]:
    return {
        "file_name": f"pictures/{scene['number']:06}.webp",
        "text": scene["caption"],
        **{column: _map_path(scene, column) for column, _ in _MAPS.values()},
        "split": scene["split"],
        **{key: scene[key] for key in _KEPT},
    }


def _map_path(scene: dict[str, Any], column: str) -> str:
    return f"{column}/{scene['number']:06}.png"


def _rgb(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content), formats=("WEBP",)).convert("RGB"))


def _grey(content: bytes) -> Pixels:
    return _rgb(content)[..., 0]  # WebP knows no grey: all three are the same


def _colours(content: bytes) -> Pixels:
    return np.array(list(SEGMENTATION.values()), np.uint8)[_grey(content)]


def _to_png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


# Zip -> the column, which is also the folder, and how its files become pixels.
_MAPS: dict[str, tuple[str, Callable[[bytes], Pixels]]] = {
    "depth": ("depth", _grey),
    "normals": ("normals", _rgb),
    "labels": ("segmentation", _colours),
}
