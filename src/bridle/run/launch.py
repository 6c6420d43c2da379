"""Several processes for one run. In: settings, and a number or a Ray cluster. Out: the run that one process makes.

Each process calls `train_run`, which finds the others through its environment. When one dies, all are started again
and go on from the newest checkpoint: a run needs nothing but its folder.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bridle import config
from bridle.errors import BridleError, ConfigError, TrainError
from bridle.run.settings import RunSettings

RESTARTS = 3
RAYS_OWN = "ray"  # what it keeps for itself in the run's folder
USER_ERROR = 2  # the exit status of what starting again cannot put right
GRACE_S = 5.0  # for the others to say why they failed too; then they are killed, for they may wait for ever
LOOK_S = 0.05


def train_processes(settings: RunSettings, folder: Path, count: int, options: Sequence[str] = ()) -> int:
    """Run `bridle train` in several processes on this machine, as torchrun would; SIGTERM is handed on to all of them.

    torchrun itself is not used: it starts again what cannot succeed, and answers a plain stop with a traceback.

    Args:
        options: further ones for each of the processes.

    Returns: the exit status; where it is not 0, a process has said why.
    Raises: TrainError: they died too often.
    """
    with tempfile.TemporaryDirectory() as scratch, hand_on() as (ranks, asked):
        resolved = Path(scratch) / "settings.toml"
        config.save(settings, resolved)
        command = [sys.executable, "-m", "bridle", "train", str(resolved), "--out", str(folder), *options]
        for attempt in range(RESTARTS + 1):
            ranks[:] = start_ranks(command, count, Path(scratch))
            statuses = wait_for(ranks)
            if not any(statuses):
                return 0
            if asked:
                return 128 + asked[0]
            show_others(statuses, Path(scratch))
            if USER_ERROR in statuses:
                return USER_ERROR
            if attempt < RESTARTS:
                again = f"all start again from the newest checkpoint ({attempt + 1} of {RESTARTS})"
                print(f"{describe(statuses)}; {again}", file=sys.stderr)
    remedy = "the same command goes on with the run"
    raise TrainError(f"{describe(statuses)}, after {RESTARTS} starts from the newest checkpoint; {remedy}")


@contextmanager
def hand_on() -> Generator[tuple[list["subprocess.Popen[bytes]"], list[int]]]:
    """Meanwhile a signal to this process is others' to answer. Yields: who they are, and the signals that arrived."""
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the whole group by itself
            for rank in ranks:
                rank.terminate()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ranks, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_ranks(command: Sequence[str], count: int, scratch: Path) -> list["subprocess.Popen[bytes]"]:
    """Start all processes; what others than the main one say goes to files, or bars and messages would be mixed up."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared = {"OMP_NUM_THREADS": threads} | os.environ | place
    ranks = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(said_by(rank, scratch), "wb") as said:
            ranks.append(subprocess.Popen(command, env=shared | own, stderr=said if rank else None))
    return ranks


def wait_for(ranks: Sequence["subprocess.Popen[bytes]"]) -> list[int | None]:
    """Returns: their exit statuses, once all have ended. Negative: a signal. None: it had to be killed."""
    while not any(statuses := [rank.poll() for rank in ranks]) and None in statuses:
        time.sleep(LOOK_S)
    patience_s = time.monotonic() + GRACE_S
    while None in (statuses := [rank.poll() for rank in ranks]) and time.monotonic() < patience_s:
        time.sleep(LOOK_S)
    for rank in ranks:
        rank.kill()
        rank.wait()
    return statuses


def said_by(rank: int, scratch: Path) -> Path:
    return scratch / f"rank-{rank}.log"


def show_others(statuses: Sequence[int | None], scratch: Path) -> None:
    """What other processes than the main one said before they failed, unless it said the same."""
    worst = USER_ERROR if USER_ERROR in statuses else 1
    for rank, status in enumerate(statuses):
        if rank and status == worst and statuses[0] != USER_ERROR:
            sys.stderr.write(said_by(rank, scratch).read_text(encoding="utf-8", errors="replace"))


def describe(statuses: Sequence[int | None]) -> str:
    """Who failed, and how: one that was killed, if there is one, because the others fail for want of it."""
    status, rank = min((status, rank) for rank, status in enumerate(statuses) if status)
    how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
    return f"process {rank} of {len(statuses)} {how}"


def train_on_ray(settings: RunSettings, folder: Path, address: str, count: int, force: bool = False) -> None:
    """Run on a Ray cluster. All its machines must see the run's folder, the data set and the base under these paths.

    Ray's workers hear no signals: Ctrl-C ends training at once, and the same call goes on from the newest checkpoint.

    Args:
        address: of the cluster, as host:port, or "auto" for the one that runs on this machine; "local" starts one.
        count: processes; each takes a GPU where the cluster has enough.

    Raises: ConfigError: Ray is not installed. TrainError: there is no such cluster, or training failed more often than
        it is started again.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed; pip install 'ray[train]'") from None
    connect(ray, address)
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"settings": settings, "folder": folder, "force": force, "place": Path.cwd()},
        scaling_config=ScalingConfig(num_workers=count, use_gpu=ray.cluster_resources().get("GPU", 0) >= count),
        run_config=RunConfig(
            name=RAYS_OWN, storage_path=str(folder.resolve()), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised, in several ways
        raise TrainError(f"training on Ray failed: {cause(error)}; the same command goes on with the run") from error


def connect(ray: Any, address: str) -> None:
    """Join the cluster, unless that is done. Raises: TrainError: there is none."""
    if ray.is_initialized():
        return
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # without, others on the network could run code on it
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if ":" in address:
            knock(address)
        ray.init(address=address, logging_level="warning")
    except (OSError, ValueError, RuntimeError) as error:
        remedy = 'give --ray the address of a running cluster, or "local" to start one'
        raise TrainError(f"no Ray cluster at {address!r} ({error}); {remedy}") from None


def knock(address: str) -> None:
    """Raises: OSError, ValueError: nobody answers there, or it is no address. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=GRACE_S).close()


def cause(error: Exception) -> str:
    """One line out of the several tracebacks that Ray sends: the last error of ours, or else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(BridleError.__module__)]
    return (ours or lines or [type(error).__name__])[-1].removeprefix(f"{BridleError.__module__}.")


def train_on_worker(given: dict[str, Any]) -> None:
    """What each of Ray's workers does; Ray has joined the processes already."""
    from bridle.run.training import train_run

    os.chdir(given["place"])  # Ray starts its workers elsewhere, and paths in settings may be relative
    train_run(given["settings"], given["folder"], force=given["force"])
