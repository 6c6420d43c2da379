"""Measure a base's autoencoder on every held-out concept, on white, skin-tone copies left out.

python tools/base/measure.py --base embedded
"""

import argparse
from pathlib import Path

import autoencoder
import numpy as np
import pictures

from bridle.base.load import load_base
from bridle.evaluate.fidelity import ssim
from bridle.sample.sampler import reconstruct


def main(args: argparse.Namespace) -> None:
    concepts, rgba = pictures.load(args.pictures)
    held_out = autoencoder.held_out_pictures(concepts, rgba, count=len(concepts))
    base = load_base(args.base)
    images = list(((held_out.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())
    similar = np.mean([ssim(a, b) for a, b in zip(images, reconstruct(base, images), strict=True)])
    psnr_db = autoencoder.measure_psnr(base.pipeline.vae, held_out)
    print(f"{len(images)} pictures: PSNR {psnr_db:.2f} dB, SSIM {similar:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("work/base/pictures.zip"))
    parser.add_argument("--base", default="embedded")
    main(parser.parse_args())
