"""Several processes, started for real: a stop ends them all, a death starts them all again, and the run is the same."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridle import config
from bridle.errors import ConfigError, TrainError
from bridle.run import RunSettings, launch
from bridle.train import checkpoint
from bridle.train.log import read_rows
from bridle.train.loop import CHECKPOINTS
from bridle.train.settings import ProbeSettings

# --- what the launcher does, seen with programs that stand in for `python -m bridle train`


@pytest.fixture
def launched(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs a shell script in two processes in place of training."""
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    monkeypatch.chdir(tmp_path)

    def run(script: str) -> int:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\ntouch started-$RANK\n{script}\n")
        program.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(program))
            return launch.train_processes(settings, tmp_path / "run", 2)

    return run


def test_each_process_is_told_who_it_is_and_gets_its_share_of_the_cores(
    launched: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    names = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS"
    assert launched(f'echo "{names} $*" > said-$RANK; cat "$4" > settings-$RANK') == 0
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text().split()
        assert said[:5] == [str(rank), str(rank), "2", "127.0.0.1", "3"]
        assert said[5:8] == ["-m", "bridle", "train"]
        assert said[9:] == ["--out", str(tmp_path / "run")]


def test_when_one_is_killed_the_other_is_not_waited_for_and_all_start_again(
    launched: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    """The one that lives waits for the dead one, for ever."""
    die_once = "if [ ! -e died ]; then if [ $RANK = 1 ]; then touch died; kill -9 $$; else exec sleep 60; fi; fi"
    assert launched(die_once) == 0
    said = capfd.readouterr().err
    assert said == "process 1 of 2 was killed by signal 9; all start again from the newest checkpoint (1 of 3)\n"


def test_what_the_user_has_to_put_right_is_said_once_and_not_tried_again(
    launched: Callable[[str], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("echo bridle: no such base >&2; echo >> started-$RANK; exit 2") == 2
    assert capfd.readouterr().err == "bridle: no such base\n"
    assert (tmp_path / "started-0").read_text() == "\n"
    assert launched("if [ $RANK = 1 ]; then echo bridle: out of memory >&2; exit 2; else exec sleep 60; fi") == 2
    assert capfd.readouterr().err == "bridle: out of memory\n"


def test_processes_that_die_again_and_again_are_given_up(
    launched: Callable[[str], int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        TrainError, match=r"process 0 of 2 failed with status 1, after 3 starts .*the same command goes"
    ):
        launched("echo x >> tries-$RANK; echo broken $RANK >&2; exit 1")
    assert [(tmp_path / f"tries-{rank}").read_text() for rank in (0, 1)] == ["x\n" * 4] * 2
    said = capfd.readouterr().err
    assert [said.count(f"broken {rank}") for rank in (0, 1)] == [4, 4]


@pytest.mark.parametrize(
    ("answer", "status"), [("trap 'exit 0' TERM; while true; do sleep 0.02; done", 0), ("exec sleep 60", 143)]
)
def test_a_sigterm_is_handed_on_and_waited_for(
    launched: Callable[[str], int], tmp_path: Path, answer: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop).start()
    assert launched(f"touch ready-$RANK; {answer}") == status
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before


# --- training itself, in real processes

LONG = 60  # steps: enough to be stopped and killed in


@dataclass(frozen=True)
class Real:
    """A run that is started, watched and killed from outside."""

    folder: Path
    command: list[str]

    def start(self) -> "subprocess.Popen[str]":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "BRIDLE_TEST": str(self.folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def wait_for(self, process: "subprocess.Popen[str]", step: int) -> None:
        """Until a checkpoint of that step, or of a later one, is there."""
        while process.poll() is None and self.step < step:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        newest = checkpoint.newest(self.folder / CHECKPOINTS)
        return 0 if newest is None else int(newest.name.split("-")[1])

    def kill(self, sign: bytes) -> None:
        """End one process of this run that has this in its command or its environment, as too little memory would."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                seen = (place / "cmdline").read_bytes() + b"\0" + (place / "environ").read_bytes()
            except OSError:  # it has ended
                continue
            if f"BRIDLE_TEST={self.folder}\0".encode() in seen and sign in seen:
                found.append(int(place.name))
        os.kill(found[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def long(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run whose passes are the same, row by row, for one process and for two."""
    passes = {"batch": 2, "accumulate": 2, "lr": 1e-4, "checkpoint_every": 4, "preview_every": LONG}
    train = replace(settings.train, steps=LONG, **passes)
    path = tmp_path_factory.mktemp("long") / "settings.toml"
    config.save(replace(settings, train=train, probe=ProbeSettings(every=20, pairs=2, samples=2, steps=1)), path)
    return path


@pytest.fixture(scope="module")
def alone(long: Path) -> Real:
    """The run that one process makes."""
    folder = long.parent / "alone"
    run = Real(folder, [sys.executable, "-m", "bridle", "train", str(long), "--out", str(folder)])
    process = run.start()
    assert process.communicate()[0].startswith(f"Training finished at step {LONG}")
    return run


def weights(run: Real) -> dict[str, torch.Tensor]:
    assert run.step == LONG
    newest = checkpoint.newest(run.folder / CHECKPOINTS)
    assert newest is not None
    return checkpoint.load(newest)


def check_same(one: Real, other: Real) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5) for name in ours)
    for name in ("metrics.jsonl", "probes.jsonl"):
        assert [row["step"] for row in read_rows(one.folder / name)] == [
            row["step"] for row in read_rows(other.folder / name)
        ]


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@linux
@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_goes_on_survives_a_kill_and_is_the_same(alone: Real, long: Path) -> None:
    run = Real(long.parent / "two", [*alone.command[:-1], str(long.parent / "two"), "--nproc", "2"])
    process = run.start()
    run.wait_for(process, 4)
    process.terminate()
    said, log = process.communicate()
    assert process.returncode == 0, log
    assert said.startswith(f"Training stopped at step {run.step}: asked to stop.\n")
    assert said.endswith("The same command goes on.\n")
    assert "Traceback" not in log
    assert log.count("\ntraining ") == 1  # one bar

    process = run.start()
    run.wait_for(process, run.step + 4)
    run.kill(b"\0RANK=1\0")
    said, log = process.communicate()
    assert process.returncode == 0, log
    assert "process 1 of 2 was killed by signal 9; all start again from the newest checkpoint (1 of 3)" in log
    assert said.startswith(f"Training finished at step {LONG}")
    check_same(run, alone)


@linux
@pytest.mark.slow
def test_torchrun_may_start_it_as_well(alone: Real, long: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    python, *bridle = alone.command
    run = Real(long.parent / "torchrun", [python, *torchrun, *bridle[:-1], str(long.parent / "torchrun")])
    process = run.start()
    run.wait_for(process, 8)
    run.kill(b"\0RANK=1\0")
    said, log = process.communicate()
    assert process.returncode == 0, log
    assert said.count("Training finished") == 1
    check_same(run, alone)


# --- and on a Ray cluster


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    for address, why in (("auto", "Could not find"), ("127.0.0.1:1", "refused"), ("head:x", "invalid literal")):
        with pytest.raises(TrainError, match=rf"no Ray cluster at '{address}' \(.*{why}.*\); give --ray"):
            launch.connect(ray, address)


def test_without_ray_it_is_said_how_to_get_it(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray, .* pip install 'ray\[train\]'"):
        launch.train_on_ray(settings, Path("run"), "auto", 2)


def test_of_rays_many_lines_the_error_itself_is_told() -> None:
    error = TrainError("lower train.lr")
    lines = "".join(traceback.format_exception(error)).splitlines()
    shown = RuntimeError(
        "\n".join(["Training failed:", *lines, "bridle.errors.TrainError: lower train.lr", "actor died"])
    )
    assert launch.cause(shown) == "TrainError: lower train.lr"
    assert launch.cause(RuntimeError("line\nactor died\n")) == "actor died"
    assert launch.cause(RuntimeError()) == "RuntimeError"


@linux
@pytest.mark.slow
def test_a_ray_cluster_starts_again_when_a_worker_is_killed(
    alone: Real, long: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes on this machine, two workers; the cluster is `start_cluster`'s, in a process of its own."""
    pytest.importorskip("ray")
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    folder = long.parent / "ray"
    run = Real(folder, [sys.executable, __file__, str(long), str(folder)])
    process = run.start()
    threading.Thread(target=lambda: (run.wait_for(process, 8), run.kill(b"ray::RayTrainWorker")), daemon=True).start()
    said, log = process.communicate()
    assert process.returncode == 0, log
    assert said.endswith("done\n")
    assert "ActorDiedError" in log
    check_same(run, alone)


CLUSTER = {  # loopback only, and nobody without the token
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes the address of the network, also where it is told not to
    "RAY_USAGE_STATS_ENABLED": "0",
}


def start_cluster(settings: Path, folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(2):
            cluster.add_node(**node)
        launch.train_on_ray(config.read(RunSettings, settings), folder, cluster.address, 2)
        print("done")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    start_cluster(*map(Path, sys.argv[1:]))
