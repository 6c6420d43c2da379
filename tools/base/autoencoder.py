"""Train the base's autoencoder: f8, on random 64 px crops.

In: `pictures.zip`, and scenes where there are any, rendered or packed. Out: `<out>/autoencoder.pt` (resumable) and
`<out>/vae/` (diffusers format, averaged weights, float32).
A second run with `--decoder-only` sharpens the decoder while the latents, and so the U-Net, stay as they are: from
`--start work/base/frozen/vae` to `decoder.pt` and `decoder/`.

    python tools/base/autoencoder.py --scenes src/bridle/data/embedded --start src/bridle/base/embedded/v2/vae
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import perceptual
import pictures
import real
import state
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from bridle.kernels.record import Recorded

CROP_PX = 64
KL_WEIGHT = 1e-6
SIMILARITY_WEIGHT = 0.5
PERCEPTUAL_WEIGHT = 0.2
SIMILARITY_PX = 7


def build(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=channels,
        sample_size=pictures.SIZE_PX,
        scaling_factor=1.0,  # latents.py normalises them
    )


@torch.no_grad()
def begin_from(folder: Path, vae: AutoencoderKL) -> None:
    """Take over the weights of an earlier autoencoder. Latent channels that it has not are not yet decoded."""
    old = AutoencoderKL.from_pretrained(folder).float()
    few, many = old.config.latent_channels, vae.config.latent_channels
    if few > many:
        raise SystemExit(f"{folder} has {few} latent channels; give --channels {few} or more")
    means = torch.arange(few)
    moments = torch.cat([means, means + many])  # of each channel a mean and a logarithmic variance
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    for name, weight in old.state_dict().items():
        if weight.shape == weights[name].shape:
            weights[name] = weight
        elif name.startswith("encoder.conv_out"):
            weights[name][moments] = weight
        elif name.startswith("decoder.conv_in"):
            weights[name].zero_()[:, means] = weight
        else:  # the 1x1 convolutions around the latents: what is new goes straight through
            kept = moments if name.startswith("quant_conv") else means
            if weight.ndim == 1:
                weights[name].zero_()[kept] = weight
            else:
                torch.nn.init.dirac_(weights[name])
                weights[name][kept[:, None], kept] = weight
    vae.load_state_dict(weights)


def load_scenes(folders: list[Path], held_out: bool) -> np.ndarray:
    """The colour pictures of scenes, rendered or packed, split by object. Returns: [N, 128, 128, 4] uint8, opaque."""
    opaque = np.full((pictures.SIZE_PX, pictures.SIZE_PX), 255, np.uint8)
    scenes = [scene for folder in folders for scene in real.read_scenes(folder)]
    found = [np.dstack([picture, opaque]) for about, picture in scenes if (about["split"] != "train") == held_out]
    return np.stack(found) if found else np.empty((0, pictures.SIZE_PX, pictures.SIZE_PX, 4), np.uint8)


def draw_crops(kinds: list[np.ndarray], count: int, rng: np.random.Generator) -> Tensor:
    """Crops on white or a plain colour, some flipped, some in permuted colours. Returns: [B, 3, 64, 64] in [-1, 1].

    Args: kinds: of pictures, each [N, 128, 128, 4] uint8, drawn from equally often.
    """
    crops = np.empty((count, CROP_PX, CROP_PX, 3), np.float32)
    for i in range(count):
        y, x = rng.integers(0, pictures.SIZE_PX - CROP_PX + 1, 2)
        rgba = kinds[rng.integers(len(kinds))]
        crop = rgba[rng.integers(len(rgba)), y : y + CROP_PX, x : x + CROP_PX]
        ground = np.ones(3) if rng.random() < 0.6 else rng.random(3)
        crops[i] = pictures.over(crop, ground)
        if rng.random() < 0.2:
            crops[i] = crops[i][..., rng.permutation(3)]
        if rng.random() < 0.5:
            crops[i] = crops[i][:, ::-1]
    return torch.from_numpy(crops).permute(0, 3, 1, 2) * 2 - 1


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """L1 + squared error + L1 of the first differences, which keeps edges sharp, + dissimilarity of structure."""
    output = output.float()
    error = output - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return (
        error.abs().mean() + error.square().mean() + edges + SIMILARITY_WEIGHT * (1 - similarity(output, target).mean())
    )


def similarity(output: Tensor, target: Tensor) -> Tensor:
    """SSIM over square windows, of pictures [B, 3, H, W] in [-1, 1]; 1 where they are equal."""

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, SIMILARITY_PX, stride=1)

    mean_x, mean_y = mean(output), mean(target)
    var_x, var_y = mean(output.square()) - mean_x.square(), mean(target.square()) - mean_y.square()
    covariance = mean(output * target) - mean_x * mean_y
    # Both pictures have a range of 2; the mean enters as a value in [0, 2].
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = mean_x + 1, mean_y + 1
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, held_out: Tensor) -> float:
    """Mean over whole held-out pictures of PSNR in dB, values in [0, 1], latents at the posterior mean."""
    decibels = []
    for batch in held_out.split(8):
        output = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        decibels.append(-10 * ((output - batch) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(decibels).mean().item()


def held_out_pictures(concepts: list[pictures.Concept], rgba: np.ndarray, count: int = 64) -> Tensor:
    """Held-out concepts in 3-D on white, skin-tone copies left out. Returns: [N, 3, 128, 128] in [-1, 1]."""
    rows = [
        i
        for i, concept in enumerate(concepts)
        if concept.held_out and concept.style == pictures.FLUENT and not concept.skin_tone
    ][:count]
    return torch.from_numpy(pictures.over(rgba[rows], np.ones(3))).permute(0, 3, 1, 2) * 2 - 1


def train(args: argparse.Namespace) -> None:
    device, started = state.pick_device(), time.time()
    concepts, rgba = pictures.load(args.pictures)
    held_out = {"emoji": held_out_pictures(concepts, rgba).to(device)}
    kinds = [
        rgba[[i for i, concept in enumerate(concepts) if concept.style == style and not concept.held_out]]
        for style in (pictures.FLUENT, pictures.NOTO)
    ]
    if args.scenes:
        kinds.append(load_scenes(args.scenes, held_out=False))
        unseen = pictures.over(load_scenes(args.scenes, held_out=True)[:64], np.ones(3))
        held_out["scenes"] = torch.from_numpy(unseen).permute(0, 3, 1, 2).to(device) * 2 - 1

    torch.manual_seed(0)
    name = "decoder.pt" if args.decoder_only else "autoencoder.pt"
    saved = state.load(args.out / name)
    vae = build(args.channels)
    if saved is None and args.start is not None:
        begin_from(args.start, vae)
    vae = vae.to(device)
    ema = copy.deepcopy(vae)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    looks = None if args.perceptual is None else perceptual.Perceptual(args.perceptual).to(device)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01, fused=True)
    step = 0
    if saved is not None:
        vae.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        print(f"resumed at step {step}", flush=True)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((step, args.decoder_only))
        crops = draw_crops(kinds, args.batch, rng)
        side = CROP_PX // 8
        return crops, torch.from_numpy(rng.standard_normal((args.batch, args.channels, side, side), np.float32))

    def find_gradients(target: Tensor, noise: Tensor) -> list[Tensor]:
        vae.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = loss_of(output, target) + KL_WEIGHT * posterior.kl().mean()
        if looks is not None:
            loss = loss + PERCEPTUAL_WEIGHT * looks(output, target).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return [loss.detach()]

    recorded = Recorded(find_gradients, print)
    first, pace = step, state.Pace(steps=args.steps, minutes=args.minutes, finish=args.finish, warmup=200)
    draws = state.ahead(draw, range(step, args.steps))
    while pace.goes_on(step):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * pace.lr(step)
        (loss,) = recorded(*[drawn.to(device, non_blocking=True) for drawn in next(draws)])
        optimizer.step()
        state.average(ema, vae, step, decay=0.998)
        step += 1
        if step % args.report == 0 or step == args.steps:
            psnr = {f"psnr_db_{kind}": round(measure_psnr(ema, some), 2) for kind, some in held_out.items()}
            row = {"step": step, "loss": round(loss.item(), 4), **psnr}
            speed = args.batch * (step - first) / (time.time() - started)
            print(json.dumps({**row, "crops_per_s": round(speed, 1)}), flush=True)
            write(args.out, name, vae, ema, optimizer, step)
    write(args.out, name, vae, ema, optimizer, step)


def write(
    out: Path, name: str, vae: AutoencoderKL, ema: AutoencoderKL, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state.save(
        out / name,
        {"model": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
    )
    ema.save_pretrained(out / ("vae" if name == "autoencoder.pt" else "decoder"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--scenes", type=Path, nargs="*", default=[], help="folders of rendered scenes")
    parser.add_argument("--start", type=Path, help="an autoencoder in diffusers format to begin from")
    parser.add_argument("--channels", type=int, default=8, help="of the latents")
    parser.add_argument("--out", type=Path, default=Path("work/base"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="leave, saved, after so long")
    parser.add_argument("--finish", action="store_true", help="let the learning rate fall towards the minutes' end")
    parser.add_argument("--perceptual", type=Path, help="weights of perceptual.py, for a term of the loss")
    parser.add_argument("--report", type=int, default=250)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()
    if args.decoder_only and args.start is None:
        parser.error("--decoder-only needs --start, the autoencoder whose latents are to stay")
    if args.decoder_only:
        args.channels = AutoencoderKL.load_config(args.start)["latent_channels"]
    train(args)
