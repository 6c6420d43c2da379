"""What transfer does to a control: the embedded base is fine-tuned to a style, and the control follows or is moved.

The style is negative pictures: light on dark. In: a run on the embedded base, as `bridle train` or `bridle demo` leaves
it. Out: a table of how well held-out pictures obey their hints, and of how bright they are, which shows the style.

    python benchmarks/transfer.py --run demo --steps 300 1000 --json transfer.json
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridle.atomic import write_text
from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.control.transfer import transfer
from bridle.data.annotate import get_annotator
from bridle.data.load import load_example
from bridle.evaluate.evaluate import HeldOutPair
from bridle.evaluate.fidelity import edge_f1
from bridle.files.weights import load_control
from bridle.run.pairs import RunData, open_data
from bridle.run.settings import RunSettings, read_run
from bridle.sample.sampler import generate
from bridle.train.objective import add_noise, loss_per_sample, loss_weights, sample_posterior, target

BATCH, PROMPT_DROPOUT = 24, 0.1


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    settings = read_run(args.run)
    data, source, tuned = open_data(settings.data, args.run), load_base(settings.base), load_base(settings.base)
    control, pairs = load_control(args.run / "control"), data.held_out(args.pairs)
    rows = [measure("source", source, control, pairs, settings), measure("source", source, None, pairs, settings)]
    report(rows)
    done, steps = 0, fine_tune(tuned, encode_negatives(data, tuned), args.lr)
    for count in args.steps:
        loss = np.mean([next(steps) for _ in range(count - done)])
        done = count
        name, moved = f"tuned {count} steps", transfer(control, source.pipeline, tuned.pipeline)
        print(f"{name}: loss {loss:.4f}, base moved by {distance(source, tuned):.4f} of its length", flush=True)
        kinds = {"as it is": control, "transferred": moved, "none": None}
        rows += [measure(name, tuned, kind, pairs, settings, word) for word, kind in kinds.items()]
        report(rows[-3:])
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")


def encode_negatives(data: RunData, base: Base) -> tuple[Tensor, Tensor, Text]:
    """The run's training pictures in the new style: mean and deviation of their latents, and their captions' text."""
    held_out = {id.rpartition("#")[0] for id in data.cache.held_out_ids}
    annotator = get_annotator(data.settings.annotator)
    records = [record for record in data.source.records if record.id not in held_out]
    examples = [load_example(record, data.settings, annotator, 0, train=True) for record in records]
    parts = []
    for start in range(0, len(examples), 32):
        pixels = np.stack([255 - example.image for example in examples[start : start + 32]])
        parts.append(base.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1))
    mean, std = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return mean, std, base.encode_captions([example.caption for example in examples])


def fine_tune(base: Base, pairs: tuple[Tensor, Tensor, Text], lr: float) -> Iterator[float]:
    """Train the whole U-Net in place, without any control. Yields: the loss of each step."""
    mean, std, text = pairs
    unet, schedule, empty = base.denoiser.requires_grad_(True), base.schedule, base.encode_captions([""])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr)
    while True:
        chosen, timesteps = torch.randint(len(mean), (BATCH,)), torch.randint(len(schedule), (BATCH,))
        latents = sample_posterior(mean[chosen], std[chosen], torch.randn_like(mean[chosen]))
        noise, told = torch.randn_like(latents), text[chosen].where(torch.rand(BATCH) >= PROMPT_DROPOUT, empty)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(add_noise(latents, noise, timesteps, schedule), timesteps, told.states).sample
        losses = loss_per_sample(output, target(latents, noise, timesteps, schedule))
        loss = (losses * loss_weights(timesteps, schedule, "balanced")).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def measure(
    name: str,
    base: Base,
    control: Control | None,
    pairs: list[HeldOutPair],
    settings: RunSettings,
    word: str | None = None,
) -> dict[str, Any]:
    """Draw each held-out hint twice and compare the edges, within 1 px."""
    annotator, steered = get_annotator(settings.data.annotator), copy.deepcopy(control)
    twice, seeds = pairs * 2, [index // len(pairs) for index in range(2 * len(pairs))]
    prompts = [pair.caption for pair in twice]
    pictures = generate(
        base, steered, [pair.hint for pair in twice], prompts, seeds, settings.sample, pairs[0].hint.shape[:2]
    )
    found = [edge_f1(pair.hint, annotator(picture, None)) for pair, picture in zip(twice, pictures, strict=True)]
    per_pair = np.reshape(found, (2, -1)).mean(0)
    return {
        "base": name,
        "control": word or ("none" if control is None else "its own"),
        "f1": float(per_pair.mean()),
        "f1_error": float(per_pair.std(ddof=1) / len(per_pair) ** 0.5),
        "brightness": float(np.mean(pictures) / 255),
    }


def distance(source: Base, tuned: Base) -> float:
    """How far the weights have moved, as a share of their length."""
    pairs = list(zip(source.denoiser.parameters(), tuned.denoiser.parameters(), strict=True))
    moved = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
    return (moved / sum(float(a.detach().double().square().sum()) for a, _ in pairs)) ** 0.5


def report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['base']:18} control: {row['control']:12} F1 {row['f1']:.3f} ± {row['f1_error']:.3f}"
            f"  brightness {row['brightness']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo"), help="a run on the embedded base")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000], help="of fine-tuning, rising")
    parser.add_argument("--lr", type=float, default=1e-4, help="of fine-tuning")
    parser.add_argument("--pairs", type=int, default=32, help="held-out pairs")
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
