"""Make the shipped copy of a trained base: bfloat16, shards below 15 MB, and its model card.

python tools/base/export.py --base work/base/model --out src/bridle/base/embedded/v2
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

SHARD = "14MB"
LIMIT_MB, FILE_LIMIT_MB = 64, 15


def sizes_mb(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_size / 1e6 for path in folder.rglob("*") if path.is_file()}


def main(args: argparse.Namespace) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(args.base, dtype=torch.bfloat16, low_cpu_mem_usage=False)
    if args.vae is not None:  # a sharper decoder for the same latents
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained(args.vae).bfloat16())
    card = args.out / "README.md"
    kept = card.read_text() if card.exists() else None
    shutil.rmtree(args.out, ignore_errors=True)
    pipeline.save_pretrained(args.out, max_shard_size=SHARD)
    for name in ("vocab.json", "merges.txt"):  # what transformers before version 5 reads
        shutil.copy(args.base.parent / "tokenizer" / name, args.out / "tokenizer" / name)
    for path in args.out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if kept is not None:
        card.write_text(kept)
    sizes = sizes_mb(args.out)
    for name, size in sorted(sizes.items()):
        print(f"{size:8.2f} MB  {name}")
    print(f"{sum(sizes.values()):8.2f} MB in all")
    if sum(sizes.values()) > LIMIT_MB or max(sizes.values()) > FILE_LIMIT_MB:
        raise SystemExit(f"over the limit of {LIMIT_MB} MB in all, {FILE_LIMIT_MB} MB a file")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("work/base/model"))
    parser.add_argument("--vae", type=Path, help="an autoencoder to put in the place of the base's own")
    parser.add_argument("--out", type=Path, default=Path("src/bridle/base/embedded/v2"))
    main(parser.parse_args())
