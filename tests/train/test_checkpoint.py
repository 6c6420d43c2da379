"""What a checkpoint promises: the newest always loads, whatever killed the save; a damaged one is never used."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridle.errors import TrainError
from bridle.train import pieces
from bridle.train.checkpoint import list_checkpoints, load, newest, read_facts, save

PLAIN = ("mkdir", "open", "replace", "fsync", "chmod", "unlink", "rmdir")  # every change to a folder is one of these


def make_state(step: int = 1) -> dict[str, Tensor]:
    """All kinds that a run has."""
    source = torch.Generator().manual_seed(step)
    return {
        "control.weight": torch.randn(8, 4, 3, 3, generator=source).to(memory_format=torch.channels_last),
        "average.weight": torch.randn(8, 4, 3, 3, generator=source),
        "optimizer.weight.step": torch.tensor(float(step)),
        "optimizer.weight.state1": torch.randint(256, (300,), dtype=torch.uint8, generator=source),
        "base.bias": torch.randn(5, generator=source).bfloat16(),
        "base.rows": torch.arange(step, step + 3),
        "base.none": torch.zeros(0, 3),
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, types and every bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_and_facts_come_back_bit_for_bit(tmp_path: Path) -> None:
    facts = {"phase": "middle", "probes": [{"mean": 0.1 + 0.2}], "best": None}
    path = save(tmp_path / "checkpoints", 7, make_state(), facts, keep=1)
    assert equal(load(path), make_state())
    assert read_facts(path) == {**facts, "step": 7}
    state = {name: torch.full_like(tensor, 9) for name, tensor in make_state().items()}
    assert load(path, into=state)["base.bias"] is state["base.bias"]
    assert equal(state, make_state())


def test_two_names_for_one_tensor_are_both_saved(tmp_path: Path) -> None:
    table = torch.randn(256)
    state = {"optimizer.a.qmap": table, "optimizer.b.qmap": table, "part": table[3:5]}
    assert equal(load(save(tmp_path, 1, state, {}, keep=1)), state)


def test_the_newest_ones_are_kept_and_a_step_may_be_saved_again(tmp_path: Path) -> None:
    for step in (5, 10, 100, 100, 100):
        save(tmp_path, step, make_state(step), {}, keep=3)
    assert names(tmp_path) == ["step-00000100", "step-00000100.2", "step-00000100.3"]
    save(tmp_path, 101, make_state(101), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100.3", "step-00000101"]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.0a1b2c3d").mkdir()
    (tmp_path / "step-00000003.pt").touch()
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("base.rows"), r"base.rows was \[3\] int64, is not there"),
        (lambda state: state.update(new=torch.zeros(1)), r"new was not there, is \[1\] float32"),
        (lambda state: state.update({"base.bias": torch.zeros(5)}), r"base.bias was \[5\] bfloat16, is \[5\] float32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    path, state = save(tmp_path, 1, make_state(), {}, keep=1), make_state()
    change(state)
    with pytest.raises(TrainError, match=f"of another run: {message}"):
        load(path, into=state)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("rank-00000.safetensors", flip, "rank-00000.safetensors is not what was written"),
        ("rank-00000.safetensors", cut, "rank-00000.safetensors has [0-9]+ bytes, expected [0-9]+"),
        ("rank-00000.safetensors", Path.unlink, "rank-00000.safetensors is missing"),
        ("rank-00001.safetensors", Path.touch, "rank-00001.safetensors is not part of it"),
        ("facts.json", cut, "facts.json: "),
        ("facts.json", Path.unlink, "facts.json: "),
        ("facts.json", lambda path: path.write_text("[]"), "facts.json: "),
    ],
)
def test_damage_is_named_with_the_remedy(tmp_path: Path, name: str, damage: Callable[[Path], Any], why: str) -> None:
    path = save(tmp_path, 4, make_state(), {}, keep=1)
    damage(path / name)
    with pytest.raises(
        TrainError, match=rf"checkpoint {re.escape(str(path))} is damaged \({why}.*; delete it to go on"
    ):
        load(path)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"), [(pieces, "save_file"), (Path, "write_bytes"), (os, "fsync"), (Path, "mkdir")]
)
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    old = save(tmp_path, 1, make_state(1), {}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(TrainError, match=r"step 2 cannot be written to .*: the disk is full; free some space"):
            save(tmp_path, 2, make_state(2), {}, keep=1)
    assert names(tmp_path) == [old.name]
    assert equal(load(old), make_state(1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name_and_the_old_goes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, make_state(1), {}, keep=1)
    events: list[str] = []
    fsync, replace, rmdir = os.fsync, os.replace, os.rmdir

    def note(kind: str, path: Any) -> None:
        events.append(f"{kind} {re.match(r'[.]?[^.]*', Path(path).name)[0]}")  # without what is drawn at random

    monkeypatch.setattr(os, "fsync", lambda file: (note("sync", os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda before, path: (note("name", path), replace(before, path)))
    monkeypatch.setattr(os, "rmdir", lambda path, **more: (note("delete", path), rmdir(path, **more)))
    save(tmp_path, 2, make_state(2), {}, keep=1)
    written = ["sync .rank-00000", "name rank-00000", "sync .step-00000002"]
    written += ["sync .facts", "name facts", "sync .step-00000002"]
    named = ["name step-00000002", f"sync {tmp_path.name}"]
    assert events == [*written, *named, "name .step-00000001", "delete .step-00000001"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported once")
def test_a_kill_at_every_step_of_a_save_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    """The work is done by `kill_everywhere`, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {"old", "new"} == set(results)
    assert len(results) > 20
    assert results == sorted(results, key=["old", "new"].index)  # once there, the new one stays


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits its own files' size, for good")
def test_a_file_that_cannot_be_finished_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A real error of the system: not a full disk, but one that comes from it in the same way."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path), "limit"], capture_output=True, text=True)
    assert "TrainError: checkpoint of step 2 cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert names(tmp_path) == ["step-00000001"]
    assert equal(load(tmp_path / "step-00000001"), make_state(1))


