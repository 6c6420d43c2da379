"""What a training step costs: diffusers' example loop against Bridle's, on the same work.

In: a size. Out: a table, and JSON where a path is given. Each side is a process of its own, so that their peaks of
memory can be told apart; they take turns, a step each, so that whatever else the machine does slows both alike.
It runs on a GPU where there is one, which both sides share. Models and batch lie there before the first step.

    python benchmarks/step.py --size sd15 --latents 32 --json step.json     # random weights; 16 GB of memory
    python benchmarks/step.py --size sd15 --latents 32 --lean least         # ours with as little memory as it can
    python benchmarks/step.py --size embedded --batch 24 --no-encode
    python benchmarks/step.py --size sd15 --latents 64 --batch 4 --rounds 20 --device cuda --compile
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
    python benchmarks/step.py --size embedded --batch 24 --precision fp32   # as on a processor that has no more
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

SIDES = ("peer", "ours")
GPU_WARMUP = 5  # steps until a GPU's libraries, allocator and clocks have settled
# Rungs of `bridle plan`'s ladder; on both, autoencoder and text encoder are away between probes.
LEAN: dict[str, dict[str, Any]] = {
    "small": {"optimizer": "adamw8bit", "machine": {"pack_weights": False}},
    "least": {"optimizer": "adamw8bit", "machine": {"pack_weights": False, "gradient_checkpointing": True}},
}


# --- in a process of its own


def serve(args: argparse.Namespace) -> None:
    """Say on what device this side is; then answer every line from the parent with what one step took."""
    import torch
    from peer import Batch, Models, Peer

    from bridle.base.load import pick_device
    from bridle.kernels.precision import TYPES
    from bridle.train.memory import peak_memory_bytes

    torch.set_num_threads(args.threads)
    device = torch.device(pick_device(args.device))
    on_gpu = device.type == "cuda"
    with device:  # random weights are drawn where they are needed; a GPU takes a hundredth of the time
        models = getattr(Models, args.size)().to(device)
    batch = Batch.random(models, args.batch, args.latents).to(device)
    side: Any = Peer(models, args.encode, TYPES[args.precision]) if args.side == "peer" else ours(models, batch, args)
    wait = torch.cuda.synchronize if on_gpu else lambda: None  # a GPU works on after a call returned
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    print(json.dumps({"device": device.type, "device_name": name}), flush=True)
    for _ in sys.stdin:
        wait()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        loss = side.step(batch)
        wait()
        took = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s, "loss": loss}
        peaks = {"peak_bytes": peak_memory_bytes(device)}  # on a GPU: reserved, which is at least what is allocated
        if on_gpu:
            peaks["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        print(json.dumps(took | peaks), flush=True)


def ours(models: Any, batch: Any, args: argparse.Namespace) -> Any:
    """Bridle's trainer on the same batch."""
    import torch

    if args.lean:
        models.vae = models.text_encoder = torch.nn.Identity()
    trainer, rows = make_trainer(models, batch, args.compile, precision=args.precision, **LEAN.get(args.lean, {}))
    numbers = itertools.count(1)
    return SimpleNamespace(step=lambda batch: trainer.step(next(numbers), rows).loss)


