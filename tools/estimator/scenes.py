"""Rendered scenes as training rows. In: a folder of scenes (tools/scenes). Out: batches of pictures with their maps.

B is batch, H×W pixels. Maps: `depth` [B, H, W] in [0, 1], near is 1; `normals` [B, 3, H, W]; `labels` [B, H, W].
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "scenes"))
import scene_file

THING, SECOND = 2, 3
MIRRORED, RECOLOURED, SOFTENED, GREY = 0.5, 0.25, 0.6, 0.05  # shares of the pictures
ZOOM = (0.8, 1.0)  # part of the scene's side that is seen


@dataclass(frozen=True)
class Rows:
    """pictures: [N, 3, H, W] uint8. depth: [N, H, W] float16. normals: [N, 3, H, W] int8, times 127. labels: [N, H, W]
    uint8."""

    pictures: Tensor
    depth: Tensor
    normals: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def at(self, places: Tensor | slice, device: torch.device) -> "Rows":
        """These rows as the network takes them: float32 all, labels int64."""
        some = {field.name: getattr(self, field.name)[places].to(device) for field in fields(self)}
        normals = F.normalize(some["normals"].float(), dim=1)
        return Rows(some["pictures"].float() / 255, some["depth"].float(), normals, some["labels"].long())


def load(folders: list[Path], split: str) -> Rows:
    """All finished scenes of a split, "train" or "held_out"."""
    found: list[tuple[np.ndarray, ...]] = []
    for path in sorted(path for folder in folders for path in folder.glob("*.npz")):
        scene = scene_file.load(path)
        if scene.about["split"] == split:
            normals = np.round(127 * scene.normals).astype(np.int8).transpose(2, 0, 1)
            found.append((scene.picture.transpose(2, 0, 1), share(scene.depth), normals, scene.labels))
    if not found:
        raise SystemExit(f"no scene of the split {split!r} in {folders}; run tools/scenes/render.py")
    return Rows(*(torch.from_numpy(np.stack(column)) for column in zip(*found, strict=True)))


def share(depth: np.ndarray) -> np.ndarray:
    """Distance along the axis to inverse depth of the picture's own range, near is 1, float16."""
    inverse = 1 / depth
    return ((inverse - inverse.min()) / (inverse.max() - inverse.min())).astype(np.float16)


def vary(rows: Rows, generator: torch.Generator) -> Rows:
    """Mirror, zoom, recolour and soften: what is drawn by a model is never as clean as what is rendered."""
    moved = _move(rows, generator)
    return Rows(_soften(_recolour(moved.pictures, generator), generator), moved.depth, moved.normals, moved.labels)


def _move(rows: Rows, generator: torch.Generator) -> Rows:
    """Another part of each scene, mirrored or not. The depth's range is that of the part."""
    count, device = len(rows), rows.pictures.device
    zoom = _uniform(count, *ZOOM, generator=generator)
    mirrored = torch.rand(count, generator=generator) < MIRRORED
    sign = torch.where(mirrored, -1.0, 1.0)
    offset = (2 * torch.rand(2, count, generator=generator) - 1) * (1 - zoom)
    zero = torch.zeros(count)
    turn = torch.stack([zoom * sign, zero, offset[0], zero, zoom, offset[1]], 1).view(count, 2, 3).to(device)
    grid = F.affine_grid(turn, [count, 3, *rows.depth.shape[1:]], align_corners=False)
    maps = torch.cat([rows.depth[:, None], rows.normals, rows.labels[:, None].float()], 1)
    depth, normals, labels = F.grid_sample(maps, grid, "nearest", "border", False).split((1, 3, 1), 1)
    normals = normals * torch.stack([sign, sign.abs(), sign.abs()], 1).to(device)[..., None, None]
    far, near = depth.amin((1, 2, 3), True), depth.amax((1, 2, 3), True)
    depth, labels = ((depth - far) / (near - far))[:, 0], _order(labels[:, 0].round().long(), mirrored.to(device))
    return Rows(F.grid_sample(rows.pictures, grid, "bilinear", "border", False), depth, normals, labels)


def _order(labels: Tensor, mirrored: Tensor) -> Tensor:
    """The first thing is the left one, in mirrored pictures too; one alone is always the first."""
    both = (labels == THING).any(-1).any(-1) & (labels == SECOND).any(-1).any(-1)
    swapped = (both & mirrored)[:, None, None] & (labels >= THING)
    alone = ~both[:, None, None] & (labels == SECOND)
    return torch.where(swapped, THING + SECOND - labels, torch.where(alone, THING, labels))


def _recolour(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Exposure, contrast, gamma, white point, saturation; some with permuted channels, few in grey."""
    count, device = len(pictures), pictures.device

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return _uniform(count * channels, low, high, generator=generator).view(count, channels, 1, 1).to(device)

    order = torch.rand(count, 3, generator=generator).argsort(1)
    order[torch.rand(count, generator=generator) >= RECOLOURED] = torch.arange(3)
    pictures = pictures.gather(1, order.to(device)[..., None, None].expand_as(pictures))
    pictures = pictures.clamp(1e-3, 1) ** draw(0.75, 1.35) * draw(0.85, 1.12, 3)
    saturation = draw(0.6, 1.3) * (draw(0, 1) >= GREY)
    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * saturation
    return ((pictures - 0.5) * draw(0.8, 1.2) + 0.5 + draw(-0.06, 0.06)).clamp(0, 1)


def _soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What autoencoders and few denoising steps do: fine detail is lost, in places something else stands for it."""
    count, side = len(pictures), pictures.shape[-1]
    lost = int(torch.randint(side // 2, side, (), generator=generator))
    small = F.interpolate(pictures, size=(lost, lost), mode="area")
    soft = F.interpolate(small, size=pictures.shape[-2:], mode="bicubic", antialias=False)
    some = (torch.rand(count, generator=generator) < SOFTENED).view(-1, 1, 1, 1).to(pictures.device)
    pictures = torch.where(some, soft, pictures)
    for cells in (side, side // 4):  # grain of one pixel, and blotches of four
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        strength = _uniform(count, 0, 0.03, generator=generator).view(-1, 1, 1, 1)
        pictures = pictures + F.interpolate((noise * strength).to(pictures.device), size=(side, side), mode="bilinear")
    return pictures.clamp(0, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
