"""A control drawn with by a stock ControlNet pipeline and by Bridle gives the same picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.files.weights import load_control, save_control

# Bridle encodes a hint once, diffusers once per row and step: convolutions round a batch of two otherwise than one.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Control]:
    """The plain one, the ControlNet one, and the control as loaded from the same folder."""
    folder = tmp_path_factory.mktemp("control")
    plain = tiny.make_pipeline()
    save_control(tiny.wake(Control.from_base(plain)), Path(folder))
    net = ControlNetModel.from_pretrained(folder, low_cpu_mem_usage=False)
    stock = StableDiffusionControlNetPipeline(**plain.components, controlnet=net, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return plain, stock, load_control(folder)


def draw(pipeline: Any, prompts: Any, **more: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(7)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    images: np.ndarray = pipeline(prompts, generator=generator, **(settings | more)).images
    return images


@pytest.mark.parametrize("more", [{}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}])
@pytest.mark.parametrize("prompts", [["a red apple"], ["a red apple", "a blue fish"]])
def test_the_pictures_are_the_same(pipelines: tuple[Any, Any, Control], prompts: list[str], more: Any) -> None:
    plain, stock, control = pipelines
    hints = [tiny.make_hint(seed) for seed in range(len(prompts))]
    expected = draw(stock, prompts, image=[Image.fromarray(hint) for hint in hints], **more)
    with attach(plain, edge=control) as rig:
        rig["edge"].set(hint=np.stack(hints))
        pictures = draw(plain, prompts, **more)
        rig["edge"].set(hint=np.stack([255 - hint for hint in hints]))
        assert not np.allclose(draw(plain, prompts, **more), expected, atol=1e-2)  # the comparison can fail
    assert np.allclose(pictures, expected, rtol=0, atol=ROUNDING)


def test_without_guidance_they_are_the_same_bit_for_bit(pipelines: tuple[Any, Any, Control]) -> None:
    plain, stock, control = pipelines
    hint = tiny.make_hint()
    expected = draw(stock, "a red apple", image=Image.fromarray(hint), guidance_scale=1.0)
    with attach(plain, edge=control) as rig:
        for form in (hint, hint[None], Image.fromarray(hint), torch.from_numpy(hint).permute(2, 0, 1)[None] / 255):
            rig["edge"].set(hint=form)
            assert np.array_equal(draw(plain, "a red apple", guidance_scale=1.0), expected)


def test_one_hint_serves_two_prompts(pipelines: tuple[Any, Any, Control]) -> None:
    plain, stock, control = pipelines
    prompts, hint = ["a red apple", "a blue fish"], tiny.make_hint()
    expected = draw(stock, prompts, image=Image.fromarray(hint))
    with attach(plain, edge=control) as rig:
        rig["edge"].set(hint=hint)
        assert np.allclose(draw(plain, prompts), expected, rtol=0, atol=ROUNDING)


def test_scale_start_and_end_mean_what_they_mean_in_diffusers(pipelines: tuple[Any, Any, Control]) -> None:
    plain, stock, control = pipelines
    hint = tiny.make_hint()
    for start, end in [(0.0, 1.0), (0.3, 1.0), (0.0, 0.7)]:
        expected = draw(
            stock,
            "a red apple",
            image=Image.fromarray(hint),
            controlnet_conditioning_scale=0.5,
            control_guidance_start=start,
            control_guidance_end=end,
        )
        with attach(plain, edge=control) as rig:
            rig["edge"].set(hint=hint, scale=0.5, start=start, end=end)
            assert np.allclose(draw(plain, "a red apple"), expected, rtol=0, atol=ROUNDING), (start, end)
