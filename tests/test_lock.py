"""A lock is held by one process, and by none that it forks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridle.lock import holding

pytest.importorskip("fcntl")

HOLDS = """
import os, sys, time
from pathlib import Path
from bridle.lock import holding

with holding(Path(sys.argv[1]), wait=False) as alone:
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(alone, child, flush=True)
    time.sleep(60)
"""


def test_what_was_forked_does_not_hold_a_killed_process_s_lock(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        alone, child = process.stdout.readline().split()
        try:
            assert alone == "True"
            with holding(path, wait=False) as held:
                assert not held
            process.kill()
            process.wait()
            with holding(path, wait=False) as held:
                assert held
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_lock_is_let_go_at_the_end_and_waited_for_where_asked(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holding(path, wait=True) as held:
        assert held
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline().split()[1])
        os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        process.kill()
        with holding(path, wait=True) as held:
            assert held
        assert time.monotonic() - killed < 30
