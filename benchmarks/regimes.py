"""Regimes compared: the same pairs and settings, the same processor time, several seeds.

    python benchmarks/regimes.py --out work/regimes --seconds 300 --seeds 0 1 2

Every run trains with one thread for so many seconds of processor time (probes, previews and saving included), which
other work on the machine does not lengthen, and is then measured as `bridle evaluate` does. Runs that are there already
are not repeated. Prints a table and writes `regimes.json` into the folder.
"""

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bridle.data.scenes import write_scenes
from bridle.data.settings import DataSettings
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.run.show import Shown
from bridle.sample.settings import SampleSettings
from bridle.train.log import read_rows
from bridle.train.settings import ProbeSettings, TrainSettings

REGIMES = ("standard", "small", "auto")
STEPS = 1000  # never reached; "auto" waits for the middle link for a twentieth of them at most
RECONNECT = 100  # of "small"
PROBE_EVERY = 40  # finer than by default, to see when control is learned


def settings_for(scenes: Path, regime: str, seed: int) -> RunSettings:
    """The demo's, with a learning rate that does not fall, because no run knows its last step."""
    return RunSettings(
        data=DataSettings(folder=scenes, annotator="canny", held_out=32, variants=2),
        train=TrainSettings(
            steps=STEPS,
            batch=24,
            lr=1e-3,
            warmup=30,
            ema_decay=0.98,
            weighting="balanced",
            seed=seed,
            regime=regime,
            reconnect=RECONNECT,
            checkpoint_every=STEPS,
            preview_every=STEPS,
        ),
        probe=ProbeSettings(every=PROBE_EVERY),
        sample=SampleSettings(steps=15, guidance=3.0, batch=16, precision="bf16"),
    )


def run(folder: Path, regime: str, seed: int, seconds: float) -> dict[str, object]:
    """One run, from its start to its figures."""
    settings = settings_for(write_scenes(folder.parent / "scenes").folder, regime, seed)
    started, progress = time.process_time(), Shown.progress

    def until_time_is_up(self: Shown, step: int, row: dict[str, float] | None) -> None:
        progress(self, step, row)
        if time.process_time() - started > seconds:
            signal.raise_signal(signal.SIGTERM)

    Shown.progress = until_time_is_up
    try:
        outcome = train_run(settings, folder).outcome
    finally:
        Shown.progress = progress
    figures = evaluate_run(folder, seeds=1).evaluation.headline
    events = read_rows(folder / "events.jsonl")
    metrics, probes = read_rows(folder / "metrics.jsonl")[-1], read_rows(folder / "probes.jsonl")
    probed_s = sum(row["time_s"] for row in probes)
    trained_s = metrics["step"] * settings.train.effective_batch / metrics["samples_per_s"]
    at = {kind: [row["step"] for row in events if row["kind"] == kind] for kind in ("learned", "switch")}
    result = {"regime": regime, "seed": seed, "steps": outcome.step, **at, "f1": figures.control.mean}
    result["probing"] = probed_s / (probed_s + trained_s)
    (folder / "result.json").write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("work/regimes"))
    parser.add_argument("--seconds", type=float, default=300, help="processor time of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", default=REGIMES, choices=REGIMES)
    given = parser.parse_args()
    results = []
    for seed in given.seeds:
        for regime in given.regimes:
            folder = given.out / f"{regime}-{seed}"
            done = folder / "result.json"
            results.append(json.loads(done.read_text()) if done.exists() else run(folder, regime, seed, given.seconds))
    (given.out / "regimes.json").write_text(json.dumps({"seconds": given.seconds, "runs": results}, indent=2))
    print("| regime | steps | all links from | learned at | F1 of each seed | mean |\n|---|---|---|---|---|---|")
    for regime in given.regimes:
        mine = [result for result in results if result["regime"] == regime]
        f1 = [result["f1"] for result in mine]
        columns = [
            " ".join(str(value) for value in values)
            for values in zip(
                *[
                    (r["steps"], (r["switch"] or [0])[0], (r["learned"] or ["never"])[0], f"{r['f1']:.2f}")
                    for r in mine
                ],
                strict=True,
            )
        ]
        print(f"| {regime} | {' | '.join(columns)} | {statistics.mean(f1):.2f} |")


if __name__ == "__main__":
    main()
