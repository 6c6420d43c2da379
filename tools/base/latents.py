"""Every picture as latents, in several views: moved, scaled, mirrored, recoloured, on coloured grounds.

In: `pictures.zip`, rendered scenes as `tools/scenes/pack.py` packs them, and a trained autoencoder. Out: `vae/` with
normalised latents, and `latents.safetensors` with one row a view, beside `views.jsonl`, which says what each row shows.
Views make shape and place vary under one prompt, so that a control has something to decide. What is held out is left
out.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import captions
import cv2
import numpy as np
import pictures
import state
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

SCENE = "scene"
VIEWS = {pictures.FLUENT: 10, pictures.NOTO: 4, SCENE: 2}
BATCH = 256


@dataclass(frozen=True, kw_only=True)
class View:
    """What one row of latents shows."""

    kind: str  # "fluent", "noto" or "scene"
    number: int  # 0 is the picture as it is
    concept: int | None = None  # row in the pack of emoji
    colour: str | None = None  # the one colour word that fits, None where none does
    ground: str | None = None  # backdrop, None for white
    recoloured: bool = False
    scene: dict[str, Any] | None = None  # caption and facts


def move(rgba: np.ndarray, scale: float, shift_px: tuple[float, float], degrees: float, mirror: bool) -> np.ndarray:
    """Scale, turn, shift and mirror about the centre, on premultiplied alpha. [H, W, 4] uint8 in and out."""
    centre = (pictures.SIZE_PX - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, scale)
    matrix[:, 2] += shift_px
    alpha = rgba[..., 3:].astype(np.float32) / 255
    premultiplied = np.concatenate([rgba[..., :3] * alpha, alpha * 255], -1)
    if mirror:
        premultiplied = np.ascontiguousarray(premultiplied[:, ::-1])
    moved = cv2.warpAffine(premultiplied, matrix, (pictures.SIZE_PX,) * 2, flags=cv2.INTER_AREA)
    colour = moved[..., :3] / np.maximum(moved[..., 3:] / 255, 1e-3)
    return np.clip(np.round(np.concatenate([colour, moved[..., 3:]], -1)), 0, 255).astype(np.uint8)


def draw_view(concepts: list[pictures.Concept], rgba: np.ndarray, row: int, number: int) -> tuple[np.ndarray, View]:
    """View 0 is the picture as it is; the others are drawn, keyed by (row, number). Returns: [H, W, 3] in [0, 1]."""
    rng = np.random.default_rng((row, number))
    picture, concept = rgba[row], concepts[row]
    may_recolour = concept.group in captions.RECOLOURED
    recoloured = bool(number and may_recolour and rng.random() < 0.45)
    if recoloured:
        picture = captions.shift_hue(picture, rng.uniform(40, 320))
    colour = captions.name_colour(picture) if may_recolour else None
    ground = None
    if number:
        scale = rng.uniform(0.62, 1.0) if rng.random() < 0.7 else 1.0
        slack = (1 - scale) * pictures.SIZE_PX / 2
        shift = (rng.uniform(-slack, slack), rng.uniform(-slack, slack))
        degrees = rng.uniform(-15, 15) if rng.random() < 0.3 else 0.0
        picture = move(picture, scale, shift, degrees, mirror=rng.random() < 0.5)
        choices = [name for name in captions.GROUNDS if name != colour]
        ground = str(rng.choice(choices)) if rng.random() < 0.25 else None
    backdrop = np.ones(3) if ground is None else np.array(captions.GROUNDS[ground]) / 255
    image = pictures.over(picture, backdrop)
    return image, View(
        kind=concept.style, number=number, concept=row, colour=colour, ground=ground, recoloured=recoloured
    )


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    Pictures come out the same; latents get mean 0 and deviation 1, so the scaling factor is 1. A white ground is a
    large constant in latent space, and diffusion starts from noise of mean 0: without this, far from white.
    """
    moments = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pixels.split(32)])
    mean, deviation = moments.mean((0, 2, 3)), moments.std((0, 2, 3))
    channels = len(mean)
    outward, inward = vae.quant_conv, vae.post_quant_conv
    outward.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    outward.bias[:channels] = (outward.bias[:channels] - mean) / deviation
    outward.bias[channels:] -= 2 * deviation.log()
    inward.bias += inward.weight[:, :, 0, 0] @ mean
    inward.weight *= deviation.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def load(folder: Path) -> tuple[Tensor, Tensor, list[View]]:
    """Returns: posterior means and deviations, each [N, C, 16, 16] float32, and the N views."""
    tensors = load_file(folder / "latents.safetensors")
    views = [View(**json.loads(line)) for line in (folder / "views.jsonl").read_text().splitlines()]
    return tensors["mean"].float(), tensors["std"].float(), views


Draw = Callable[[], tuple[np.ndarray, View]]  # the picture, [H, W, 3] in [0, 1], is made when it is asked for


def emoji_views(pack: Path) -> Iterator[Draw]:
    """All views of the emoji that are drawn and not held out."""
    concepts, rgba = pictures.load(pack)
    for row, concept in enumerate(concepts):
        if captions.is_drawn(concept) and not concept.held_out:
            for number in range(VIEWS[concept.style]):
                yield partial(draw_view, concepts, rgba, row, number)


def scene_views(pack: Path) -> Iterator[Draw]:
    """The training scenes of a pack, each as it is and mirrored: captions never say left or right."""
    for about, picture in pictures.read_scenes(pack):
        if about["split"] == "train":
            facts = {key: about[key] for key in ("caption", "things", "floor", "wall")}
            for number in range(VIEWS[SCENE]):
                yield partial(scene_view, picture, View(kind=SCENE, number=number, scene=facts))


def scene_view(picture: np.ndarray, view: View) -> tuple[np.ndarray, View]:
    image = picture.astype(np.float32) / 255
    return (image[:, ::-1] if view.number else image), view


def make_batch(draws: Sequence[Draw]) -> tuple[Tensor, list[View]]:
    """Returns: pictures [B, 3, H, W] in [-1, 1], and what they show."""
    images, views = zip(*(draw() for draw in draws), strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() * 2 - 1, list(views)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = state.pick_device()
    vae = AutoencoderKL.from_pretrained(args.vae).to(device).eval()
    draws = [*emoji_views(args.pictures), *(draw for pack in args.scenes for draw in scene_views(pack))]
    print(f"{len(draws)} views", flush=True)
    if not args.normalised:
        normalise(vae, make_batch(draws[:: max(1, len(draws) // 1000)])[0].to(device))
    vae.save_pretrained(args.out / "vae")

    means, deviations, shown = [], [], []
    batches = [draws[start : start + BATCH] for start in range(0, len(draws), BATCH)]
    for number, (pixels, views) in enumerate(state.ahead(make_batch, batches)):
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels.to(device)).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
        shown.extend(views)
        if number % 50 == 0:
            print(f"{len(shown)} of {len(draws)} encoded", flush=True)
    save_file(
        {"mean": torch.cat(means).contiguous(), "std": torch.cat(deviations).contiguous()},
        args.out / "latents.safetensors",
    )
    (args.out / "views.jsonl").write_text("\n".join(json.dumps(asdict(view)) for view in shown))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--scenes", type=Path, nargs="*", default=[], help="pictures.zip of packed scenes")
    parser.add_argument("--vae", type=Path, default=Path("work/base/vae"))
    parser.add_argument("--normalised", action="store_true", help="its latents are already: only more pictures join")
    parser.add_argument("--out", type=Path, default=Path("work/base/frozen"))
    main(parser.parse_args())
