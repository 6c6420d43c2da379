"""A way is measured once, remembered by the process and by the machine, and nothing breaks where that cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridle.kernels import choice, compiler


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has chosen nothing, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "CHOSEN", {})
    choice._kept.cache_clear()
    yield tmp_path / "bridle" / "kernels.json"
    choice._kept.cache_clear()


class Ways:
    """A slow and a fast way, counted."""

    def __init__(self) -> None:
        self.asked, self.calls = 0, {"slow": 0, "fast": 0}

    def __call__(self) -> dict[str, choice.Way]:
        self.asked += 1
        return {"slow": lambda: self._run("slow", 200_000), "fast": lambda: self._run("fast", 10)}

    def _run(self, name: str, count: int) -> int:
        self.calls[name] += 1
        return sum(range(count))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(choice, "CHOSEN", {})
    choice._kept.cache_clear()


def test_the_faster_way_wins_and_is_measured_once() -> None:
    ways = Ways()
    assert choice.pick(("a", 1), ways) == "fast"
    calls = dict(ways.calls)
    assert choice.pick(("a", 1), ways) == "fast"
    assert (ways.asked, ways.calls) == (1, calls)


def test_a_hopeless_way_is_tried_once_more_after_its_first_call() -> None:
    ways = Ways()
    choice.pick(("a", 1), ways)
    assert ways.calls == {"slow": 2, "fast": 1 + choice.REPEATS}


def test_another_process_on_this_machine_chooses_the_same_without_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice.pick(("a", 1), Ways())
    forget(monkeypatch)
    ways = Ways()
    assert choice.pick(("a", 1), ways) == "fast"
    assert ways.calls == {"slow": 0, "fast": 0}


def test_what_another_process_wrote_first_stands(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice.pick(("a", 1), Ways())
    kept = json.loads(fresh.read_text())
    (key,) = kept[choice.machine()]
    kept[choice.machine()][key] = "slow"
    fresh.write_text(json.dumps(kept))
    choice.pick(("b", 1), Ways())
    forget(monkeypatch)
    assert choice.pick(("a", 1), Ways()) == "slow"
    assert choice.pick(("b", 1), Ways()) == "fast"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\x00"])
def test_a_damaged_file_is_measured_over(fresh: Path, content: str) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.write_text(content)
    assert choice.pick(("a", 1), Ways()) == "fast"
    assert json.loads(fresh.read_text())[choice.machine()]


def test_a_name_that_is_no_way_any_more_is_measured_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice.pick(("a", 1), Ways())
    fresh.write_text(fresh.read_text().replace('"fast"', '"gone"'))
    forget(monkeypatch)
    assert choice.pick(("a", 1), Ways()) == "fast"


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choice.pick(("a", 1), Ways()) == "fast"


def test_a_user_without_a_home_measures_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", none)
    assert choice.pick(("a", 1), Ways()) == "fast"
    assert compiler.load("native.c") is None


SETTLE = """
import sys
from bridle.kernels import choice, compiler
for number in range(30):
    choice.pick((sys.argv[1], number), lambda: {"only": lambda: None})
"""


def test_processes_that_measure_at_once_lose_nothing(fresh: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", SETTLE, name]) for name in ("a", "b")]
    assert [process.wait() for process in started] == [0, 0]
    assert len(json.loads(fresh.read_text())[choice.machine()]) == 60


def test_two_processes_that_measure_at_once_agree(fresh: Path) -> None:
    """Or a run would round otherwise once it goes on in the other one."""

    def others_write_first() -> dict[str, choice.Way]:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        key = repr(("a", 1, torch.get_num_threads()))
        fresh.write_text(json.dumps({choice.machine(): {key: "slow"}}))
        return Ways()()

    choice._kept()
    assert choice.pick(("a", 1), others_write_first) == "slow"


def test_choices_from_other_ways_than_there_are_now_are_forgotten(fresh: Path) -> None:
    fresh.parent.mkdir(parents=True, exist_ok=True)
    other, old = "another processor, compiled, ways 1", f"{choice.processor()}, compiled, ways 1"
    alone = f"{choice.processor()}, without, ways {choice.EDITION}"
    fresh.write_text(json.dumps({other: {"a": "b"}, old: {"a": "b"}, alone: {"a": "b"}}))
    choice.pick(("a", 1), Ways())
    assert json.loads(fresh.read_text()).keys() == {other, alone, choice.machine()}
