"""The vectorised variant of Mitsuba, with a compiler that it works with.

It renders four times faster than the scalar one, but crashes with LLVM 15, so LLVM 19 is fetched beside the models.
"""

import os
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "libllvm19"


def fetch(out: Path) -> Path:
    """Unpack Debian's LLVM 19 under `out`, once. Returns: the library."""
    if not list(out.glob("llvm/**/libLLVM.so.19*")):
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
            subprocess.run(["dpkg", "-x", str(next(Path(scratch).glob("*.deb"))), str(out / "llvm")], check=True)
    return next(path for path in out.glob("llvm/**/libLLVM.so.19*") if path.is_file()).resolve()


def choose(out: Path) -> None:
    """Make Mitsuba ready. Must come before anything else of Mitsuba is used."""
    os.environ["DRJIT_LIBLLVM_PATH"] = str(fetch(out))
    import mitsuba

    mitsuba.set_variant("llvm_ad_rgb")
