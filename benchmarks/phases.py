"""What a step costs in each phase of the paper's regimes: the middle link alone, all links, the decoder unlocked.

In: a size. Out: a table, and JSON where a path is given. One trainer, as `bridle train` has it, goes through the phases
round by round on one thread, so that whatever else the machine does slows all alike. Of each turn the first step is
left out, for it makes what the others use. FLOPs are those of the modules' own products, as PyTorch counts them.

    python benchmarks/phases.py --size embedded --batch 24
    python benchmarks/phases.py --size sd15 --latents 32 --batch 4 --rounds 3     # random weights; 20 GB of memory
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from parts import flop_counter, modules_own_code
from peer import Batch, Models
from step import make_trainer

PHASES = ("connected", "middle", "unlocked")
REGIME: Any = {"regime": "auto", "unlock": "decoder"}


def count_gflops(args: argparse.Namespace) -> dict[str, float]:
    """Of a pair."""
    counted = {}
    with modules_own_code():
        trainer, rows = make_trainer(*given(args), precision="fp32", **REGIME)
        for phase in PHASES:
            trainer.switch(phase, 0)
            with flop_counter() as counter:
                trainer.step(0, rows)
            counted[phase] = counter.get_total_flops() / args.batch / 1e9
    return counted


def given(args: argparse.Namespace) -> tuple[Models, Batch]:
    models = getattr(Models, args.size)()
    return models, Batch.random(models, args.batch, args.latents)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of a step in each phase, the mean of a turn's, by round."""
    trainer, rows = make_trainer(*given(args), halved=False, **REGIME)
    taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for turn in range(1 + args.rounds):  # in the first one kernels are chosen
        for phase in PHASES if turn % 2 == 0 else reversed(PHASES):
            trainer.optimizer.state.clear()  # or the moments would be there twice for a moment
            trainer.switch(phase, 0)
            trainer.step(0, rows)
            started_s = time.process_time()
            for step in range(args.steps):
                trainer.step(1 + step, rows)
            took_s = (time.process_time() - started_s) / args.steps
            print(f"{'round' if turn else 'warming up'} {turn or ''} {phase}: {took_s:.3f} s", flush=True)
            if turn:
                taken[phase].append(took_s)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "embedded"), default="embedded")
    parser.add_argument("--latents", type=int, help="width of the square latents; 32, or 16 for the embedded base")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="that are timed in each turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.latents = args.latents or (32 if args.size == "sd15" else 16)
    gflops, taken = count_gflops(args), measure(args)
    result: dict[str, Any] = {name: getattr(args, name) for name in ("size", "latents", "batch", "rounds", "steps")}
    print(f"{'':12}{'GFLOP a pair':>14}{'CPU s a step':>14}   time beside all links, locked (range)")
    for phase in PHASES:
        ratios = [own / locked for own, locked in zip(taken[phase], taken["connected"], strict=True)]
        cpu_s, ratio = statistics.median(taken[phase]), statistics.median(ratios)
        result[phase] = {"gflops": gflops[phase], "cpu_s": taken[phase], "time_ratio": ratio}
        print(f"{phase:12}{gflops[phase]:14.2f}{cpu_s:14.3f}   {ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
