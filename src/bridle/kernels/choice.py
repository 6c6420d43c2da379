"""Which of several ways to compute the same thing is fastest here: measured once per shape and machine, then kept.

A way is never guessed: what wins differs by shape, number of threads and processor. What was measured is written to
`kernels.json` in the user's cache folder, so that a run that goes on rounds exactly as it did before it stopped.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from bridle.atomic import write_text
from bridle.kernels import native
from bridle.kernels.machine import cache_folder, processor
from bridle.kernels.working import identity
from bridle.lock import holding

Way = Callable[[], Any]
CHOSEN: dict[tuple[Any, ...], str] = {}  # by this process so far
EDITION = 9  # to be raised wherever ways are added: what was measured without them is then measured anew
WAYS = f", ways {EDITION}"
REPEATS = 3
HOPELESS = 1.5  # a way that takes this much longer than the best at its first try is not tried again


def pick(shape: tuple[Any, ...], make_ways: Callable[[], Mapping[str, Way]]) -> str:
    """The name of the fastest way.

    Args:
        shape: all that decides which one that is; how many threads compute is added.
        make_ways: called where it is not known yet. Returns the ways by name, in an order that decides between equals;
            they must not change what they read.
    """
    key = (*shape, torch.get_num_threads())
    name = CHOSEN.get(key)
    if name is None:
        ways = make_ways()
        name = _kept().get(repr(key), "")
        CHOSEN[key] = name = name if name in ways else _settle(repr(key), _measure(ways), ways)
    return name


def kept(shape: tuple[Any, ...]) -> str:
    """What was chosen before, here or by an earlier process; empty where nothing was."""
    key = (*shape, torch.get_num_threads())
    return CHOSEN.get(key) or _kept().get(repr(key), "")


def _measure(ways: Mapping[str, Way]) -> str:
    if len(ways) == 1:
        return next(iter(ways))
    # Where blocks are computed again for checkpointing, what ways keep is not to be taken for what the block keeps.
    with saved_tensors_hooks(identity, identity):
        for way in ways.values():
            way()  # the first call also makes room for what later ones reuse
        times = {name: _time(way) for name, way in ways.items()}
        best = min(times.values())
        for _ in range(REPEATS - 1):
            for name, way in ways.items():
                if times[name] < HOPELESS * best:
                    times[name] = min(times[name], _time(way))
    return min(times, key=lambda name: times[name])


def _time(way: Way) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _file() -> Path:
    return cache_folder() / "kernels.json"


@cache
def machine() -> str:
    """What the choices hold for: this processor, this PyTorch, and the ways that there are here."""
    compiled = "compiled" if native.library() is not None else "without a compiler"
    return f"{processor()}, {compiled}{WAYS}"


def _read() -> dict[str, dict[str, str]]:
    """All that is kept, by machine and shape; nothing where there is no such file or it cannot be read."""
    try:
        kept = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


@cache
def _kept() -> dict[str, str]:
    """What earlier processes chose on this machine, read once."""
    kept = _read().get(machine(), {})
    return kept if isinstance(kept, dict) else {}


def _settle(key: str, measured: str, ways: Mapping[str, Way]) -> str:
    """Write down what was measured, unless another process has been first meanwhile: its choice then is this one's.

    What this processor chose from other ways than there are now is forgotten.
    """
    # In a home that cannot be written every process measures for itself.
    with suppress(OSError), holding(_file().with_suffix(".lock"), wait=True):
        kept = _read()
        mine = kept.get(machine())
        mine = dict(mine) if isinstance(mine, dict) else {}
        if mine.get(key) in ways:
            return mine[key]
        mine[key] = measured
        stale = {name for name in kept if name.startswith(processor()) and not name.endswith(WAYS)}
        others = {name: found for name, found in kept.items() if name not in stale}
        write_text(_file(), json.dumps(others | {machine(): mine}, separators=(",\n", ": ")))
    return measured
