"""Emoji in two styles and their names, packed into one file that travels.

In: the unpacked npm packages `@lobehub/fluent-emoji-3d` (RGBA WebP, 256 px), `asturur-noto-emoji` (PNG, 128 px) and
`emojibase-data` (labels, tags). Out: `pictures.zip`: `concepts.jsonl` (one concept a line) and
`<style>/<hexcode>.webp` (RGBA, 128 px, lossless).
"""

import argparse
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE_PX = 128
FLAGS = "flags"
FLUENT, NOTO = "fluent", "noto"
VARIATION_SELECTOR = "-fe0f"  # the two packages disagree on when to write it


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji in one style: what it is called and whether the base may train on it."""

    hexcode: str
    style: str
    label: str
    tags: tuple[str, ...]
    group: str
    skin_tone: bool
    held_out: bool


def is_held_out(hexcode: str) -> bool:
    """5% of the concepts, chosen by hash: a skin-tone copy goes where its concept goes."""
    return int(hashlib.sha256(f"bridle-base-1 {hexcode}".encode()).hexdigest(), 16) % 20 == 0


def find_fluent(folder: Path, hexcode: str) -> Path | None:
    """The 3-D picture of a hexcode, written with or without the variation selector."""
    plain = hexcode.lower().replace(VARIATION_SELECTOR, "")
    paths = [folder / "assets" / f"{name}.webp" for name in (hexcode.lower(), plain, plain + VARIATION_SELECTOR)]
    return next((path for path in paths if path.exists()), None)


def find_noto(folder: Path, hexcode: str) -> Path | None:
    """The flat picture of a hexcode."""
    name = hexcode.lower().replace(VARIATION_SELECTOR, "").replace("-", "_")
    path = folder / "png" / "128" / f"emoji_u{name}.png"
    return path if path.exists() else None


def list_concepts(emoji: Path, noto: Path, names: Path) -> Iterator[tuple[Concept, Path]]:
    """Every emoji that has a name and a picture, once for each style; flags left out, and so are flat skin tones."""
    groups = json.loads((names / "meta" / "groups.json").read_text())["groups"]
    for entry in json.loads((names / "en" / "data.json").read_text()):
        group = groups.get(str(entry.get("group")), "none")
        if group == FLAGS:
            continue
        for variant in [entry, *entry.get("skins", [])]:
            plain = variant is entry
            found = {
                FLUENT: find_fluent(emoji, variant["hexcode"]),
                NOTO: find_noto(noto, variant["hexcode"]) if plain else None,
            }
            for style, path in found.items():
                if path is not None:
                    concept = Concept(
                        hexcode=variant["hexcode"].lower(),
                        style=style,
                        label=entry["label"],
                        tags=tuple(entry.get("tags", ())),
                        group=group,
                        skin_tone=not plain,
                        held_out=is_held_out(entry["hexcode"]),
                    )
                    yield concept, path


def shrink(path: Path) -> Image.Image:
    """Resize on premultiplied alpha, so that transparent pixels bring no dark fringe."""
    picture = Image.open(path).convert("RGBA").convert("RGBa")
    return picture.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS).convert("RGBA")


def pack(emoji: Path, noto: Path, names: Path, out: Path) -> int:
    """Write `pictures.zip` and return the number of concepts in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for concept, path in list_concepts(emoji, noto, names):
            buffer = io.BytesIO()
            shrink(path).save(buffer, "WEBP", lossless=True, exact=False)
            archive.writestr(f"{concept.style}/{concept.hexcode}.webp", buffer.getvalue())
            rows.append(json.dumps(asdict(concept)))
        archive.writestr("concepts.jsonl", "\n".join(rows))
    return len(rows)


def load(path: Path) -> tuple[list[Concept], np.ndarray]:
    """Read a pack. Returns: the concepts and their pictures, [N, 128, 128, 4] uint8."""
    with zipfile.ZipFile(path) as archive:
        rows = [json.loads(line) for line in archive.read("concepts.jsonl").decode().splitlines()]
        concepts = [Concept(**{**row, "tags": tuple(row["tags"])}) for row in rows]
        pictures = [
            np.asarray(Image.open(io.BytesIO(archive.read(f"{concept.style}/{concept.hexcode}.webp"))).convert("RGBA"))
            for concept in concepts
        ]
    return concepts, np.stack(pictures)


def read_scenes(pack: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Facts and picture, [128, 128, 3] uint8, of each scene in a `pictures.zip` of tools/scenes/pack.py."""
    with zipfile.ZipFile(pack) as archive:
        for line in archive.read("scenes.jsonl").decode().splitlines():
            about = json.loads(line)
            picture = Image.open(io.BytesIO(archive.read(f"{about['number']:06}.webp")))
            yield about, np.asarray(picture.convert("RGB"))


def over(rgba: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Composite [..., H, W, 4] uint8 over a colour [..., 3]; returns [..., H, W, 3] float32 in [0, 1]."""
    colour, alpha = rgba[..., :3].astype(np.float32) / 255, rgba[..., 3:].astype(np.float32) / 255
    return colour * alpha + np.asarray(ground, np.float32)[..., None, None, :] * (1 - alpha)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--noto", type=Path, required=True)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("work/base/pictures.zip"))
    args = parser.parse_args()
    print(f"{pack(args.emoji, args.noto, args.names, args.out)} pictures in {args.out}")