def make_trainer(
    models: Any,
    batch: Any,
    compiled: bool = False,
    halved: bool = True,
    machine: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> tuple[Any, Any]:
    """Set up what a run of Bridle does, where the models are.

    Args:
        batch: on the same device, or on the CPU, as in a run; the trainer moves what it needs.
        compiled: on a GPU, as `machine.compile` has it.
        halved: whether the base is kept in bfloat16 where that is computed in; not where it is to be trained.
        machine: what else is set of the machine.
        changes: to the settings of training.

    Returns: the trainer, and the rows of a step, every draw of which is given.
    """
    import torch
    from diffusers import DDPMScheduler

    from bridle.base.schedule import read_schedule
    from bridle.cache.store import CachedBatch
    from bridle.control.control import Control
    from bridle.control.text import Text
    from bridle.train.draws import Draws
    from bridle.train.feed import Rows
    from bridle.train.settings import MachineSettings, TrainSettings
    from bridle.train.trainer import Trainer

    count = len(batch.latents)
    text = Text(batch.text)
    ids = [f"random#{number}" for number in range(count)]
    nothing = torch.zeros_like(batch.latents)
    hint = (batch.hint * 255).round().to(torch.uint8)  # as a cache keeps it
    pairs = CachedBatch(mean=batch.latents, std=nothing, kept_hint=hint, captions=("",) * count, text=text)

    empty = Text(batch.text[:1])
    cache: Any = SimpleNamespace(train_ids=tuple(ids), empty_text=empty, fingerprint="random", batch=lambda ids: pairs)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    unet = models.unet.requires_grad_(False).eval()
    halves = halved and changes.get("precision", "bf16") == "bf16"
    for model in (unet.up_blocks, models.vae, models.text_encoder) if halves else ():  # in the order of a run
        model.to(torch.bfloat16)
    control = Control.from_base(unet)
    how = {
        "batch": count,
        "lr": 1e-5,
        "warmup": 0,
        "ema_decay": 0.0,
        "prompt_dropout": 0.0,
        "precision": "bf16",
        **changes,
    }
    settings = TrainSettings(**how)
    if halves:
        unet.to(torch.bfloat16)
    on = MachineSettings(compile=compiled, **machine)
    trainer = Trainer(control, unet, read_schedule(scheduler), cache, settings, on)
    draws = Draws(
        posterior=torch.zeros_like(batch.noise),
        noise=batch.noise,
        timesteps=batch.timesteps,
        drop_prompt=torch.zeros(count, dtype=torch.bool, device=batch.noise.device),
    )
    return trainer, Rows(ids, pairs, draws)


# --- and what compares them


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Let both sides take their turns."""
    sides = {side: start(args, side) for side in SIDES}
    where = {side: hear(process) for side, process in sides.items()}["ours"]  # the peer is there as well
    warmup = max(args.warmup, GPU_WARMUP) if where["device"] == "cuda" else args.warmup
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for round_number in range(warmup + args.rounds):
        for side, process in sides.items():
            took = ask(process)
            if round_number >= warmup:
                taken[side].append(took)
            print(f"{side:5} {took['wall_s']:8.3f} s  cpu {took['cpu_s']:8.3f} s  loss {took['loss']:.4f}", flush=True)
    for process in sides.values():
        process.communicate()
    result: dict[str, Any] = {"size": args.size, "latents": args.latents, "batch": args.batch, "encode": args.encode}
    result |= {"precision": args.precision}
    result |= where | {"compile": args.compile, "lean": args.lean, "warmup": warmup, "rounds": args.rounds}
    for side in SIDES:
        result[side] = summarize(taken[side], args.batch)
    pairs = list(zip(taken["peer"], taken["ours"], strict=True))
    result["ratio_wall"] = statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs)
    result["ratio_cpu"] = statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs)
    return result


def summarize(taken: list[dict[str, float]], batch: int) -> dict[str, float]:
    """Medians of one side's steps, and the peaks of its memory; what is allocated is known of a GPU alone."""
    wall_s = statistics.median(took["wall_s"] for took in taken)
    summary = {
        "wall_s": wall_s,
        "cpu_s": statistics.median(took["cpu_s"] for took in taken),
        "samples_per_s": batch / wall_s,
    }
    peaks = {name: name.removesuffix("bytes") + "gib" for name in taken[0] if name.startswith("peak_")}
    return summary | {gib: max(took[name] for took in taken) / 2**30 for name, gib in peaks.items()}


def start(args: argparse.Namespace, side: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--side", side, "--size", args.size, "--latents", str(args.latents)]
    command += ["--batch", str(args.batch), "--threads", str(args.threads), "--device", args.device]
    command += ["--precision", args.precision]
    command += [] if args.encode else ["--no-encode"]
    command += ["--compile"] if args.compile else []
    command += ["--lean", args.lean] if args.lean else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Have a side take a step. Returns: what it took."""
    assert process.stdin is not None
    print("step", file=process.stdin, flush=True)
    return hear(process)


def hear(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The next line of a side."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side ended early; what it said is above")
    said: dict[str, Any] = json.loads(line)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "embedded"), default="sd15")
    parser.add_argument("--latents", type=int, help="width of the square latents; 32, or 16 for the embedded base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help=f"rounds left out; on a GPU {GPU_WARMUP} or more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, else the CPU")
    parser.add_argument("--no-encode", dest="encode", action="store_false", help="leave the peer's encoders out")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="what both sides compute in")
    parser.add_argument("--compile", action="store_true", help="ours, on a GPU, with machine.compile")
    parser.add_argument("--lean", choices=LEAN, help="ours with less memory, as `train --memory` has it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.latents = args.latents or (32 if args.size == "sd15" else 16)
    if args.side:
        serve(args)
        return
    result = compare(args)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