def kill_everywhere(folder: Path) -> list[str]:
    """Save step 1, then step 2 and be killed at the n-th change to the disk, for every n. Returns: which one loads."""
    results: list[str] = []
    while True:
        place = folder / str(len(results))
        save(place, 1, make_state(1), {}, keep=1)
        child = os.fork()
        if not child:
            die_at(len(results))
            save(place, 2, make_state(2), {}, keep=1)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        steps = {path: read_facts(path)["step"] for path in list_checkpoints(place)}
        assert all(equal(load(path), make_state(step)) for path, step in steps.items())
        step = steps[newest(place)]
        save(place, 3, make_state(3), {}, keep=1)  # the next save finds its way and leaves nothing behind
        assert names(place) == ["step-00000003"]
        if finished:
            return results
        results.append({1: "old", 2: "new"}[step])


def die_at(count: int) -> None:
    """Kill this process at the count-th change to the disk; in the middle of a file, if it is one that is written."""
    left = count

    def patch(owner: Any, name: str, halve: bool = False) -> None:
        real = getattr(owner, name)

        def deadly(*args: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                if halve:
                    real(*args, **options)
                    path = next(arg for arg in args if isinstance(arg, Path))
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **options)

        setattr(owner, name, deadly)

    for name in PLAIN:
        patch(os, name)
    patch(pieces, "save_file", halve=True)
    patch(Path, "write_bytes", halve=True)


if __name__ == "__main__":
    if sys.argv[2:]:
        save(Path(sys.argv[1]), 1, make_state(1), {}, keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save(Path(sys.argv[1]), 2, make_state(2), {}, keep=1)
    print(json.dumps(kill_everywhere(Path(sys.argv[1]))))
