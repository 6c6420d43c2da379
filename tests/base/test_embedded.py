"""The base that the package carries: small enough to travel, a true miniature, and at home in stock diffusers."""

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from bridle.base.load import embedded_folder, load_base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.files.weights import save_control

LIMIT_MB, FILE_LIMIT_MB = 64, 15
CALL = {"prompt": "a red apple", "height": 128, "width": 128, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


@pytest.fixture(scope="module")
def control(base):
    """A control that does something: its zero convolutions are drawn at random."""
    torch.manual_seed(0)
    control = Control.from_base(base.denoiser)
    for conv in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(conv.weight, std=0.1)
    torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return control.eval()


@pytest.fixture(scope="module")
def hint():
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[30:90, 40:42] = pixels[60:62, 20:110] = 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def test_it_is_small_enough_to_travel():
    sizes_mb = [path.stat().st_size / 1e6 for path in embedded_folder().rglob("*") if path.is_file()]
    assert sum(sizes_mb) <= LIMIT_MB
    assert max(sizes_mb) < FILE_LIMIT_MB


def test_its_card_says_where_it_comes_from():
    card = (embedded_folder() / "README.md").read_text(encoding="utf-8")
    assert "MIT" in card
    assert "Fluent" in card
    assert "Apache-2.0" in card


def test_it_has_the_thirteen_links_of_stable_diffusion(base, control):
    assert len(control.controlnet_down_blocks) + 1 == 13
    assert base.size_px == 128
    assert base.size_factor == 8
    assert base.pipeline.scheduler.config.prediction_type == "epsilon"


def test_a_control_is_made_of_it_as_of_its_unet(base, control):
    made = Control.from_base(base)
    assert made.config == control.config
    assert torch.equal(made.conv_in.weight, base.denoiser.conv_in.weight)


def test_a_prompt_changes_the_picture(base):
    def draw(prompt):
        noise = torch.Generator().manual_seed(0)
        return base.pipeline(**{**CALL, "prompt": prompt}, generator=noise, output_type="np").images[0]

    assert np.abs(draw("a red apple") - draw("a blue car")).mean() > 0.01


def test_the_stock_control_pipeline_draws_the_same_picture(base, control, hint, tmp_path):
    save_control(control, tmp_path)
    with attach(base.pipeline, edge=control) as rig:
        rig["edge"].set(hint=hint, scale=0.8)
        ours = base.pipeline(**CALL, generator=torch.Generator().manual_seed(5), output_type="np").images
    model = ControlNetModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    parts = {name: part for name, part in base.pipeline.components.items() if name != "image_encoder"}
    stock = StableDiffusionControlNetPipeline(**parts, controlnet=model, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        **CALL,
        image=hint,
        controlnet_conditioning_scale=0.8,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    # Bit-equal but for the hint: we encode it once, the stock pipeline once per guidance half, and a convolution over a
    # batch of two rounds differently from one over a batch of one.
    assert np.abs(ours - theirs).max() < 1e-4
    plain = base.pipeline(**CALL, generator=torch.Generator().manual_seed(5), output_type="np").images
    assert np.abs(ours - plain).max() > 0.1  # or the control above would have done nothing
