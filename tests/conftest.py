"""What holds for every test: no network, no look-ups at the hub, and few threads."""

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before anything imports torch or huggingface_hub, which read them once. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # tiny tensors: more threads cost more than they bring

# What is fastest on this machine is written down once; tests, and the processes they start, share a place of their own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bridle-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_LOOPBACK = ("127.", "localhost", "::1")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail the test that opens a connection to anything but this machine."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_loopback(address[0])
        connect(self, address)

    def guarded_lookup(host: Any, *rest: Any, **options: Any) -> Any:
        _refuse_unless_loopback(host)
        return lookup(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


def _refuse_unless_loopback(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host or "localhost"
    if not name.startswith(_LOOPBACK):
        # Not an Exception, so no library can swallow it.
        pytest.fail(f"a test tried to reach {name}; tests run without a network")


@pytest.fixture
def new_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a process where nothing was measured yet, nor is kept."""
    from bridle.kernels import choice

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new-machine"))
    monkeypatch.setattr(choice, "CHOSEN", {})
    choice._kept.cache_clear()
    yield
    monkeypatch.undo()
    choice._kept.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, new_machine: None) -> Iterator[None]:
    """As in a process that CC=false started: no compiled loops, and nothing chosen or kept with them."""
    from bridle.kernels import choice, fused, native, winograd

    found = (native.library, fused.library, winograd.library, choice.machine)
    monkeypatch.setenv("CC", "false")
    for kept in found:
        kept.cache_clear()
    yield
    monkeypatch.undo()
    for kept in found:
        kept.cache_clear()
