"""A base delta is exactly what training changed; it goes onto a U-Net of any type and comes off without a trace."""

import copy
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bridle.control.control import Control
from bridle.control.delta import apply_delta, take_delta
from bridle.errors import ConfigError

CHANGED = ("conv_in.weight", "mid_block.resnets.0.conv1.bias", "up_blocks.1.resnets.0.conv1.weight", "conv_out.bias")


def make_delta(seed: int = 0, strength: float = 0.1, names: tuple[str, ...] = CHANGED) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in tiny.make_unet().state_dict().items()}
    return {name: torch.randn(shapes[name], generator=generator) * strength for name in names}


def snapshot(unet: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def predict(unet: Any) -> Tensor:
    latents, timesteps, text, _ = tiny.make_inputs(1)
    with torch.no_grad():
        output: Tensor = unet(latents, timesteps[0], text).sample
    return output


def test_a_delta_names_only_what_changed_and_gives_the_trained_weights_back() -> None:
    original, trained = tiny.make_unet().state_dict(), tiny.make_unet().state_dict()
    for name, change in make_delta().items():
        trained[name] += change
    some = {name: value for name, value in trained.items() if not name.startswith("down_blocks")}
    delta = take_delta(original, some)
    assert set(delta) == set(CHANGED)
    assert {value.dtype for value in delta.values()} == {torch.float32}
    for name in CHANGED:
        before, after = original[name], trained[name]
        off = (before + delta[name]).double() - after.double()
        assert (off.abs() <= 2**-23 * torch.maximum(before.abs(), after.abs())).all()
        mild = (after / before >= 0.5) & (after / before <= 2)
        assert not off[mild].any()


def test_a_delta_of_half_precision_weights_is_taken_in_float32() -> None:
    original, trained = {"w": torch.tensor([1.0, 256.0]).bfloat16()}, {"w": torch.tensor([1.0 + 2**-20, 256.5])}
    assert torch.equal(take_delta(original, trained)["w"], torch.tensor([2**-20, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_added_in_float32_and_removed_bit_for_bit(dtype: torch.dtype) -> None:
    unet, delta = tiny.make_unet().to(dtype), make_delta()
    before = snapshot(unet)
    remove = apply_delta(unet, delta)
    changed = {name: (before[name].float() + delta[name]).to(dtype) for name in CHANGED}
    assert same(snapshot(unet), before | changed)
    assert not same(snapshot(unet), before)
    remove()
    assert same(snapshot(unet), before)
    apply_delta(unet, delta)
    remove()  # a second time does not take off what others put on
    assert same(snapshot(unet), before | changed)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_several_add_up_and_come_off_in_any_order(order: tuple[int, ...]) -> None:
    unet, before = tiny.make_unet(), snapshot(tiny.make_unet())
    deltas = [make_delta(0), make_delta(1, 1e4), make_delta(2, names=(*CHANGED[2:], "conv_norm_out.weight"))]
    removers = [apply_delta(unet, delta) for delta in deltas]
    left = list(range(3))
    for index in order:
        removers[index]()
        left.remove(index)
        alone = tiny.make_unet()
        for other in left:
            apply_delta(alone, deltas[other])
        assert same(snapshot(unet), snapshot(alone))
    assert same(snapshot(unet), before)


def test_a_delta_counts_once_but_what_two_have_in_common_twice() -> None:
    unet, before, delta = tiny.make_unet(), snapshot(tiny.make_unet()), make_delta(0)
    other = make_delta(1) | {CHANGED[0]: delta[CHANGED[0]].clone()}
    removers = [apply_delta(unet, one) for one in (delta, copy.deepcopy(delta), other)]
    twice = before[CHANGED[0]] + delta[CHANGED[0]] + other[CHANGED[0]]
    torch.testing.assert_close(dict(unet.named_parameters())[CHANGED[0]].detach(), twice)
    alone = tiny.make_unet()
    for one in (delta, other):
        apply_delta(alone, one)
    assert same(snapshot(unet), snapshot(alone))
    removers[0]()
    assert same(snapshot(unet), snapshot(alone))
    for remove in removers[1:]:
        remove()
    assert same(snapshot(unet), before)


def test_a_unet_that_moved_meanwhile_is_restored_where_it_is() -> None:
    unet = tiny.make_unet()
    expected = snapshot(tiny.make_unet().to(torch.bfloat16))
    remove = apply_delta(unet, make_delta())
    unet.to(torch.bfloat16)
    remove()
    assert same(snapshot(unet), expected)


def test_a_copy_of_a_changed_unet_stays_changed() -> None:
    unet = tiny.make_unet()
    remove = apply_delta(unet, make_delta())
    twin = copy.deepcopy(unet)
    changed = snapshot(unet)
    remove()
    assert same(snapshot(twin), changed)


def test_an_autocast_around_it_does_not_go_on_with_the_old_weights() -> None:
    unet, changed = tiny.make_unet().requires_grad_(True), tiny.make_unet()  # only what is trained is cached
    apply_delta(changed, make_delta())
    with torch.autocast("cpu", torch.bfloat16):
        expected = predict(changed)
        with torch.enable_grad():
            latents, timesteps, text, _ = tiny.make_inputs(1)
            before = unet(latents, timesteps[0], text).sample.detach()
            remove = apply_delta(unet, make_delta())
            assert torch.equal(unet(latents, timesteps[0], text).sample, expected)
            remove()
            assert torch.equal(unet(latents, timesteps[0], text).sample, before)


def test_a_failure_half_way_leaves_no_trace() -> None:
    unet, before = tiny.make_unet(), snapshot(tiny.make_unet())
    first = apply_delta(unet, make_delta(1))
    changed, delta = snapshot(unet), make_delta()
    delta[CHANGED[2]] = delta[CHANGED[2]].to("meta")  # it cannot be copied from there
    with pytest.raises(NotImplementedError):
        apply_delta(unet, delta)
    assert same(snapshot(unet), changed)
    first()
    assert same(snapshot(unet), before)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda delta: {**delta, "up_blocks.9.x": torch.ones(1)},
            r"up_blocks.9.x \(1 in all\), which this U-Net",
        ),
        (lambda delta: {**delta, CHANGED[3]: torch.ones(5)}, r"conv_out.bias of shape \[5\], this U-Net's has \[4\]"),
    ],
    ids=["name", "shape"],
)
def test_a_delta_of_another_base_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    unet, before = tiny.make_unet(), snapshot(tiny.make_unet())
    with pytest.raises(ConfigError, match=f"the base delta changes {said}.*: attach it to the base it was trained on"):
        apply_delta(unet, spoil(make_delta()))
    assert same(snapshot(unet), before)
    with pytest.raises(ConfigError, match=f"training changes {said}.*: take the delta against the base"):
        take_delta(before, spoil(make_delta()))


def test_weights_out_of_reach_are_said_to_be() -> None:
    with pytest.raises(ConfigError, match="weights are offloaded one by one: leave out enable_sequential_cpu_offload"):
        apply_delta(tiny.make_unet().to("meta"), make_delta())


def test_a_control_carries_its_delta_but_does_not_train_it() -> None:
    control = Control.from_base(tiny.make_unet())
    assert control.base_delta == {}
    control.base_delta = make_delta()
    assert not [name for name in control.state_dict() if "delta" in name]
    twin = copy.deepcopy(control)
    control.base_delta["conv_out.bias"].zero_()
    assert same(twin.base_delta, make_delta())
