"""Several processes for one run. In: settings, and a number or a Ray cluster. Out: the run that one process makes.

Each process calls `train_run`, which finds the others through its environment. When one dies, all are started again
and go on from the newest checkpoint: a run needs nothing but its folder.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bridle import config
from bridle.errors import ConfigError, TrainError
from bridle.run.settings import RunSettings

RESTARTS = 3


def train_processes(settings: RunSettings, folder: Path, count: int, options: Sequence[str] = ()) -> None:
    """Run `bridle train` in several processes on this machine, under torchrun; Ctrl-C and SIGTERM reach all of them.

    Args:
        options: further ones for each of the processes.

    Raises: TrainError: they failed more often than they are started again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        resolved = Path(scratch) / "settings.toml"
        config.save(settings, resolved)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += [f"--max-restarts={RESTARTS}", "-m", "bridle", "train", str(resolved), "--out", str(folder)]
        threads = str(max(1, (os.cpu_count() or 1) // count))
        process = subprocess.Popen([*command, *options], env={"OMP_NUM_THREADS": threads} | os.environ)
        asked = hand_on(process)
        if process.wait() != 0 and not asked:
            raise TrainError(f"training in {count} processes failed, see above; the same command goes on with it")


def hand_on(process: "subprocess.Popen[bytes]") -> list[int]:
    """Let a signal to this process be the other's to answer. Returns: those that have arrived, once they do."""
    asked: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the whole group by itself
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return asked


def train_on_ray(settings: RunSettings, folder: Path, address: str, count: int, force: bool = False) -> None:
    """Run on a Ray cluster. The run's folder must be one that all machines see.

    Args:
        address: of the cluster, such as "auto" or "ray://host:10001"; "local" starts one on this machine.
        count: processes; each takes a GPU where the cluster has enough.

    Raises: ConfigError: Ray is not installed. TrainError: training failed more often than it is started again.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed; pip install 'bridle[cluster]'") from None
    if not ray.is_initialized():
        ray.init(address=address)
    folder = folder.resolve()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"settings": settings, "folder": folder, "force": force},
        scaling_config=ScalingConfig(num_workers=count, use_gpu=ray.cluster_resources().get("GPU", 0) >= count),
        run_config=RunConfig(name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=RESTARTS)),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised, in several ways
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise TrainError(f"training on Ray failed ({last}); the same command goes on with it") from error


def train_on_worker(given: dict[str, object]) -> None:
    """What each of Ray's workers does; Ray has joined the processes already."""
    from bridle.run.training import train_run

    train_run(given["settings"], given["folder"], force=given["force"])  # ty: ignore[invalid-argument-type]
