"""The control of a U-Net on pixels: its links join as diffusers' own do, by hooks that leave nothing behind."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_pixel
import torch
from diffusers import ControlNetModel, DDPMPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.errors import BaseError, ConfigError, HintError
from bridle.train.denoiser import Denoiser

TEXT = Text(torch.zeros(2, 1, 1))


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return tiny_pixel.make_unet()


@pytest.fixture(autouse=True)
def leave_nothing_behind(unet: UNet2DModel) -> Iterator[None]:
    yield
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())


def twin_of(unet: UNet2DModel) -> UNet2DConditionModel:
    """The same weights in the class that takes residuals as arguments; possible without attention alone."""
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    shared = {name: unet.config[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    twin = UNet2DConditionModel(
        in_channels=3, out_channels=3, mid_block_type="UNetMidBlock2D", freq_shift=0, **kinds, **shared
    )
    twin.mid_block = copy.deepcopy(unet.mid_block)  # the class builds a shorter one
    twin.load_state_dict(unet.state_dict())
    return twin.eval()


def test_residuals_join_where_diffusers_puts_them() -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "add_attention": False}
    unet: Any = tiny_pixel.make_unet(**plain)
    twin: Any = twin_of(unet)
    control: Any = tiny_pixel.wake(Control.from_base(unet))
    latents, timesteps, hint = tiny_pixel.make_inputs()
    with torch.no_grad():
        residuals = control(latents, timesteps, TEXT, hint)
        assert all(link.any() for link in residuals.links)
        ours = Denoiser(control, unet)(latents, timesteps, TEXT, hint)
        given = {
            "down_block_additional_residuals": residuals.down,
            "mid_block_additional_residual": residuals.mid,
        }
        theirs = twin(latents, timesteps, torch.zeros(2, 1, 1), **given).sample
    assert torch.equal(ours, theirs)


def predict(unet: Any, latents: Tensor, timesteps: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = unet(latents, timesteps).sample
    return output


def test_an_untrained_control_changes_not_one_bit_and_a_trained_one_is_gone_when_detached(unet: UNet2DModel) -> None:
    latents, timesteps, hint = tiny_pixel.make_inputs()
    without, control = predict(unet, latents, timesteps), Control.from_base(unet)
    with attach(unet, a=control) as rig:
        rig["a"].set(hint=hint)
        assert torch.equal(predict(unet, latents, timesteps), without)
        tiny_pixel.wake(control)
        rig["a"].set(hint=hint)
        there = predict(unet, latents, timesteps)
        rig["a"].set(hint=1 - hint)
        assert not torch.allclose(predict(unet, latents, timesteps), there)
    assert not torch.allclose(there, without)
    assert torch.equal(predict(unet, latents, timesteps), without)


def test_attached_controls_sum(unet: UNet2DModel) -> None:
    latents, timesteps, hint = tiny_pixel.make_inputs()
    a, b = tiny_pixel.wake(Control.from_base(unet)), tiny_pixel.wake(Control.from_base(unet), seed=7)
    with torch.no_grad():
        total = a(latents, timesteps, TEXT, hint).scaled(0.5) + b(latents, timesteps, TEXT, hint)
        expected = a.join(unet, a.call(latents, timesteps, TEXT), total)
    with attach(unet, a=a, b=b) as rig:
        rig["a"].set(hint=hint, scale=0.5)
        rig["b"].set(hint=hint)
        assert torch.equal(predict(unet, latents, timesteps), expected)


def test_gradients_arrive_in_the_order_that_zero_convolutions_imply(unet: UNet2DModel) -> None:
    latents, timesteps, hint = tiny_pixel.make_inputs()
    locked = {name: value.clone() for name, value in unet.state_dict().items()}
    control = Control.from_base(unet)
    model, optimizer = Denoiser(control, unet), torch.optim.AdamW(control.parameters(), lr=1e-2, weight_decay=0)
    parameters, moved = dict(control.named_parameters()), []
    for _ in range(3):
        before = {name: value.clone() for name, value in parameters.items()}
        (model(latents, timesteps, TEXT, hint) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({name for name, value in parameters.items() if not torch.equal(value, before[name])})
    out = {name for name in parameters if name.startswith(("controlnet_down_blocks.", "controlnet_mid_block."))}
    early = {name for name in parameters if name.startswith("controlnet_cond_embedding.") and "conv_out" not in name}
    assert moved == [out, parameters.keys() - early, set(parameters)]
    assert all(torch.equal(value, locked[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_parameters_have_the_names_of_diffusers_controls(unet: UNet2DModel) -> None:
    names = set(Control.from_base(unet).state_dict())
    reference = ControlNetModel.from_unet(
        UNet2DConditionModel(
            block_out_channels=unet.config.block_out_channels,
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_type="UNetMidBlock2D",
        ),
        conditioning_embedding_out_channels=(16,),
    )
    assert names >= set(reference.state_dict())
    assert all("attentions." in name or "mid_block.resnets.1." in name for name in names - set(reference.state_dict()))


def test_a_base_that_centres_its_input_is_followed() -> None:
    centred: Any = tiny_pixel.make_unet(center_input_sample=True)
    plain = copy.deepcopy(centred)
    plain.register_to_config(center_input_sample=False)
    latents, timesteps, hint = tiny_pixel.make_inputs()
    a, b = tiny_pixel.wake(Control.from_base(centred)), tiny_pixel.wake(Control.from_base(plain))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        ours = a(latents, timesteps, TEXT, hint).links
        assert all(map(torch.equal, ours, b(2 * latents - 1, timesteps, TEXT, hint).links))


def fail(block: Any, args: Any) -> None:
    raise KeyError("on the way")


def test_residuals_are_gone_when_a_call_is_done_or_has_failed(unet: UNet2DModel) -> None:
    latents, timesteps, hint = tiny_pixel.make_inputs()
    hidden, time = torch.ones(2, 16, 8, 8), torch.ones(2, 32)
    block: Any = unet.mid_block
    with torch.no_grad(), attach(unet, a=tiny_pixel.wake(Control.from_base(unet))) as rig:
        alone = block(hidden, time)
        rig["a"].set(hint=hint)
        predict(unet, latents, timesteps)
        assert torch.equal(block(hidden, time), alone)
        interrupt = unet.up_blocks[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="on the way"):
            unet(latents, timesteps)
        interrupt.remove()
        assert torch.equal(block(hidden, time), alone)
        rig["a"].set(hint=hint[..., :16])
        with pytest.raises(HintError, match="hint is 16x32 px; the picture asks for 32x32 px"):
            predict(unet, latents, timesteps)


def test_a_stock_pipeline_draws_by_the_hint_between_start_and_end(unet: UNet2DModel) -> None:
    pipeline, hint = tiny_pixel.make_pipeline(unet), tiny_pixel.make_inputs()[2][:1]

    def draw() -> np.ndarray:
        seed = torch.Generator().manual_seed(0)
        pictures: np.ndarray = DDPMPipeline.__call__(
            pipeline, num_inference_steps=4, generator=seed, output_type="np"
        ).images
        return pictures

    without = draw()
    with attach(pipeline, a=tiny_pixel.wake(Control.from_base(pipeline))) as rig:
        rig["a"].set(hint=hint)
        whole = draw()
        rig["a"].set(end=0.5)
        half = draw()
        rig["a"].set(start=0.5, end=0.5)
        assert np.array_equal(draw(), without)
    assert np.array_equal(draw(), without)
    assert len({picture.tobytes() for picture in (without, whole, half)}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_class_embeds": 3}, "a UNet2DModel that picks a class of picture; .*Control.for_module"),
        ({"class_embed_type": "timestep"}, "picks a class of picture"),
        ({"mid_block_type": None}, "has no middle block"),
        ({"in_channels": 1, "out_channels": 1}, "works on 1 channels"),
        ({"out_channels": 6}, "predicts 6 channels"),
        ({"sample_size": (32, 64)}, r"is made for \(32, 64\) px"),
        (
            {
                "down_block_types": ("SkipDownBlock2D",) * 3,
                "up_block_types": ("SkipUpBlock2D",) * 3,
                "block_out_channels": (32, 32, 32),
            },
            "draws beside its skip connections",
        ),
    ],
)
def test_what_such_controls_do_not_carry_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BaseError, match=said):
        Control.from_base(tiny_pixel.make_unet(**changes))


def test_another_width_is_refused_by_name(unet: UNet2DModel) -> None:
    control = Control.from_base(tiny_pixel.make_unet(block_out_channels=(8, 16, 32)))
    with pytest.raises(ConfigError, match=r"has block_out_channels \(8, 16, 32\), the pipeline \(8, 16, 16\)"):
        attach(unet, a=control)
