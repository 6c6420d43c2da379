"""Attaching is reversible, an untrained control changes nothing, several controls sum, and a rein does what it says."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint
from bridle.control.residuals import Residuals
from bridle.errors import ConfigError, HintError

HINT = tiny.make_hint()


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny.make_pipeline()


@pytest.fixture(scope="module")
def control(stock: StableDiffusionPipeline) -> Control:
    return tiny.wake(Control.from_base(stock))


@pytest.fixture(scope="module")
def other(stock: StableDiffusionPipeline) -> Control:
    return tiny.wake(Control.from_base(stock), seed=30)


@pytest.fixture(autouse=True)
def leave_nothing_behind(stock: StableDiffusionPipeline) -> Iterator[None]:
    yield
    assert not stock.unet._forward_pre_hooks
    assert not stock.unet._forward_hooks
    assert "forward" not in vars(stock.unet)


def draw(pipeline: Any, prompt: Any = "a red apple", steps: int = 2, **more: Any) -> np.ndarray:
    seed = torch.Generator().manual_seed(0)
    images = pipeline(prompt, num_inference_steps=steps, guidance_scale=5.0, generator=seed, output_type="np", **more)
    pictures: np.ndarray = images.images
    return pictures


def predict(unet: Any, **given: Any) -> Tensor:
    latents, timesteps, text, _ = tiny.make_inputs(1)
    with torch.no_grad():
        output: Tensor = unet(latents, timesteps[0], text, **given).sample
    return output


def test_an_untrained_control_changes_not_one_bit(stock: StableDiffusionPipeline) -> None:
    without, without_pictures = predict(stock.unet), draw(stock)
    with attach(stock, edge=Control.from_base(stock)) as rig:
        rig["edge"].set(hint=HINT)
        assert torch.equal(predict(stock.unet), without)
        assert np.array_equal(draw(stock), without_pictures)


def test_a_trained_control_acts_and_detaching_restores_the_pipeline_exactly(
    stock: StableDiffusionPipeline, control: Control
) -> None:
    before = draw(stock)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        steered = draw(stock)
        rig["edge"].set(hint=255 - HINT)
        assert not np.array_equal(draw(stock), steered)  # the hint counts, and a new one replaces the old
    assert not np.array_equal(steered, before)
    assert np.array_equal(draw(stock), before)
    rig.detach()
    assert np.array_equal(draw(stock), before)


def test_an_error_inside_the_block_detaches_as_well(stock: StableDiffusionPipeline, control: Control) -> None:
    before = predict(stock.unet)
    with pytest.raises(HintError, match="asks for 64x64 px"), attach(stock, edge=control) as rig:
        predict(rig["edge"].set(hint=tiny.make_hint(size_px=32)) and stock.unet)
    assert torch.equal(predict(stock.unet), before)


def test_nested_attachments_sum_and_come_off_in_any_order(
    stock: StableDiffusionPipeline, control: Control, other: Control
) -> None:
    before = predict(stock.unet)
    both = attach(stock, a=control, b=other)
    both["a"].set(hint=HINT)
    both["b"].set(hint=HINT)
    summed = predict(stock.unet)
    both.detach()
    first, second = attach(stock, a=control), attach(stock, b=other)
    first["a"].set(hint=HINT)
    second["b"].set(hint=HINT)
    assert torch.equal(predict(stock.unet), summed)
    first.detach()
    with attach(stock, b=other) as alone:
        second.detach()
        alone["b"].set(hint=HINT)
        only_b = predict(stock.unet)
    assert not torch.equal(only_b, summed)
    assert torch.equal(predict(stock.unet), before)


def test_several_controls_are_their_residuals_summed(
    stock: StableDiffusionPipeline, control: Control, other: Control
) -> None:
    latents, timesteps, text, _ = tiny.make_inputs(1)
    hints = [to_hint(HINT, 3), to_hint(255 - HINT, 3)]
    with torch.no_grad():
        a = control(latents, timesteps, text, hints[0])
        b = other(latents, timesteps, text, hints[1])
    down = tuple(left + 0.5 * right for left, right in zip(a.down, b.down, strict=True))
    mid = a.mid + 0.5 * b.mid
    by_hand = predict(stock.unet, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    with attach(stock, a=control, b=other) as rig:
        rig["a"].set(hint=hints[0])
        rig["b"].set(hint=hints[1], scale=0.5)
        assert torch.equal(predict(stock.unet), by_hand)


def test_a_control_sums_with_the_one_that_a_stock_controlnet_pipeline_passes(
    stock: StableDiffusionPipeline, control: Control, other: Control
) -> None:
    net = ControlNetModel.from_unet(stock.unet)
    net.load_state_dict(other.state_dict())
    pipeline = StableDiffusionControlNetPipeline(**stock.components, controlnet=net, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with attach(stock, a=control, b=other) as rig:
        rig["a"].set(hint=HINT)
        rig["b"].set(hint=255 - HINT)
        expected = draw(stock)
    with attach(pipeline, a=control) as rig:
        rig["a"].set(hint=HINT)
        pictures = draw(pipeline, image=to_hint(255 - HINT, 3))
    assert not np.allclose(draw(stock), expected, atol=0.02)
    assert np.allclose(pictures, expected, atol=1e-5)


def trace(pipeline: Any, steps: int = 4) -> list[Tensor]:
    """The latents after every step."""
    seen: list[Tensor] = []

    def remember(_: Any, step: int, timestep: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(given["latents"].clone())
        return given

    draw(pipeline, steps=steps, callback_on_step_end=remember)
    return seen


@pytest.mark.parametrize(
    ("start", "end", "acting"),
    [(0.0, 1.0, [1, 1, 1, 1]), (0.5, 1.0, [0, 0, 1, 1]), (0.0, 0.5, [1, 1, 0, 0]), (0.25, 0.75, [0, 1, 1, 0])],
)
def test_a_control_acts_from_its_start_to_its_end(
    stock: StableDiffusionPipeline, control: Control, start: float, end: float, acting: list[int]
) -> None:
    called: list[float] = []
    hook = control.conv_in.register_forward_hook(lambda *_: called.append(1))
    free, seen = trace(stock), []
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT, start=start, end=end)

        def count(_: Any, step: int, timestep: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(len(called))
            called.clear()
            return given

        draw(stock, steps=4, callback_on_step_end=count)
        steered = trace(stock)
    hook.remove()
    assert seen == acting
    first = acting.index(1)
    assert [torch.equal(a, b) for a, b in zip(free, steered, strict=True)] == [step < first for step in range(4)]


def test_a_scale_of_zero_or_an_empty_mask_equals_no_control(stock: StableDiffusionPipeline, control: Control) -> None:
    before = draw(stock)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT, scale=0)
        assert np.array_equal(draw(stock), before)
        rig["edge"].set(scale=1.0, mask=np.zeros((64, 64), np.uint8))
        assert np.array_equal(draw(stock), before)
        rig["edge"].set(mask=np.full((64, 64), 255, np.uint8))
        assert not np.array_equal(draw(stock), before)


def test_scales_act_link_by_link(stock: StableDiffusionPipeline, control: Control) -> None:
    latents, timesteps, text, _ = tiny.make_inputs(1)
    scales = tuple(0.825 ** (12 - index) for index in range(13))
    with torch.no_grad():
        links = control(latents, timesteps, text, to_hint(HINT, 3)).links
    by_hand = Residuals(tuple(link * scale for link, scale in zip(links, scales, strict=True)))
    given = {"down_block_additional_residuals": by_hand.down, "mid_block_additional_residual": by_hand.mid}
    expected = predict(stock.unet, **given)
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=HINT, weights=scales)
        assert torch.equal(predict(stock.unet), expected)


def test_hints_of_a_batch_reach_their_own_prompts(stock: StableDiffusionPipeline, control: Control) -> None:
    hints = [HINT, tiny.make_hint(6)]

    def one(hint: np.ndarray) -> np.ndarray:
        with attach(stock, edge=control) as rig:
            rig["edge"].set(hint=hint)
            return draw(stock, latents=start)

    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with attach(stock, edge=control) as rig:
        rig["edge"].set(hint=np.stack(hints))
        together = draw(stock, ["a red apple"] * 2, latents=start.repeat(4, 1, 1, 1), num_images_per_prompt=2)
    expected = [one(hints[0])[0]] * 2 + [one(hints[1])[0]] * 2
    assert not np.allclose(expected[0], expected[2], atol=0.02)
    assert np.allclose(together, expected, atol=1e-4)


def test_what_cannot_be_done_is_refused(stock: StableDiffusionPipeline, control: Control) -> None:
    with attach(stock, edge=control) as rig:
        with pytest.raises(HintError, match=r'control "edge" has no hint; call rig\["edge"\].set\(hint='):
            predict(stock.unet)
        with pytest.raises(ConfigError, match="no control is attached as 'egde'; attached: edge"):
            rig["egde"]
        with pytest.raises(ConfigError, match=r"from 0.8 to 0.2; expected 0 <= start <= end <= 1"):
            rig["edge"].set(start=0.8, end=0.2)
        with pytest.raises(HintError, match=r"mask has shape \[64, 64, 3\]; expected one channel"):
            rig["edge"].set(mask=np.zeros((64, 64, 3), np.uint8))
        rig["edge"].set(hint=np.stack([HINT] * 3))
        with pytest.raises(HintError, match="3 hints for 2 pictures; give one hint, or one per prompt"):
            draw(stock, ["a", "b"])
        rig["edge"].set(hint=tiny.make_hint(size_px=32))
        with pytest.raises(HintError, match="hint is 32x32 px; the picture asks for 64x64 px"):
            draw(stock)
    with pytest.raises(ConfigError, match="attach was given no control; name at least one"):
        attach(stock)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_out_channels": (32, 32, 64, 32)}, "block_out_channels"),
        ({"layers_per_block": 1}, "layers_per_block"),
        ({"cross_attention_dim": 16}, "cross_attention_dim"),
    ],
)
def test_a_control_of_another_base_is_refused(
    stock: StableDiffusionPipeline, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f'control "edge" has {said} .*attach it to the base it was trained on'):
        attach(stock, edge=Control.from_base(tiny.make_unet(**changes)))


def test_a_control_of_another_type_is_refused(stock: StableDiffusionPipeline, control: Control) -> None:
    half = Control.from_base(tiny.make_unet()).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bfloat16, the pipeline on cpu torch.float32: move it with control.to"):
        attach(stock, edge=half)


def test_a_control_lies_where_an_offloaded_base_computes(monkeypatch: pytest.MonkeyPatch, control: Control) -> None:
    """As after `enable_model_cpu_offload`, which takes a GPU: the hooks bring each part there, and back."""
    stock = tiny.make_pipeline()
    monkeypatch.setattr(type(stock), "_execution_device", torch.device("meta"))
    attach(stock, edge=control).detach()
    vars(stock.unet)["_hf_hook"] = object()
    attach(stock, edge=copy.deepcopy(control).to("meta")).detach()
    with pytest.raises(ConfigError, match=r'is on cpu .*, the pipeline on meta .*control.to\("meta", torch.float32\)'):
        attach(stock, edge=control)


def make_delta(unet: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trained = [(name, value) for name, value in unet.named_parameters() if name.startswith("up_blocks")]
    return {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in trained}


def unlocked(control: Control, seed: int) -> Control:
    twin = copy.deepcopy(control)
    twin.base_delta = make_delta(tiny.make_unet(), seed)
    return twin


def weights(unet: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_control_of_an_unlocked_base_draws_with_that_base_and_leaves_it_as_it_was(
    stock: StableDiffusionPipeline, control: Control
) -> None:
    before, by_hand = weights(stock.unet), tiny.make_unet()
    taught = unlocked(control, seed=0)
    for name, change in taught.base_delta.items():
        by_hand.get_parameter(name).data += change
    pipeline = tiny.make_pipeline(by_hand)
    with attach(pipeline, edge=control) as rig:
        rig["edge"].set(hint=HINT)
        expected = draw(pipeline)
    with attach(stock, edge=taught) as rig:
        rig["edge"].set(hint=HINT)
        assert np.array_equal(draw(stock), expected)
        rig["edge"].set(scale=0)
        assert np.array_equal(draw(stock), draw(pipeline))  # the scale is the residuals' alone
    assert same(weights(stock.unet), before)
    rig.detach()
    assert same(weights(stock.unet), before)


def test_changes_of_the_base_add_up_and_come_off_in_any_order(stock: StableDiffusionPipeline, control: Control) -> None:
    before, one, two = weights(stock.unet), unlocked(control, seed=1), unlocked(control, seed=2)
    with attach(stock, a=one, b=two):
        both = weights(stock.unet)
    first, second = attach(stock, a=one), attach(stock, b=two)
    assert same(weights(stock.unet), both)
    first.detach()
    only_second = weights(stock.unet)
    second.detach()
    assert same(weights(stock.unet), before)
    with attach(stock, b=two):
        assert same(weights(stock.unet), only_second)
    assert not same(only_second, both)
    with attach(stock, left=two, right=two), attach(stock, again=copy.deepcopy(two)) as third:
        assert same(weights(stock.unet), only_second)  # it changes its base once, wherever it acts
        third.detach()
        assert same(weights(stock.unet), only_second)
    assert same(weights(stock.unet), before)


def test_an_attachment_that_fails_half_way_changes_nothing(stock: StableDiffusionPipeline, control: Control) -> None:
    before, fits, fails = weights(stock.unet), unlocked(control, seed=1), unlocked(control, seed=2)
    fails.base_delta["conv_out.bias"] = torch.ones(4, device="meta")  # found out only when it is added
    with pytest.raises(NotImplementedError):
        attach(stock, a=fits, b=fails)
    assert same(weights(stock.unet), before)
    fails.base_delta["conv_out.bias"] = torch.ones(5)
    with pytest.raises(ConfigError, match=r'control "b" changes conv_out.bias of shape .*: attach it to the base it'):
        attach(stock, a=fits, b=fails)
    assert same(weights(stock.unet), before)


def test_a_base_that_fsdp_has_sharded_is_known_by_the_class_it_had() -> None:
    unet = tiny.make_unet()
    control = tiny.wake(Control.from_base(unet))
    plain = type(unet)
    unet.__class__ = type(f"FSDP{plain.__name__}", (type("FSDPModule", (), {}), plain), {})  # as fully_shard does
    control.check_fit(unet, "control")
    with attach(unet, it=control) as rig:
        assert rig.first is control
    assert type(Control.from_base(unet)) is type(control)


def test_what_is_no_control_is_refused_with_the_remedy(stock: StableDiffusionPipeline) -> None:
    with pytest.raises(ConfigError, match=r'control "edge" is a str; expected a control: .*edge=load_control\('):
        attach(stock, edge="demo/control")  # ty: ignore[invalid-argument-type]
