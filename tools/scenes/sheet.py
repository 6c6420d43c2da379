"""A contact sheet of rendered scenes with their captions, to judge by eye.

python tools/scenes/sheet.py --scenes work/scenes/cc0 --out sheet.png --first 0 --count 60 [--maps]
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
import scene_file
from PIL import Image, ImageDraw

TEXT_PX = 36


def panels(scene: scene_file.Scene, maps: bool) -> np.ndarray:
    """The picture, and with `maps` also depth, normals and labels beside it: [H, k W, 3] uint8."""
    if not maps:
        return scene.picture
    near = 1 / scene.depth
    depth = (near - near.min()) / np.ptp(near)
    grey = [np.repeat((values * 255).astype(np.uint8)[..., None], 3, -1) for values in (depth, scene.labels / 3)]
    normals = np.round((scene.normals + 1) * 127.5).astype(np.uint8)
    return np.concatenate([scene.picture, grey[0], normals, grey[1]], 1)


def draw(scenes: list[scene_file.Scene], columns: int, maps: bool) -> Image.Image:
    """All scenes in rows, their captions below."""
    pictures = [panels(scene, maps) for scene in scenes]
    height, width = pictures[0].shape[:2]
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + TEXT_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        left, top = place % columns * (width + 4), place // columns * (height + TEXT_PX)
        sheet.paste(Image.fromarray(picture), (left, top))
        words = textwrap.fill(f"{scene.about['number']} {scene.about['caption']}", width // 6)
        pen.multiline_text((left, top + height), words, fill="black", spacing=0)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--maps", action="store_true")
    args = parser.parse_args()
    found = [path for path in sorted(args.scenes.glob("*.npz")) if int(path.stem) >= args.first][: args.count]
    draw([scene_file.load(path) for path in found], args.columns, args.maps).save(args.out)
