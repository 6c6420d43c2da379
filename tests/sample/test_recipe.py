"""A recipe survives being written down, and its documentation names all of it and nothing else."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bridle import config
from bridle.control.strength import PRESETS
from bridle.sample.recipe import ControlRecipe, Recipe, to_table

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
REQUIRED = "required"


def defaults(kind: Any) -> dict[str, Any]:
    missing = dataclasses.MISSING
    return {field.name: REQUIRED if field.default is missing else field.default for field in dataclasses.fields(kind)}


def documented(part: str) -> dict[str, Any]:
    """The settings of a table with their defaults."""
    rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]+?) \| [^|]{5,} \|$", part, re.MULTILINE)
    words = {"none": None, REQUIRED: REQUIRED, "`[]`": ()}
    return {key: words[cell] if cell in words else tomllib.loads(f"x = {cell.strip('`')}")["x"] for key, cell in rows}


def test_every_setting_is_documented_with_its_default_and_no_other_is() -> None:
    recipe, _, controls = DOCUMENT.partition("## The same picture")[0].partition("Of each control")
    assert documented(recipe) == defaults(Recipe)
    assert documented(controls) == defaults(ControlRecipe)
    assert all(f'`"{name}"`' in DOCUMENT for name in PRESETS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_recipe_and_comes_back_equal_from_json(example: str) -> None:
    recipe = config.build(Recipe, tomllib.loads(example))
    assert len(recipe.controls) == 2
    assert config.build(Recipe, json.loads(json.dumps(to_table(recipe)))) == recipe


def test_all_files_of_a_recipe_are_known() -> None:
    (example,) = EXAMPLES
    recipe = config.build(Recipe, {**tomllib.loads(example), "init": "i.png", "mask": "m.png"})
    named = ["edges/control", "outline.png", "soft/control", "pear.jpg", "right.png", "i.png", "m.png"]
    assert [path.as_posix() for path in recipe.files] == named
