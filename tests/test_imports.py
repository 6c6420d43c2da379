"""Imports point one way: a module may use what stands above it in this list, and its own folder, and nothing else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Modules in one row do not know each other.
ORDER = (
    ("errors",),
    ("atomic", "collector", "lock"),
    ("config",),
    ("kernels",),
    ("control",),
    ("base",),
    ("data",),
    ("cache",),
    ("files",),
    ("train", "sample"),
    ("evaluate",),
    ("run",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
ROOT = Path(__file__).parents[1] / "src" / "bridle"


def owner(path: Path) -> str:
    """The folder or file directly under src/bridle that a module belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, package: str) -> Iterator[str]:
    """Each module under bridle that a source imports, anywhere in it, as the name directly under bridle.

    Args:
        source: the module's text.
        package: the dotted package the module lies in, to resolve relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "bridle":
                yield rest.partition(".")[0]


def violations(source: str, package: str, user: str) -> list[str]:
    """The imports of one module that point the wrong way."""
    names = [name for name in imported(source, package) if name not in (user, "__version__")]
    return [f"{user} imports {name or 'bridle'}" for name in names if RANK.get(name, len(ORDER)) >= RANK[user]]


MODULES = sorted(path for path in ROOT.rglob("*.py") if owner(path) != "__init__")


def test_every_module_is_in_the_order_and_the_order_names_no_other() -> None:
    assert {owner(path) for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    package = ".".join(("bridle", *path.relative_to(ROOT).parts[:-1]))
    assert violations(path.read_text(encoding="utf-8"), package, owner(path)) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import bridle.sample.picture", ["train imports sample"]),
        ("from bridle.sample import picture", ["train imports sample"]),
        ("from bridle import cli", ["train imports cli"]),
        ("from bridle import Control", ["train imports Control"]),
        ("import bridle", ["train imports bridle"]),
        ("from ..sample import picture", ["train imports sample"]),
        ("def late():\n    from bridle.evaluate import report", ["train imports evaluate"]),
        ("from . import draws\nfrom .draws import noise\nfrom bridle.train.draws import noise", []),
        ("from bridle.control.hint import x\nimport torch\nfrom bridle import errors, __version__", []),
    ],
)
def test_the_check_sees_every_form_of_import(source: str, wrong: list[str]) -> None:
    assert violations(source, "bridle.train", "train") == wrong
