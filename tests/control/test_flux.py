"""The control of Flux.1: the published sizes, its tokens, XLabs' kind of control, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_transformers as tt
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from bridle.base.base import Base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.flux import pack, picture_ids, unpack
from bridle.control.hint import to_hint
from bridle.control.text import Text
from bridle.errors import BaseError, ConfigError, FileError, HintError
from bridle.files.weights import CONFIG, build, load_control, save_control

# diffusers' own `FluxControlNetModel` says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

# transformer/config.json of black-forest-labs/FLUX.1-dev.
DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
# What config.json of XLabs-AI/flux-controlnet-canny-diffusers says beside that.
XLABS = {"conditioning_embedding_channels": 16, "num_layers": 2, "num_single_layers": 0, "patch_size": 2}

ASKED = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}


def test_at_full_size_four_blocks_of_each_kind_are_copied_under_diffusers_names() -> None:
    with torch.device("meta"):
        base = FluxTransformer2DModel(**DEV)
        control = Control.from_base(base)
        reference = FluxControlNetModel(**control.config)
        inputs = torch.zeros(1, 16, 128, 128), torch.zeros(1), Text(torch.zeros(1, 512, 4096), torch.zeros(1, 768))
        links = control.zero_layers
    assert shapes(control) == shapes(reference)
    assert [(link.in_features, link.out_features) for link in links] == [(3072, 3072)] * 8
    assert pack(inputs[0]).shape == (1, 64 * 64, 64)
    assert count(base) // 10**6 == 11901
    assert count(control) // 10**6 == 2046


def test_published_controls_have_the_sizes_that_their_configurations_say() -> None:
    """XLabs' file: what `build` makes of its configuration, and what diffusers' class does."""
    config = {**DEV, **XLABS, "axes_dims_rope": [16, 56, 56], "num_mode": None}
    with torch.device("meta"):
        reference = FluxControlNetModel(**config)
    assert shapes(build({"_class_name": "FluxControlNetModel", **config}, {})) == shapes(reference)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_tokens_and_their_places_are_those_of_the_stock_pipeline() -> None:
    latents = torch.randn(2, 16, 8, 6)
    theirs = FluxPipeline._pack_latents(latents, 2, 16, 8, 6)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, (4, 3)), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(picture_ids(4, 3).float(), ids)


def make_xlabs(**changes: Any) -> FluxControlNetModel:
    torch.manual_seed(7)
    model = FluxControlNetModel(**(tt.FLUX | XLABS | changes)).eval()
    for layer in (*model.controlnet_blocks, model.input_hint_block.conv_out):
        nn.init.normal_(layer.weight, std=0.3)
    return model


def test_controls_of_xlabs_kind_load_and_draw_as_in_diffusers(tmp_path: Path) -> None:
    """Their hints see no autoencoder, and their links serve the base's blocks in turns."""
    reference, hint = make_xlabs(), to_hint(tiny.make_hint(), 3)
    reference.save_pretrained(tmp_path / "theirs")
    control = load_control(tmp_path / "theirs")
    pipeline = tt.flux_pipeline(tt.make_flux(num_layers=5))
    controlled = FluxControlNetPipeline(**parts_of(pipeline), controlnet=reference)
    controlled.set_progress_bar_config(disable=True)
    reference.load_state_dict(control.state_dict())  # in aligned memory, where kernels round alike
    theirs = controlled("a bar", control_image=2 * hint - 1, generator=torch.Generator().manual_seed(0), **ASKED).images
    with attach(pipeline, edge=control) as rig:
        rig["edge"].set(hint=hint)
        ours = pipeline("a bar", generator=torch.Generator().manual_seed(0), **ASKED).images
        rig["edge"].set(hint=hint[..., ::2])
        with pytest.raises(HintError, match="hint is 32x64 px; the picture asks for 64x64 px"):
            pipeline("a bar", **ASKED)
    plain = pipeline("a bar", generator=torch.Generator().manual_seed(0), **ASKED).images
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain)
    save_control(control, tmp_path / "ours")
    again: Any = FluxControlNetModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert all(torch.equal(value, control.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_control_need_not_be_told_of_the_guidance_but_must_not_miss_it() -> None:
    dev, schnell = tt.make_flux(), tt.make_flux(guidance_embeds=False)
    with pytest.raises(ConfigError, match="told of the guidance, which this base is not"):
        attach(schnell, edge=Control.from_base(dev))
    control = tt.wake(Control.from_base(schnell))
    latents, timesteps, text, hint = tt.make_inputs()
    control.check_fit(dev, "control")
    with torch.no_grad():
        steered = control.join(dev, control.call(latents, timesteps, text), control(latents, timesteps, text, hint))
    assert steered.shape == latents.shape


def test_an_xlabs_control_that_a_pipeline_brings_along_is_not_added_to() -> None:
    pipeline = tt.flux_pipeline()
    controlled = FluxControlNetPipeline(**parts_of(pipeline), controlnet=make_xlabs())
    controlled.set_progress_bar_config(disable=True)
    hint = to_hint(tiny.make_hint(), 3)
    with attach(controlled, edge=Control.from_base(pipeline)) as rig:
        rig["edge"].set(hint=hint)
        with pytest.raises(ConfigError, match="brings an XLabs control of its own"):
            controlled("a bar", control_image=2 * hint - 1, height=64, width=64, num_inference_steps=1)


def test_a_control_that_a_pipeline_brings_along_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same control once more, attached, is as good as twice its scale."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    pipeline, hint = tt.flux_pipeline(), to_hint(tiny.make_hint(), 3)
    control = tt.wake(Control.from_base(pipeline, layers=2))
    reference: Any = FluxControlNetModel.from_config(control.config).eval()
    reference.load_state_dict(control.state_dict())
    controlled = FluxControlNetPipeline(**parts_of(pipeline), controlnet=reference)
    controlled.set_progress_bar_config(disable=True)

    def draw(scale: float) -> np.ndarray:
        asked: dict[str, Any] = ASKED | {"generator": torch.Generator().manual_seed(0)}
        more = {"control_image": 2 * hint - 1, "controlnet_conditioning_scale": scale}
        return controlled("a bar", **more, **asked).images  # type: ignore[no-any-return]

    twice, once = draw(2.0), draw(1.0)
    with attach(controlled, edge=control) as rig:
        rig["edge"].set(hint=hint)
        assert np.array_equal(draw(1.0), twice)
    assert not np.array_equal(once, twice)


def parts_of(pipeline: FluxPipeline) -> dict[str, Any]:
    return {name: part for name, part in pipeline.components.items() if part is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_mode": 10}, r"union of 10 kinds \(num_mode\)"),
        ({"num_layers": 0}, r"is damaged \(num_layers is 0\)"),
    ],
)
def test_a_control_that_cannot_be_used_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_control(Control.from_base(tt.make_flux()), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(FileError, match=said):
        load_control(tmp_path)


def test_a_base_that_takes_more_than_noise_is_refused() -> None:
    with pytest.raises(BaseError, match="base takes 64 channels per token beside the 64 noisy ones"):
        Base(tt.flux_pipeline(tt.make_flux(in_channels=128, out_channels=64)))


def test_a_base_s_size_is_that_of_its_pipeline() -> None:
    assert Base(tt.flux_pipeline()).size_px == 1024
