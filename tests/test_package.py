"""What the package promises before it does anything: light to import, and nothing in what it needs that breaks it."""

import json
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BREAKING = {"torchvision", "torchaudio"}  # a build that does not match torch's breaks diffusers' imports
HEAVY = ("torch", "diffusers", "transformers", "cv2", "skimage", "numpy")


def required() -> list[Requirement]:
    """Everything the package asks for, with every extra."""
    lines = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    return [Requirement(line) for line in lines]


def needs(requirement: Requirement) -> list[Requirement]:
    """What an installed requirement needs here, under the extras it is asked for with; nothing if not installed."""
    try:
        lines = metadata.requires(requirement.name) or []
    except metadata.PackageNotFoundError:
        return []
    extras = requirement.extras or {""}
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """The names of the requirements and of all that they need, as far as it is installed."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) not in seen:
            seen.add(str(requirement))
            waiting += needs(requirement)
    return {canonicalize_name(Requirement(line).name) for line in seen}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def pip(*arguments: str) -> None:
    """Run pip, which is given the network; the test is skipped where there is no index to ask."""
    command = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if any(words in result.stderr for words in ("NewConnectionError", "NameResolutionError", "ConnectTimeout")):
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr[-2000:]


def test_nothing_required_needs_torchvision_or_torchaudio() -> None:
    names = closure(required())
    assert {"torch", "tokenizers", "sympy"} <= names  # the walk reaches what is needed only indirectly
    assert not names & BREAKING


def test_the_constraints_pin_all_that_is_required_and_nothing_that_breaks() -> None:
    pins = pinned()
    builds = ("nvidia-", "cuda-", "triton")  # torch pins those of its CUDA build itself
    assert {name for name in closure(required()) if not name.startswith(builds)} - set(pins) == set()
    assert not set(pins) & BREAKING
    outside = [str(r) for r in required() if not r.specifier.contains(pins[canonicalize_name(r.name)])]
    assert outside == []


@pytest.mark.slow
def test_every_extra_resolves_under_the_constraints_without_torchvision(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    every = f".[{','.join(PROJECT['optional-dependencies'])}]"
    pip("install", "--dry-run", "--ignore-installed", "-q", "-c", "constraints.txt", "--report", str(report), every)
    names = {canonicalize_name(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]}
    assert {"bridle", "torch", "tensorboard"} <= names
    assert not names & BREAKING


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_package(tmp_path: Path) -> None:
    pip("wheel", "--no-deps", "-q", "-w", str(tmp_path), ".")
    packed = set(zipfile.ZipFile(next(tmp_path.glob("bridle-*.whl"))).namelist())
    package = ROOT / "src" / "bridle"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(package.parent).as_posix() for path in files} <= packed


@pytest.mark.parametrize("arguments", [["-c", "import bridle"], ["-m", "bridle", "--help"]], ids=["import", "help"])
def test_importing_bridle_and_asking_for_help_load_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "bridle" in loaded
    assert loaded & set(HEAVY) == set()


def test_the_version_is_the_packages() -> None:
    import bridle

    assert bridle.__version__ == PROJECT["version"]


def test_tests_cannot_reach_the_network() -> None:
    refused = pytest.raises(pytest.fail.Exception, match="run without a network")
    with refused, socket.socket() as outside:
        outside.connect(("192.0.2.1", 80))  # an address that is set aside for documentation
    with pytest.raises(pytest.fail.Exception, match="run without a network"):
        socket.create_connection(("example.org", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
