"""Measure a base's autoencoder on every held-out emoji, on white, and on every held-out scene of the package.

python tools/base/measure.py --base embedded
"""

import argparse
from pathlib import Path

import autoencoder
import numpy as np
import pictures
import torch
from torch import Tensor

from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.data.scenes import PACKED
from bridle.evaluate.fidelity import ssim
from bridle.sample.sampler import reconstruct


def held_out_scenes() -> Tensor:
    """Returns: [N, 3, 128, 128] in [-1, 1]."""
    shown = [picture for about, picture in pictures.read_scenes(PACKED / "pictures.zip") if about["split"] != "train"]
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 127.5 - 1


def measure(base: Base, pixels: Tensor) -> str:
    images = list(((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())
    similar = np.mean([ssim(a, b) for a, b in zip(images, reconstruct(base, images), strict=True)])
    psnr_db = autoencoder.measure_psnr(base.pipeline.vae, pixels)
    return f"{len(images)} pictures: PSNR {psnr_db:.2f} dB, SSIM {similar:.3f}"


def main(args: argparse.Namespace) -> None:
    base, (concepts, rgba) = load_base(args.base), pictures.load(args.pictures)
    print("emoji:", measure(base, autoencoder.held_out_pictures(concepts, rgba, count=len(concepts))))
    print("scenes:", measure(base, held_out_scenes()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--base", default="embedded")
    main(parser.parse_args())
