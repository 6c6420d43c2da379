"""What docs/families.md claims is what is tested: every number is a test, every tick has one, no cell is left out."""

import ast
import re
from pathlib import Path

import test_parity_transformers
import test_parity_unet

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
TESTS = {
    int(number): (file, name)
    for number, file, name in re.findall(r"^(\d+)\. `(tests/[\w/]+\.py)::(\w+)`", TEXT, re.MULTILINE)
}


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its own head included."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_number_is_a_test_that_exists() -> None:
    assert list(TESTS) == list(range(1, len(TESTS) + 1))
    for file, name in TESTS.values():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], f"{file}::{name}"


def test_every_tick_is_a_test_and_every_test_a_tick() -> None:
    _, *rows = rows_of("What works")
    cells = [cell for _, *cells in rows for cell in cells if cell]
    numbers = [re.fullmatch(r"✓ (\d+(?:, \d+)*)", cell) for cell in cells]
    assert len(rows) == 7
    assert None not in numbers
    named = {int(number) for found in numbers if found for number in found[1].split(", ")}
    assert named == set(TESTS)


def test_the_cells_of_parity_are_the_tested_ones() -> None:
    (_, *columns), *rows = rows_of("The same picture as diffusers draws")
    told = {(row[0].split("`")[1], column): cell for row in rows for column, cell in zip(columns, row[1:], strict=True)}
    unet, transformers = test_parity_unet, test_parity_transformers
    ours = [kind.format(xl) for kind, *_ in unet.WAYS.values() for xl in ("", *unet.XL.values())]
    tested = {(kind, cell) for kind in ours for cell in unet.CELLS}
    tested |= {(kind, cell) for kind, *_ in transformers.PIPELINES.values() for cell in transformers.CELLS}
    assert {place for place, cell in told.items() if cell == "="} == tested
    assert set(told.values()) == {"=", ""}
