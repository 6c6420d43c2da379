"""Depth, normals and classes of simple scenes: a picture in, an estimated map out.

One small network for all three, shipped with the package and trained on rendered scenes of one thing or two on a floor
before a wall (tools/estimator). It is good enough to tell whether a drawn picture of that kind follows its map, and to
make maps of such pictures where none are known. It is no MiDaS: of streets, faces and landscapes it knows nothing.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bridle.data.annotate.annotator import repeat
from bridle.data.annotate.scene_net import FACTOR, SceneNet
from bridle.data.example import Pixels
from bridle.data.palette import SEGMENTATION

WEIGHTS = Path(__file__).with_name("scene_maps.safetensors")
SIZE_PX = 128  # short side of the pictures that the network was trained with


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Inverse depth over the picture's own range, near is bright, as ControlNets for depth expect it.

    255 stands for the nearest point of the picture and 0 for the farthest: value / 255 = (1/z - 1/far) / (1/near -
    1/far). Nothing is random.

    Args:
        channels: equal copies.
    """

    name: ClassVar[str] = "depth"
    channels: int = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        depth = estimate(image).depth
        return repeat(np.rint(255 * depth.clip(0, 1)).astype(np.uint8), self.channels)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self), "weights": hash_weights()}


@dataclass(frozen=True, kw_only=True)
class Normals:
    """Surface normals as colours, (n + 1) / 2 * 255: red is right, green up, blue towards the camera.

    Nothing is random.
    """

    name: ClassVar[str] = "normals"
    channels: ClassVar[int] = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        return np.rint(127.5 * (estimate(image).normals + 1)).astype(np.uint8)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "channels": self.channels, "weights": hash_weights()}


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Wall, floor, thing and second thing in the colours of `bridle.data.palette`.

    Of two things the left one is the first. Nothing is random.
    """

    name: ClassVar[str] = "segmentation"
    channels: ClassVar[int] = 3

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        return np.array(list(SEGMENTATION.values()), dtype=np.uint8)[estimate(image).labels]

    def settings(self) -> dict[str, Any]:
        palette = {name: list(colour) for name, colour in SEGMENTATION.items()}
        return {"name": self.name, "channels": self.channels, "palette": palette, "weights": hash_weights()}


@dataclass(frozen=True)
class Maps:
    """depth: [H, W] float32, about [0, 1], near is 1. normals: [H, W, 3] float32 of length 1; x right, y up, z towards
    the camera. labels: [H, W] integers, places in the palette."""

    depth: NDArray[np.float32]
    normals: NDArray[np.float32]
    labels: NDArray[np.int64]


def estimate(image: Pixels) -> Maps:
    """What the network sees in a picture, [H, W, 3] uint8.

    The picture is brought to about 128 pixels at its short side and the maps back to its own size, so that they are
    never sharper than that.
    """
    height, width = image.shape[:2]
    scale = SIZE_PX / min(height, width)
    size = [max(1, round(side * scale / FACTOR)) * FACTOR for side in (height, width)]
    small = _resize(image, *size, method=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    pixels = torch.from_numpy(small.transpose(2, 0, 1).astype(np.float32) / 255)[None]
    with torch.inference_mode():
        found = load_network()(pixels)
    depth, normals, labels = (
        _resize(part[0].permute(1, 2, 0).numpy(), height, width)
        for part in (found.depth[:, None], found.normals, found.labels)
    )
    length = np.linalg.norm(normals, axis=2, keepdims=True).clip(1e-6)
    return Maps(depth[..., 0], normals / length, labels.argmax(axis=2))


@cache
def load_network() -> SceneNet:
    """The shipped network, on the CPU in float32; read once, when a map is first asked for."""
    net = SceneNet()
    net.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return net.eval().requires_grad_(False)


@cache
def hash_weights() -> str:
    """Which weights these are: 16 hex digits."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]


def _resize(array: NDArray[Any], height: int, width: int, method: int = cv2.INTER_LINEAR) -> NDArray[Any]:
    """[h, w, K] to [height, width, K]."""
    if array.shape[:2] == (height, width):
        return array
    return np.asarray(cv2.resize(array, (width, height), interpolation=method)).reshape(height, width, -1)
