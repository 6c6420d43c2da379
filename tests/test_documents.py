"""Documents that name things of the code name all of them, and name them rightly."""

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bridle import RunSettings, config
from bridle.run.settings import FREE
from bridle.sample.settings import SCHEDULERS

ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
WALK = (ROOT / "docs" / "walk-through.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```toml\n(.*?)```", SETTINGS, re.DOTALL)
REQUIRED = "required"


def list_fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as a dotted key with its default."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from list_fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, REQUIRED if field.default is dataclasses.MISSING else field.default


def read_cell(cell: str) -> Any:
    if cell == "none":
        return None
    return REQUIRED if cell == REQUIRED else tomllib.loads(f"value = {cell.strip('`')}")["value"]


def test_the_settings_are_documented_with_their_defaults_and_no_others_are() -> None:
    tables = SETTINGS.partition("## The run's folder")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+?) \| [^|]{5,} \|$", tables, re.MULTILINE)
    assert {key: read_cell(cell) for key, cell in rows} == dict(list_fields(RunSettings))


def test_all_that_a_continuation_may_change_is_named() -> None:
    allowed = SETTINGS.partition("A continuation may change")[2].partition("Anything else")[0]
    assert set(re.findall(r"`(device|(?:data|control|train)\.\w+)`", allowed)) == FREE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_named(name: str) -> None:
    assert f"`{name}`" in SETTINGS


def test_there_is_an_example_for_either_base() -> None:
    bases = [tomllib.loads(example)["base"] for example in EXAMPLES]
    assert bases[0] == "embedded" != bases[1]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_valid_run(example: str) -> None:
    config.build(RunSettings, tomllib.loads(example))


def test_the_walk_through_opens_every_folder_and_names_only_files_that_exist() -> None:
    package = ROOT / "src" / "bridle"
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", WALK))
    assert [name for name in sorted(named) if not (package / name).exists()] == []
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {name.partition("/")[0] for name in named} >= folders
