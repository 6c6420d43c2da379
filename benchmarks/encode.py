"""What encoding pictures costs: an autoencoder as diffusers calls it against `Base.encode_images`, in float32.

In: a base's size. Out: a line, and JSON where a path is given. Sides take turns in one process on one thread; a gain
is the median over rounds of the ratio of CPU seconds. Choosing kernels, once per shape and machine, is left out.

    python benchmarks/encode.py --size sd15 --size-px 512          # random weights
    python benchmarks/encode.py --size embedded --batch 16 --rounds 9
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from bridle.atomic import write_text
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.train.memory import keep_freed_memory

SIDES = ("stock", "ours")


def make_base(size: str) -> Base:
    """The embedded one, if need be with an autoencoder of Stable Diffusion's size, of random weights."""
    base = load_base()
    if size == "sd15":
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae: Any = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
        base.pipeline.vae = vae.requires_grad_(False).eval()
    return base


def encode(side: str, base: Base, pixels: Tensor) -> Tensor:
    """The posterior's mean, scaled."""
    if side == "ours":
        return base.encode_images(pixels)[0]
    config = base.vae.config
    with torch.no_grad():
        mean: Tensor = base.vae.encode(pixels).latent_dist.mean
    return (mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["sd15", "embedded"], default="embedded")
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    base = make_base(options.size)
    pixels = torch.rand(options.batch, 3, options.size_px, options.size_px) * 2 - 1
    exact, found = (encode(side, base, pixels) for side in SIDES)
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            started = time.process_time()
            encode(side, base, pixels)
            taken[side].append(time.process_time() - started)
    medians = {side: statistics.median(times) / options.batch for side, times in taken.items()}
    gain = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
    off = float((found - exact).norm() / exact.norm())
    print(
        f"CPU s a picture: stock {medians['stock']:.3f}, ours {medians['ours']:.3f}: {gain:.2f}x; deviation {off:.1e}"
    )
    if options.json:
        facts = vars(options) | {"json": str(options.json), "cpu_s": taken, "gain": gain, "deviation": off}
        write_text(options.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
