"""The control of a U-Net: equal to diffusers' own with the same weights, learning in the order the paper implies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

from bridle.base.base import Base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint
from bridle.control.residuals import Residuals
from bridle.errors import BaseError, ConfigError, HintError
from bridle.files.weights import load_control


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_residuals_are_those_of_diffusers_bit_for_bit(channels: int) -> None:
    unet = tiny.make_unet()
    control = tiny.wake(Control.from_base(unet, hint_channels=channels))
    reference = ControlNetModel.from_unet(unet, conditioning_channels=channels)
    reference.load_state_dict(control.state_dict())  # strict: the names are the same
    assert {n: p.shape for n, p in control.state_dict().items()} == {
        n: p.shape for n, p in reference.state_dict().items()
    }
    with torch.no_grad():
        ours, theirs = control(*tiny.make_inputs(2, channels)), reference(*tiny.make_inputs(2, channels))
    links = (*theirs.down_block_res_samples, theirs.mid_block_res_sample)
    assert len(links) == 13
    assert all(link.any() for link in links)
    assert [torch.equal(a, b) for a, b in zip(ours.links, links, strict=True)] == [True] * 13


def test_a_control_may_pool_its_links_and_see_blue_first_as_diffusers_says(tmp_path: Path) -> None:
    """The official shuffle control pools."""
    settings = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    reference = ControlNetModel.from_unet(tiny.make_unet(), controlnet_conditioning_channel_order="bgr")
    reference.register_to_config(**settings)
    reference.load_state_dict(tiny.wake(Control.from_base(tiny.make_unet())).state_dict())
    reference.save_pretrained(tmp_path)
    control = load_control(tmp_path)
    with torch.no_grad():
        ours, theirs = control(*tiny.make_inputs()), reference(*tiny.make_inputs())
    links = (*theirs.down_block_res_samples, theirs.mid_block_res_sample)
    assert ours.mid.shape[2:] == (1, 1)
    assert [torch.equal(a, b) for a, b in zip(ours.links, links, strict=True)] == [True] * 13
    pipeline = tiny.make_pipeline()
    stock = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=reference, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    hint = to_hint(tiny.make_hint(), 3)
    expected = stock("a", image=hint, generator=torch.Generator().manual_seed(0), **given).images
    with attach(pipeline, style=control) as rig:  # in the conditional half alone, as there
        rig["style"].set(hint=hint)
        drawn = pipeline("a", generator=torch.Generator().manual_seed(0), **given).images
    assert np.allclose(drawn, expected, atol=1e-5)
    assert not np.allclose(drawn, pipeline("a", generator=torch.Generator().manual_seed(0), **given).images, atol=1e-3)


def test_the_base_is_left_as_it_is_and_shares_no_memory_with_the_copy() -> None:
    unet = tiny.make_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    control = Control.from_base(unet)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert all(parameter.requires_grad for parameter in control.parameters())


def test_a_control_can_be_made_from_a_pipeline() -> None:
    pipeline = tiny.make_pipeline()
    ours, theirs = Control.from_base(pipeline).state_dict(), Control.from_base(pipeline.unet).state_dict()
    copied = [name for name in ours if not name.startswith("controlnet_cond_embedding")]
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)


def steer(unet: Any, residuals: Residuals, inputs: tuple[Tensor, ...]) -> Tensor:
    latents, timesteps, text, _ = inputs
    given = {"down_block_additional_residuals": residuals.down, "mid_block_additional_residual": residuals.mid}
    output: Tensor = unet(latents, timesteps, text, **given).sample
    return output


class Steps:
    """Optimiser steps on one batch; each tells which parameters had a gradient and which moved."""

    def __init__(self, control: Control, unet: Any) -> None:
        self.control, self.unet, self.inputs = control, unet, tiny.make_inputs()
        self.optimizer = torch.optim.AdamW(control.parameters(), lr=1e-2, weight_decay=0)
        self.goal = torch.randn(self.inputs[0].shape, generator=torch.Generator().manual_seed(9))

    def __call__(self) -> tuple[set[str], set[str]]:
        before = {name: value.clone() for name, value in self.control.named_parameters()}
        (steer(self.unet, self.control(*self.inputs), self.inputs) - self.goal).square().mean().backward()
        parameters = dict(self.control.named_parameters())
        pulled = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return pulled, {name for name, value in parameters.items() if not torch.equal(value, before[name])}


def is_out(name: str) -> bool:
    return name.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))


def is_early_hint(name: str, last: str) -> bool:
    return name.startswith("controlnet_cond_embedding.") and not name.startswith(last)


@pytest.mark.parametrize(
    ("encoder", "last"), [("official", "controlnet_cond_embedding.conv_out"), ("paper", "controlnet_cond_embedding.")]
)
def test_gradients_arrive_in_the_order_that_zero_convolutions_imply(encoder: Any, last: str) -> None:
    unet = tiny.make_unet()
    locked = {name: value.clone() for name, value in unet.state_dict().items()}
    control = Control.from_base(unet, hint_encoder=encoder)
    if encoder == "paper":
        last += str(len(control.controlnet_cond_embedding) - 1)  # type: ignore[arg-type]
    names = {name for name, _ in control.named_parameters()}
    step = Steps(control, unet)
    only_out = {name for name in names if is_out(name)}
    assert len(only_out) == 2 * 13
    assert step() == (only_out, only_out)
    second = {name for name in names if not is_early_hint(name, last)}
    assert step() == (second, second)
    assert step() == (names, names)
    assert all(torch.equal(value, locked[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_with_only_the_middle_link_the_skip_links_rest_and_reconnecting_changes_nothing_at_that_moment() -> None:
    unet = tiny.make_unet()
    control = Control.from_base(unet, links="middle")
    step = Steps(control, unet)
    skips = {name for name, _ in control.named_parameters() if name.startswith("controlnet_down_blocks.")}
    assert len(skips) == 2 * 12
    for _ in range(3):
        pulled, moved = step()
        assert skips.isdisjoint(pulled | moved)
    assert "conv_in.weight" in moved
    with torch.no_grad():
        alone = steer(unet, control(*step.inputs), step.inputs)
        control.links = "all"
        assert torch.equal(steer(unet, control(*step.inputs), step.inputs), alone)
    assert step()[0] >= skips  # from now on they learn


def test_a_hint_of_the_wrong_size_is_refused() -> None:
    latents, timesteps, text, hint = tiny.make_inputs()
    with pytest.raises(HintError, match="hint is 32x64 px; the picture asks for 64x64 px"):
        Control.from_base(tiny.make_unet())(latents, timesteps, text, hint[..., ::2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hint_channels": 0}, "hint_channels is 0; expected 1 or more"),
        ({"links": "none"}, "links is 'none'; expected 'all' or 'middle'"),
        ({"hint_encoder": "none"}, "hint encoder is 'none'; expected 'official' or 'paper'"),
        ({"size_factor": 3}, "size factor 3 cannot be encoded"),
    ],
)
def test_a_control_that_cannot_be_made_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Control.from_base(tiny.make_unet(), **options)


def test_a_base_of_another_family_is_refused() -> None:
    with pytest.raises(BaseError, match="base is a Linear; expected a Base, a pipeline, or one of UNet2DCondition"):
        Control.from_base(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_embed_type": "timestep"}, "needs class_embed_type, .*use a base of the Stable Diffusion 1, 2 or XL"),
        ({"in_channels": 9}, "needs 5 channels beside the noisy ones, .*use a base of the Stable Diffusion 1, 2 or XL"),
        ({"in_channels": 8}, "needs 4 channels beside the noisy ones"),
        ({"mid_block_type": None}, "has no middle block, .*use a base that has one"),
    ],
)
def test_a_base_that_controls_cannot_serve_is_refused(changes: dict[str, Any], said: str) -> None:
    unet = tiny.make_unet(**changes)
    for make in (Control.from_base, lambda base: Base(tiny.make_pipeline(base))):
        with pytest.raises(BaseError, match=said):
            make(unet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_cond_proj_dim": 32}, "time_cond_proj_dim 32, .*train on a base of the Stable Diffusion 1, 2 or XL"),
        ({"timestep_post_act": "silu"}, "timestep_post_act 'silu'"),
        ({"only_cross_attention": True}, "only_cross_attention True"),
        ({"layers_per_block": (2, 2, 2, 1)}, "layers_per_block"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_trained(changes: dict[str, Any], said: str) -> None:
    """But drawn with: an LCM is steered by the controls of what it was made from."""
    unet = tiny.make_unet(**changes)
    with pytest.raises(BaseError, match=said):
        Control.from_base(unet)
    if "time_cond_proj_dim" in changes:
        Control.from_base(tiny.make_unet()).check_fit(Base(tiny.make_pipeline(unet)).denoiser, "control")
