"""How long until something happens: `import bridle`, `bridle --help`, and the first step of `bridle train`.

In: nothing. Out: a table, and JSON where a path is given. Every start is a process of its own; the kinds take turns, so
that whatever else the machine does slows all alike. The first step is that of a real run on the embedded base, from a
data set whose cache is warm, with everything that `bridle train` does before it; held-out pairs would add a probe.

    python benchmarks/start.py --rounds 9 --json start.json
    python benchmarks/start.py --profile     # where the time until the first step goes, by cProfile
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PAIRS = 64
EXTRAS = ("peft", "bitsandbytes", "accelerate", "scipy")  # what diffusers imports as well where it is there
GOALS_S = {"import bridle": 0.2, "bridle --help": 0.3, "first step, beyond import torch": 3.0}

# --- in processes of their own


def write_pairs(folder: Path) -> None:
    """Pictures of noise with hints, and their cache, as a run leaves it."""
    import numpy as np
    from PIL import Image

    from bridle.base.load import load_base
    from bridle.run.pairs import load_data

    (folder / "data").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(PAIRS):
        for kind in ("picture", "hint"):
            pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / f"{kind}-{number}.png")
        row = {"file_name": f"picture-{number}.png", "hint": f"hint-{number}.png", "text": f"number {number}"}
        rows.append(json.dumps(row))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(rows))
    load_data(settings_of(folder).data, load_base(), folder / "run")


def settings_of(folder: Path) -> Any:
    from bridle.data.settings import DataSettings
    from bridle.run.settings import RunSettings
    from bridle.train.settings import TrainSettings

    data = DataSettings(folder=folder / "data", held_out=0)
    return RunSettings(device="cpu", data=data, train=TrainSettings(steps=1))


def first_step(folder: Path) -> None:
    """`bridle train` until its first step is done; what comes after is cut off. Prints CPU seconds by part."""
    marks = {"start": time.process_time()}

    def mark(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            marks[f"before {part}"] = time.process_time()
            result = work(*given, **named)
            marks[part] = time.process_time()
            if part == "step":
                print(json.dumps(marks), flush=True)
                os._exit(0)
            return result

        return timed

    import torch  # noqa: F401

    marks["import torch"] = time.process_time()
    from bridle.cli import uncollected

    with uncollected(lasting=True):  # as the command line does
        from bridle.run import training
        from bridle.train.trainer import Trainer

    marks["import bridle.run.training"] = time.process_time()
    vars(training)["load_base"] = mark("load the base", training.load_base)
    vars(training)["share_data"] = mark("open the cache", training.share_data)
    vars(training)["new_control"] = mark("copy the control", training.new_control)
    Trainer.step = mark("step", Trainer.step)  # ty: ignore[invalid-assignment]
    with tempfile.TemporaryDirectory(dir=folder) as run:
        (Path(run) / "cache").symlink_to(folder / "run" / "cache")
        training.train_run(settings_of(folder), Path(run))


def profile(folder: Path) -> None:
    """The costliest calls until the first step, by their own time and by all that they call."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    vars(os)["_exit"] = sys.exit
    try:
        profiler.runcall(first_step, folder)
    except SystemExit:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(70).sort_stats("tottime").print_stats(30)


# --- in the parent


def kinds(folder: Path) -> dict[str, list[str]]:
    """What is started, by name."""
    python = sys.executable
    return {
        "python": [python, "-c", ""],
        "import torch": [
            python,
            "-c",
            "import os, torch; os._exit(0)",
        ],  # as the first step ends: nothing is taken down
        "import bridle": [python, "-c", "import bridle"],
        "bridle --help": [python, "-m", "bridle", "--help"],
        "first step": [python, __file__, "--first-step", str(folder)],
    }


def start(command: list[str]) -> dict[str, Any]:
    """CPU and wall seconds of a process from its start to its end, and the parts that it tells of."""
    before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - started_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = done.stdout.strip().splitlines()[-1:] if "--first-step" in command else []
    return {"cpu_s": cpu_s, "wall_s": wall_s} | ({"marks": json.loads(said[0])} if said else {})


def parts_of(marks: dict[str, float]) -> dict[str, float]:
    """CPU seconds between one mark and the next; "before x" is what came between two named parts."""
    return {name: marks[name] - marks[before] for before, name in itertools.pairwise(marks)}


def measure(folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    commands = kinds(folder)
    for command in commands.values():
        start(command)  # fills the file cache and writes bytecode
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in commands if turn % 2 == 0 else reversed(commands):
            measured[name].append(start(commands[name]))
    return measured


def seconds(measured: dict[str, list[dict[str, Any]]], clock: str) -> dict[str, list[float]]:
    """Of each kind in each round, and the first step beyond torch."""
    found = {name: [took[clock] for took in starts] for name, starts in measured.items()}
    beyond = [a - b for a, b in zip(found["first step"], found["import torch"], strict=True)]
    return found | {"first step, beyond import torch": beyond}


def show(measured: dict[str, list[dict[str, Any]]]) -> None:
    cpu, wall = seconds(measured, "cpu_s"), seconds(measured, "wall_s")
    print(f"{'':34}{'CPU s':>8}{'wall s':>8}{'least':>8}{'goal':>7}")
    for name in cpu:
        goal = f"{GOALS_S[name]:7.1f}" if name in GOALS_S else ""
        print(
            f"{name:34}{statistics.median(cpu[name]):8.2f}{statistics.median(wall[name]):8.2f}"
            f"{min(wall[name]):8.2f}{goal}"
        )
    print("\nUntil the first step, CPU s:")
    parts = [parts_of(took["marks"]) for took in measured["first step"]]
    for name in parts[0]:
        print(f"  {name:32}{statistics.median(part[name] for part in parts):8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="starts of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--profile", action="store_true", help="profile the first step and measure nothing")
    parser.add_argument("--first-step", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write-pairs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        return first_step(options.first_step)
    if options.write_pairs:
        return write_pairs(options.write_pairs)
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start([sys.executable, __file__, "--write-pairs", name])
        if options.profile:
            return profile(folder)
        measured = measure(folder, options.rounds)
    present = [name for name in EXTRAS if find_spec(name)]
    print(f"Present beside what Bridle needs: {', '.join(present) or 'nothing'}\n")
    show(measured)
    if options.json:
        from bridle.atomic import write_text

        clocks = {clock: seconds(measured, clock) for clock in ("cpu_s", "wall_s")}
        parts = [parts_of(took["marks"]) for took in measured["first step"]]
        write_text(options.json, json.dumps({"present": present, **clocks, "parts_cpu_s": parts}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
