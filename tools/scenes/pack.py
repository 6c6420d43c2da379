"""Rendered scenes as files that travel: zips of WebP, one zip for each kind of map, and one line of facts a scene.

Out, under `--out`: `pictures.zip` (`scenes.jsonl`, and `<number>.webp`, lossy at quality 90), and where the scenes are
to have maps, `depth.zip`, `normals.zip` and `labels.zip` (lossless).

- depth: 8 bits, near is bright: value / 255 = (1/z - 1/far) / (1/near - 1/far), near and far in `scenes.jsonl`.
- normals: (n + 1) / 2 * 255 in red, green, blue; x right, y up, z towards the camera.
- labels: 0 wall, 1 floor, 2 first thing, 3 second thing; the things are in `scenes.jsonl` in this order.

    python tools/scenes/pack.py --scenes work/scenes/cc0 --out work/scenes/packed --maps
"""

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scene_file
from PIL import Image

from bridle import atomic
from bridle.errors import DataError

LIMIT = 15_000_000  # bytes of one file that is still comfortable to ship


def encode(pixels: np.ndarray, **how: Any) -> bytes:
    """As WebP. pixels: [H, W, 3] or [H, W] uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", method=6, **how)
    return buffer.getvalue()


def depth_range(depth: np.ndarray) -> tuple[float, float]:
    """Near and far, as they are written down. depth: [H, W]."""
    return round(float(depth.min()), 4), round(float(depth.max()), 4)


def encode_picture(scene: scene_file.Scene) -> bytes:
    return encode(scene.picture, quality=90)


def encode_depth(scene: scene_file.Scene) -> bytes:
    near, far = depth_range(scene.depth)
    share = (1 / scene.depth - 1 / far) / (1 / near - 1 / far)
    return encode(np.round(share.clip(0, 1) * 255).astype(np.uint8), lossless=True)


def encode_normals(scene: scene_file.Scene) -> bytes:
    return encode(np.round((scene.normals + 1) * 127.5).astype(np.uint8), lossless=True)


def encode_labels(scene: scene_file.Scene) -> bytes:
    return encode(scene.labels, lossless=True)


MAPS: dict[str, Callable[[scene_file.Scene], bytes]] = {
    "depth": encode_depth, "normals": encode_normals, "labels": encode_labels,
}  # fmt: skip


def write(target: Path, files: Iterable[tuple[str, bytes]]) -> int:
    """Write one zip, whole or not at all, the same bytes for the same scenes. Returns: its size in bytes."""

    def fill(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:  # WebP is packed already
            for name, content in files:
                kind = zipfile.ZIP_DEFLATED if name.endswith(".jsonl") else zipfile.ZIP_STORED
                archive.writestr(zipfile.ZipInfo(name), content, kind)

    atomic.write_with(target, fill)
    return target.stat().st_size


def facts(scene: scene_file.Scene) -> str:
    """One line of JSON."""
    near, far = depth_range(scene.depth)
    return json.dumps({**scene.about, "near": near, "far": far}) + "\n"


def pack(scenes: Path, out: Path, maps: bool) -> dict[str, int]:
    """Pack every finished scene of a folder. Returns: bytes by file name. Raises: DataError: there is none."""
    paths = sorted(scenes.glob("*.npz"))
    if not paths:
        raise DataError(f"{scenes} holds no finished scene; expected <number>.npz; run tools/scenes/render.py")
    found = [scene_file.load(path) for path in paths]
    lines = "".join(facts(scene) for scene in found).encode()
    pictures = [(f"{scene.about['number']:06}.webp", encode_picture(scene)) for scene in found]
    sizes = {"pictures.zip": write(out / "pictures.zip", [("scenes.jsonl", lines), *pictures])}
    for name, encoder in MAPS.items() if maps else ():
        files = [(f"{scene.about['number']:06}.webp", encoder(scene)) for scene in found]
        sizes[f"{name}.zip"] = write(out / f"{name}.zip", files)
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--maps", action="store_true", help="depth, normals and labels too")
    args = parser.parse_args()
    for name, size in pack(args.scenes, args.out, args.maps).items():
        print(f"{name}: {size / 1e6:.1f} MB{' (over the 15 MB that one file should have)' if size > LIMIT else ''}")
