"""Stable Diffusion 1 and 2: both predict what they were taught, train, draw in all stock pipelines, and travel."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import promises
import pytest
import tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from bridle.base.base import Base
from bridle.control.control import Control

CONFIGS = Path(__file__).parents[1] / "configs"
TINY: dict[str, Callable[[], Any]] = {"sd1": tiny.make_pipeline, "sd2": tiny.make_sd2_pipeline}
PREDICTIONS = {"sd1": "epsilon", "sd2": "v_prediction"}
FULL = {"sd15": (859_520_964, 361_279_120, 340), "sd21": (865_910_724, 364_228_240, 340)}


@pytest.fixture(scope="module", params=TINY)
def base(request: pytest.FixtureRequest) -> Base:
    base = Base(TINY[request.param]())
    assert base.schedule.prediction == PREDICTIONS[request.param]
    return base


@pytest.fixture(scope="module")
def control(base: Base) -> Control:
    return tiny.wake(Control.from_base(base.pipeline))


@pytest.mark.parametrize("kind", TINY)
def test_it_trains_through_the_cache_goes_on_after_a_stop_and_leaves_the_base_alone(kind: str, tmp_path: Path) -> None:
    promises.trains_goes_on_and_leaves_the_base_alone(Base(TINY[kind]()), tmp_path)


@pytest.mark.parametrize("way", promises.WAYS)
def test_stock_pipelines_are_steered_and_let_go(base: Base, control: Control, way: str) -> None:
    promises.steers_and_comes_off(promises.stock(base, way), way, control, tiny.make_hint())


def test_a_control_travels(control: Control, tmp_path: Path) -> None:
    promises.travels(control, tmp_path, ControlNetModel, tiny.make_inputs())


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_names_shapes_and_numbers_are_those_of_diffusers(name: str) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**json.loads((CONFIGS / f"{name}.json").read_text())["unet"])
        reference = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    control = Control.from_base(unet)
    shapes = {key: value.shape for key, value in control.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    assert {value.device.type for value in control.state_dict().values()} == {"meta"}
    counts = [sum(value.numel() for value in model.parameters()) for model in (unet, control)]
    assert (*counts, len(shapes)) == FULL[name]
