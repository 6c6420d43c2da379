"""The public names: these, no others, each found where it is said to live."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bridle

NAMES = {
    "Base", "BridleError", "Control", "ControlledBlock", "Init", "Residuals", "Rig", "RunSettings",
    "SampleSettings", "Steering", "Strength", "attach",
    "evaluate_run", "generate", "load_base", "load_control", "load_module_control", "save_control",
    "train_run", "zero_conv", "zero_linear",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(bridle.__all__) == NAMES
    assert set(dir(bridle)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_is_loaded_when_it_is_asked_for(name: str) -> None:
    assert getattr(bridle, name).__name__ == name


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    tree = ast.parse(Path(bridle.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == bridle._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Controll'"):
        bridle.Controll  # noqa: B018


def test_a_light_name_loads_nothing_heavy() -> None:
    script = "import sys, bridle; bridle.BridleError; bridle.SampleSettings; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "False\n"
