"""Where a training step's time goes: FLOPs and time of each part, and the floor that matrix products set.

The FLOPs are PyTorch's count of the products of the modules' own code; the floor is what they would take at the rate
that this machine reaches on one large product in bfloat16. What else a step does (normalisation, activations, moving
numbers) has no FLOPs here, so the distance to the floor is what it costs, and what the products lose by their shapes.

    python benchmarks/parts.py --size embedded --batch 24
    python benchmarks/parts.py --size sd15 --latents 32 --json parts.json
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peer import Batch, Models
from step import make_trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

PARTS = ("control forward", "locked encoder", "decoder forward", "backward", "optimiser")
RATE_SIZE = 4096


class Meter:
    """Reads a counter where one part of a step ends and the next begins.

    Args:
        read: the counter: seconds, or FLOPs so far.
    """

    def __init__(self, trainer: Any, read: Callable[[], float]) -> None:
        self.read, self.last = read, 0.0
        self.parts: dict[str, float] = defaultdict(float)
        trainer.control.register_forward_pre_hook(lambda *_: self.mark("before"))
        trainer.control.register_forward_hook(lambda *_: self.mark("control forward"))
        trainer.denoiser.mid_block.register_forward_hook(lambda *_: self.mark("locked encoder"))
        trainer.denoiser.register_forward_hook(lambda *_: self.mark("decoder forward"))
        self.optimizer_begins(trainer)

    def optimizer_begins(self, trainer: Any) -> None:
        gradients = trainer._gradients

        def marked(*given: Any) -> Any:
            losses = gradients(*given)
            self.mark("backward")
            return losses

        trainer._gradients = marked

    def mark(self, part: str) -> None:
        now = self.read()
        self.parts[part] += now - self.last
        self.last = now

    def step(self, trainer: Any, rows: Any) -> dict[str, float]:
        """One step. Returns: what each part added to the counter."""
        self.parts.clear()
        self.last = self.read()
        trainer.step(1, rows)
        self.mark("optimiser")
        return dict(self.parts)


def count_flops(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Of the modules' own code. Returns: FLOPs of each part; and those that the cache spares: the encoders'."""
    models = getattr(Models, args.size)()
    batch = Batch.random(models, args.batch, args.latents)
    spared = {}
    with torch.no_grad():
        for name, call in (
            ("autoencoder", lambda: models.vae.encode(batch.pixels)),
            ("text encoder", lambda: models.text_encoder(batch.ids)),
        ):
            with flop_counter() as counter:
                call()
            spared[name] = float(counter.get_total_flops())
    with modules_own_code():
        trainer, rows = make_trainer(models, batch, precision="fp32")
    with flop_counter() as counter:
        parts = Meter(trainer, lambda: float(counter.get_total_flops())).step(trainer, rows)
    return parts, spared


@contextmanager
def modules_own_code() -> Generator[None]:
    """While it lasts trainers set up steps without our kernels and attention, whose products PyTorch cannot count."""
    with (
        mock.patch("bridle.train.trainer.speeds_up", return_value=False),
        mock.patch("bridle.train.trainer.choose_attention", return_value=lambda: None),
    ):
        yield


def flop_counter() -> FlopCounterMode:
    """PyTorch's, with attention on a CPU, which it knows how to count but does not."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(queries, keys, values)

    def backward(gradient: Any, queries: Any, keys: Any, values: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, queries, keys, values)

    return FlopCounterMode(display=False, custom_mapping={flash: forward, back: backward})


def matmul_rate() -> float:
    """FLOPs a second of one large product in bfloat16: the best of some."""
    left, right = torch.randn(2, RATE_SIZE, RATE_SIZE, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        started = time.process_time()
        left @ right
        times.append(time.process_time() - started)
    return 2 * RATE_SIZE**3 / min(times)


def saved_bytes(trainer: Any, rows: Any) -> int:
    """What autograd holds at the end of the forward pass, weights and their casts left out."""
    held: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.inner.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = trainer.losses(rows.batch, rows.draws)
    del losses
    return sum(held.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "embedded"), default="embedded")
    parser.add_argument("--latents", type=int, help="width of the square latents; 32, or 16 for the embedded base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.latents = args.latents or (32 if args.size == "sd15" else 16)
    flops, spared = count_flops(args)
    models = getattr(Models, args.size)()
    trainer, rows = make_trainer(models, Batch.random(models, args.batch, args.latents))
    meter = Meter(trainer, time.process_time)
    taken = [meter.step(trainer, rows) for _ in range(2 + args.rounds)][2:]  # the first choose their kernels
    rate = matmul_rate()
    cpu_s = {part: statistics.median(one[part] for one in taken) for part in PARTS}
    result: dict[str, Any] = {
        "size": args.size,
        "latents": args.latents,
        "batch": args.batch,
        "matmul_tflops": rate / 1e12,
        "saved_mib": saved_bytes(trainer, rows) / 2**20,
        "spared_gflops": {name: count / 1e9 for name, count in spared.items()},
        "parts": {
            part: {"gflops": flops[part] / 1e9, "floor_s": flops[part] / rate, "cpu_s": cpu_s[part]} for part in PARTS
        },
    }
    print(f"one product of {RATE_SIZE}: {rate / 1e12:.2f} TFLOP/s; autograd holds {result['saved_mib']:.0f} MiB")
    print(table(result["parts"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def table(parts: dict[str, dict[str, float]]) -> str:
    """Markdown: a line a part, and their sum."""
    total = {key: sum(part[key] for part in parts.values()) for key in ("gflops", "floor_s", "cpu_s")}
    lines = ["| part | GFLOP | floor, s | CPU, s | of the step | times the floor |", "|---|---|---|---|---|---|"]
    for name, part in {**parts, "step": total}.items():
        over = f"{part['cpu_s'] / part['floor_s']:.1f}" if part["floor_s"] else ""
        share = f"{part['cpu_s'] / total['cpu_s']:.0%}"
        lines.append(
            f"| {name} | {part['gflops']:.1f} | {part['floor_s']:.3f} | {part['cpu_s']:.3f} | {share} | {over} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
