"""Look at what the network sees: a row a scene, its picture, then depth, normals and classes, each exact and estimated.

In: folders of scenes (tools/scenes) and weights. Out: one PNG.

    python tools/estimator/sheet.py --scenes work/scenes/cc0 --weights work/estimator/scene_maps.safetensors
"""

import argparse
import io
from pathlib import Path

import numpy as np
import scenes
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bridle import atomic
from bridle.data.annotate.scene_net import SceneMaps, SceneNet
from bridle.data.palette import SEGMENTATION


def colour(maps: SceneMaps | scenes.Rows, classes: Tensor) -> list[np.ndarray]:
    """Depth, normals and classes as pictures, each [N, H, W, 3] uint8."""
    depth = (255 * maps.depth.clamp(0, 1)).byte()[..., None].expand(-1, -1, -1, 3)
    normals = (127.5 * (maps.normals.permute(0, 2, 3, 1) + 1)).byte()
    return [depth.numpy(), normals.numpy(), np.array(list(SEGMENTATION.values()), np.uint8)[classes.numpy()]]


@torch.no_grad()
def draw(net: SceneNet, rows: scenes.Rows) -> np.ndarray:
    """One row a scene."""
    found = net(rows.pictures)
    exact, estimated = colour(rows, rows.labels), colour(found, found.labels.argmax(1))
    pictures = (255 * rows.pictures).byte().permute(0, 2, 3, 1).numpy()
    pairs = [part for pair in zip(exact, estimated, strict=True) for part in pair]
    return np.concatenate([np.concatenate(list(column)) for column in (pictures, *pairs)], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, nargs="+", required=True, help="folders of rendered scenes")
    parser.add_argument("--weights", type=Path, default=Path("work/estimator/scene_maps.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("work/estimator/sheet.png"))
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--soften", action="store_true", help="show the pictures as they are varied in training")
    args = parser.parse_args()
    net = SceneNet()
    net.load_state_dict({name: weight.float() for name, weight in load_file(args.weights).items()})
    chosen = scenes.load(args.scenes, args.split).at(slice(args.first, args.first + args.count), torch.device("cpu"))
    chosen = scenes.vary(chosen, torch.Generator().manual_seed(0)) if args.soften else chosen
    buffer = io.BytesIO()
    Image.fromarray(draw(net, chosen)).save(buffer, "PNG")
    atomic.write_bytes(args.out, buffer.getvalue())
