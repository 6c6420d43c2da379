"""Our C, compiled once by this machine's own C compiler.

The compiler is what the environment's CC names, or else cc, gcc or clang; CC=false does without. What it makes lies in
the user's cache folder.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from bridle.atomic import write_with
from bridle.kernels.machine import cache_folder, instructions, processor

SOURCES = Path(__file__).parent
HEADER = "numbers.h"
COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 120.0
# Sums may be reordered and products fused, or loops would not become ones of vectors; infinities and NaN stay such.
EXACTLY = [
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
]
# From the fastest to what every compiler takes.
FLAGS = (
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-march=native"],
    [],
)


def load(source: str, *defined: str) -> ctypes.CDLL | None:
    """The functions of one of our files of C; None where this machine has no compiler for them.

    Args:
        defined: names that are defined for the compiler.
    """
    exactly = [*EXACTLY, *(f"-D{name}" for name in defined)]
    for compiler in compilers():
        for flags in FLAGS:
            with suppress(OSError, subprocess.SubprocessError):
                return opened(SOURCES / source, compiler, [*exactly, *flags])
    return None


def opened(source: Path, compiler: str, flags: list[str]) -> ctypes.CDLL:
    """What `compiled` gives, made anew where it cannot be loaded. Raises: as `compiled` does."""
    path = compiled(source, compiler, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # cut short by a full disk, or of another system that shares the home
        path.unlink()
        return ctypes.CDLL(str(compiled(source, compiler, flags)))


def compilers() -> Iterator[str]:
    """Paths of the C compilers to try."""
    named = os.environ.get("CC")
    for name in [named] if named else COMPILERS:
        path = shutil.which(name)
        if path:
            yield path


def compiled(source: Path, compiler: str, flags: list[str]) -> Path:
    """The library that a compiler makes of a file, from the cache folder where it is there.

    Raises:
        OSError: the folder cannot be written, or the compiler not be started.
        SubprocessError: the compiler fails.
    """
    texts = [path.read_text() for path in (source, source.with_name(HEADER))]
    made_by = "\n".join([os.path.realpath(compiler), *flags, processor(), instructions(), *texts])
    path = cache_folder() / f"{source.stem}-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        # PyTorch's own OpenMP library where it brings one, or there would be two kinds of threads in a process.
        theirs = [str(found) for found in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
        linked = ["-Wl,--as-needed", *theirs] if sys.platform == "linux" and "-fopenmp" in flags else []

        def compile_to(temporary: Path) -> None:
            command = [compiler, *flags, str(source), "-o", str(temporary), *linked, "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)

        write_with(path, compile_to)
    return path
