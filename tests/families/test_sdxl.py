"""SDXL: two text encoders, a vector per caption and the picture's size reach the control as they reach the base."""

import json
from pathlib import Path
from typing import Any

import promises
import pytest
import tiny
import tiny_sdxl
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.files.convert import convert
from bridle.files.weights import load_control, save_control

CONFIG = Path(__file__).parents[1] / "configs" / "sdxl.json"


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(tiny_sdxl.make_pipeline())


@pytest.fixture(scope="module")
def control(base: Base) -> Control:
    return tiny.wake(Control.from_base(base.pipeline))


def make_inputs(base: Base) -> tuple[Tensor, Tensor, Text, Tensor]:
    latents, timesteps, _, hint = tiny.make_inputs()
    return latents, timesteps, base.encode_captions(["a red apple", "a blue car"]), hint


def test_captions_are_encoded_as_the_pipeline_encodes_its_prompts(base: Base) -> None:
    captions = ["", "a red apple"]
    with torch.no_grad():
        states, _, pooled, _ = base.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    text = base.encode_captions(captions)
    assert torch.equal(text.states, states)
    assert torch.equal(text.tensors["pooled"], pooled)
    assert text.states.shape == (2, tiny.TOKENS, tiny.WIDTH + tiny_sdxl.SECOND_WIDTH)
    assert text.tensors["pooled"].shape == (2, tiny_sdxl.POOLED)


def test_residuals_are_those_of_diffusers_bit_for_bit(base: Base, control: Control) -> None:
    latents, timesteps, text, hint = make_inputs(base)
    reference = ControlNetModel.from_unet(base.denoiser)
    reference.load_state_dict(control.state_dict())  # strict: the names are the same
    sizes = torch.tensor([[64.0, 64.0, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": text.tensors["pooled"], "time_ids": sizes}
    with torch.no_grad():
        ours = control(latents, timesteps, text, hint)
        theirs = reference(latents, timesteps, text.states, hint, added_cond_kwargs=added)
    links = (*theirs.down_block_res_samples, theirs.mid_block_res_sample)
    assert len(links) == 10
    assert all(link.any() for link in links)
    assert [torch.equal(a, b) for a, b in zip(ours.links, links, strict=True)] == [True] * 10


def test_the_size_that_training_tells_the_base_is_the_one_that_the_stock_pipeline_tells_it(base: Base) -> None:
    calls: list[Any] = []
    hook = base.denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    promises.draw(base.pipeline, promises.PICTURE, steps=1)
    hook.remove()
    latents, timesteps, text, _ = make_inputs(base)
    ours = Control.from_base(base.pipeline).call(latents, timesteps, text)["added_cond_kwargs"]["time_ids"]
    assert torch.equal(ours, calls[0]["added_cond_kwargs"]["time_ids"])


def test_it_trains_through_the_cache_goes_on_after_a_stop_and_leaves_the_base_alone(tmp_path: Path) -> None:
    promises.trains_goes_on_and_leaves_the_base_alone(Base(tiny_sdxl.make_pipeline()), tmp_path)


@pytest.mark.parametrize("way", promises.WAYS)
def test_stock_pipelines_are_steered_and_let_go(base: Base, control: Control, way: str) -> None:
    promises.steers_and_comes_off(promises.stock(base, way), way, control, tiny.make_hint())


def test_a_control_travels(base: Base, control: Control, tmp_path: Path) -> None:
    promises.travels(control, tmp_path, ControlNetModel, make_inputs(base))


@pytest.mark.parametrize("target", ["official", "comfyui", "diffusers"])
def test_a_converted_control_computes_the_same(target: str, tmp_path: Path) -> None:
    # Heads of 64 channels and sizes told by 256 numbers each, as in the real one: files do not say so.
    like_the_real = {"block_out_channels": (64, 64, 128), "attention_head_dim": (1, 1, 2)}
    told = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": tiny_sdxl.POOLED + 6 * 256}
    control = tiny.wake(Control.from_base(tiny_sdxl.make_unet(**like_the_real, **told)))
    save_control(control, tmp_path / "control")
    out = tmp_path / ("out" if target == "diffusers" else "out.safetensors")
    convert(tmp_path / "control", out, target)
    back = load_control(out)
    assert promises.same(back.state_dict(), control.state_dict())
    inputs = make_inputs(Base(tiny_sdxl.make_pipeline()))
    with torch.no_grad():
        ours, theirs = control.eval()(*inputs).links, back(*inputs).links
    assert all(map(torch.equal, ours, theirs))


def test_at_full_size_names_shapes_and_numbers_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**json.loads(CONFIG.read_text())["unet"])
        reference = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    control = Control.from_base(unet)
    shapes = {key: value.shape for key, value in control.state_dict().items()}
    assert shapes == {key: value.shape for key, value in reference.state_dict().items()}
    counts = [sum(value.numel() for value in model.parameters()) for model in (unet, control)]
    assert counts == [2_567_463_684, 1_251_014_160]
