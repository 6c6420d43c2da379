"""Our C is compiled once: by the fastest flags that the compiler takes, and then it is there."""

import os
import shutil
from pathlib import Path

import pytest

from bridle.kernels import compiler, native


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_what_is_made_is_not_made_again_and_no_refused_flag_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler without -march=native, as on other processors than Intel's."""
    real = os.environ.get("CC") or next(filter(None, map(shutil.which, compiler.COMPILERS)))
    calls, wrapper = tmp_path / "calls", tmp_path / "picky"
    wrapper.write_text(
        f'#!/bin/sh\necho x >> {calls}\nfor flag; do case "$flag" in -m*) exit 1;; esac; done\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.load("native.c") is not None
    assert len(calls.read_text().split()) == len(compiler.FLAGS)  # only the last has no such flag
    assert compiler.load("native.c") is not None
    assert len(calls.read_text().split()) == len(compiler.FLAGS)
