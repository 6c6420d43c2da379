"""The hastened pictures are the same but for rounding, and afterwards every module is as it was."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.kernels.packed import packs
from bridle.kernels.quicken import quicken, speeds_up
from bridle.sample.hasten import hasten
from bridle.sample.text_once import keep_text
from bridle.sample.twins import share_halves

BF16 = torch.bfloat16


def draw(pipeline: Any, control: Control, guidance: float = 4.0, pictures: int = 1) -> Tensor:
    hint = torch.rand(pictures, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))
    with attach(pipeline, it=control) as rig, torch.no_grad():
        rig["it"].set(hint=hint)
        generators = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
        told = {"generator": generators, "guidance_scale": guidance, "output_type": "latent"}
        found: Tensor = pipeline(["a red apple"] * pictures, num_inference_steps=3, **told).images
    return found.float()


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def state(*models: nn.Module) -> list[dict[str, Any]]:
    """What is set on each module, beside its parameters."""
    return [{name: value for name, value in vars(one).items() if name[0] != "_"} for m in models for one in m.modules()]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_keeping_the_text_is_bit_exact(pipeline: Any, control: Control, guidance: float) -> None:
    expected = draw(pipeline, control, guidance)
    undo = keep_text(pipeline.unet, control)
    found = draw(pipeline, control, guidance)
    undo()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sharing_the_halves_is_exact_but_for_what_a_batch_rounds(
    pipeline: Any, control: Control, guidance: float
) -> None:
    expected = draw(pipeline, control, guidance)
    undo = share_halves(pipeline.unet, control)
    found = draw(pipeline, control, guidance)
    undo()
    assert deviation(found, expected) < (1e-5 if guidance > 1 else 1e-12)


def test_a_batch_of_several_pictures_shares_its_halves_too(pipeline: Any, control: Control) -> None:
    expected = draw(pipeline, control, pictures=2)
    with hasten(pipeline, control):
        assert deviation(draw(pipeline, control, pictures=2), expected) < 1e-5


def test_hastened_pictures_differ_from_plain_ones_by_rounding_alone(pipeline: Any, control: Control) -> None:
    exact = draw(pipeline, control)
    with hasten(pipeline, control):
        assert deviation(draw(pipeline, control), exact) < 1e-5
    pipeline.to(BF16)
    control.to(BF16)
    plain = draw(pipeline, control)
    with hasten(pipeline, control):
        found = draw(pipeline, control)
    assert deviation(found, plain) < 0.05
    assert deviation(found, exact) < 1.5 * deviation(plain, exact)


def test_float32_weights_are_turned_meanwhile_and_those_for_bfloat16_are_not(pipeline: Any, control: Control) -> None:
    def lie(*models: Any) -> list[tuple[int, ...]]:
        return [weight.stride() for model in models for weight in model.parameters()]

    models = pipeline.unet, pipeline.vae, control
    before = lie(*models)
    with torch.autocast("cpu", BF16), hasten(pipeline, control):
        assert lie(*models) == before
    with hasten(pipeline, control):
        assert (lie(*models) != before) == speeds_up(torch.float32)
    assert lie(*models) == before


def test_autocast_is_hastened_as_well(pipeline: Any, control: Control) -> None:
    exact = draw(pipeline, control)
    with torch.autocast("cpu", BF16), hasten(pipeline, control):
        assert 0 < deviation(draw(pipeline, control), exact) < 0.05


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_undone(pipeline: Any, control: Control, fails: bool) -> None:
    pipeline.to(BF16)
    control.to(BF16)
    before, models = draw(pipeline, control), (pipeline.unet, pipeline.vae, control)
    states = state(*models)
    with ExitStack() as around:
        if fails:
            around.enter_context(pytest.raises(RuntimeError, match="stopped"))
        with hasten(pipeline, control):
            draw(pipeline, control)
            assert state(*models) != states
            if fails:
                raise RuntimeError("stopped")
    assert state(*models) == states
    assert not any("_bridle_working" in vars(one) for model in models for one in model.modules())
    assert torch.equal(draw(pipeline, control), before)


def test_it_can_be_entered_within_itself(pipeline: Any, control: Control) -> None:
    before, states = draw(pipeline, control), state(pipeline.unet, control)
    with hasten(pipeline, control):
        with hasten(pipeline, control):
            assert deviation(draw(pipeline, control), before) < 1e-5
        assert deviation(draw(pipeline, control), before) < 1e-5
    assert state(pipeline.unet, control) == states


def test_gradients_are_those_of_the_plain_modules(pipeline: Any, control: Control) -> None:
    latents, timesteps, text, hint = tiny.make_inputs()
    latents[1], timesteps[1] = latents[0], timesteps[0]
    control.requires_grad_(False)

    def gradient() -> Tensor:
        hinted = hint.clone().requires_grad_(True)
        control(latents, timesteps, text, hinted).mid.sum().backward()
        return torch.as_tensor(hinted.grad)

    expected = gradient()
    with hasten(pipeline, control):
        assert deviation(gradient(), expected) < 1e-5


# --- the text


def test_the_text_is_projected_once_per_drawing(pipeline: Any, control: Control) -> None:
    calls: list[Tensor] = []
    attention = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    undo_count = attention.to_k.forward
    attention.to_k.forward = lambda text: calls.append(text) or undo_count(text)
    undo = keep_text(pipeline.unet)
    draw(pipeline, control)
    assert len(calls) == 1
    draw(pipeline, control)
    assert len(calls) == 2
    undo()


def test_another_text_in_the_same_place_is_seen(pipeline: Any) -> None:
    latents, timesteps, text, _ = tiny.make_inputs()
    other = text.flip(0).clone()
    undo = keep_text(pipeline.unet)
    with torch.no_grad():
        pipeline.unet(latents, timesteps, text)
        text.copy_(other)
        found = pipeline.unet(latents, timesteps, text).sample
        undo()
        assert torch.equal(found, pipeline.unet(latents, timesteps, other).sample)


def test_weights_that_change_are_seen(pipeline: Any, control: Control) -> None:
    """A control of an unlocked base changes them while it is attached."""
    pipeline.to(BF16)
    control.to(BF16)
    changed = copy.deepcopy(pipeline.unet)
    for parameter in changed.parameters():
        parameter.data.mul_(1.05)
    latents, timesteps, text, _ = (one.to(BF16) if one.is_floating_point() else one for one in tiny.make_inputs())
    with torch.no_grad(), hasten(pipeline):
        pipeline.unet(latents, timesteps, text)
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.05)
        found = pipeline.unet(latents, timesteps, text).sample
        assert deviation(found.float(), changed(latents, timesteps, text).sample.float()) < 0.05


# --- the halves


@pytest.mark.parametrize("levels", ["CrossAttnDownBlock2D", "DownBlock2D"])
def test_the_shared_layers_see_half_of_the_rows(levels: str) -> None:
    kinds = (levels, *("CrossAttnDownBlock2D",) * 2, "DownBlock2D")
    unet = tiny.make_unet(down_block_types=kinds)
    transformer = unet.down_blocks[0 if levels == "CrossAttnDownBlock2D" else 1].attentions[0]
    first = transformer.transformer_blocks[0]
    watched = {
        "resnet": unet.down_blocks[0].resnets[0].conv1,
        "self": first.attn1.to_k,
        "feed": first.ff,
    }
    rows = {}
    for name, module in watched.items():
        module.register_forward_hook(lambda module, given, found, name=name: rows.__setitem__(name, len(given[0])))
    latents, _, text, _ = tiny.make_inputs()
    latents[1] = latents[0]
    undo = share_halves(unet)
    with torch.no_grad():
        shared = unet(latents, 500, text).sample
        assert rows == {"resnet": 1, "self": 1, "feed": 2}
        latents[1, 0, 0, 0] += 1  # no longer the same
        unet(latents, 500, text)
        assert set(rows.values()) == {2}
        undo()
        latents[1] = latents[0]
        assert torch.allclose(shared, unet(latents, 500, text).sample, atol=1e-5)


def test_rows_of_different_timesteps_are_not_shared() -> None:
    unet = tiny.make_unet()
    latents, _, text, _ = tiny.make_inputs()
    latents[1] = latents[0]
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        expected = unet(latents, timesteps, text).sample
        undo = share_halves(unet)
        assert torch.allclose(unet(latents, timesteps, text).sample, expected, atol=1e-5)
        undo()


# --- packed weights


@pytest.mark.skipif(not packs(), reason="this processor or PyTorch cannot pack")
@pytest.mark.parametrize("kind", ["linear", "1", "3", "stride"])
def test_packed_layers_give_what_plain_ones_give(kind: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(48, 40)
    given = torch.randn(2, 7, 48)
    if kind != "linear":
        kernel = 1 if kind == "1" else 3
        module = nn.Conv2d(48, 40, kernel, 2 if kind == "stride" else 1, padding=kernel // 2, bias=kind != "1")
        given = torch.randn(2, 48, 6, 10)
    with torch.no_grad():
        expected = module(given)
        undo = quicken(module, fixed=True)
        assert deviation(module(given), expected) < 1e-6
        with torch.autocast("cpu", BF16):
            found = module(given)
        undo()
    assert found.dtype is BF16
    assert found.shape == expected.shape
    assert deviation(found.float(), expected) < 0.01


def test_what_is_no_u_net_is_left_alone() -> None:
    class Other:
        unet = nn.Sequential(nn.Linear(4, 4))

    with hasten(Other()):
        assert "forward" not in vars(Other.unet[0])
