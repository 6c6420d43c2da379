"""The examples run as they are written."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def any_denoiser() -> ModuleType:
    spec = importlib.util.spec_from_file_location("any_denoiser", EXAMPLES / "any_denoiser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_control_of_a_model_of_ones_own_is_trained_saved_and_drawn(any_denoiser: ModuleType, tmp_path: Path) -> None:
    any_denoiser.BASE_STEPS = any_denoiser.CONTROL_STEPS = 3
    any_denoiser.main(tmp_path)
    with Image.open(tmp_path / "any_denoiser.png") as sheet:
        assert min(sheet.size) > 500
    assert (tmp_path / "control" / "config.json").exists()


@pytest.mark.slow
def test_what_it_draws_fills_the_outlines(any_denoiser: ModuleType, tmp_path: Path) -> None:
    assert any_denoiser.main(tmp_path) > 0.75
