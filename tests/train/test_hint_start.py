"""A new control's hint encoder lets the hints through, and says nothing yet."""

import copy
from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor, nn

from bridle.control.control import Control
from bridle.control.hint import HintEncoder
from bridle.control.unet import UNetControl
from bridle.train.hint_start import scale_hint_encoder

PREFIX = "controlnet_cond_embedding."


def make_edges() -> Tensor:
    """[8, 3, 64, 64]: white frames on black, as edges are."""
    hints = torch.zeros(8, 3, 64, 64)
    for number, hint in enumerate(hints):
        hint[:, 4 * number : 4 * number + 30, 8:50] = 1
        hint[:, 4 * number + 1 : 4 * number + 29, 9:49] = 0
    return hints


@pytest.fixture(params=["official", "paper"])
def control(request: Any) -> UNetControl:
    return cast(UNetControl, Control.from_base(tiny.make_unet(), hint_encoder=cast(HintEncoder, request.param)))


def outputs(control: UNetControl, hints: Tensor) -> list[Tensor]:
    """What leaves each convolution."""
    found: list[Tensor] = []
    convs = [module for module in control.controlnet_cond_embedding.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(lambda module, given, output: found.append(output)) for conv in convs]
    with torch.no_grad():
        control.encode(hints)
    for hook in hooks:
        hook.remove()
    return found


def test_every_layer_passes_the_hints_on_at_full_strength(control: UNetControl) -> None:
    hints = make_edges()
    before = outputs(control, hints)[-2].std((0, 2, 3)).mean()
    scale_hint_encoder(control, hints, 0)
    *inner, last = outputs(control, hints)
    for output in inner:
        deviation, mean = torch.std_mean(output, (0, 2, 3))
        assert torch.allclose(deviation, torch.ones_like(deviation), atol=1e-3)
        assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-3)
    assert before < 0.3, "it would do without"
    assert not last.any()


def test_the_output_of_every_link_stays_zero(control: UNetControl) -> None:
    scale_hint_encoder(control, make_edges(), 0)
    latents, timesteps, text, hint = tiny.make_inputs()
    assert not any(link.any() for link in control(latents, timesteps, text, hint).links)


def test_the_last_layer_which_says_zero_is_not_asked_about_every_hint(control: UNetControl) -> None:
    *_, last = [module for module in control.controlnet_cond_embedding.modules() if isinstance(module, nn.Conv2d)]
    shapes: list[torch.Size] = []
    last.register_forward_hook(lambda module, given, output: shapes.append(output.shape))
    scale_hint_encoder(control, make_edges(), 0)
    control.encode(make_edges())
    assert [shape[0] for shape in shapes] == [1, 8], "it is spared only while the others are scaled"


def test_nothing_but_the_hint_encoder_changes(control: UNetControl) -> None:
    before = copy.deepcopy(control.state_dict())
    scale_hint_encoder(control, make_edges(), 0)
    changed = {name for name, weight in control.state_dict().items() if not torch.equal(weight, before[name])}
    *inner, _, _ = [name for name in before if name.startswith(PREFIX)]  # all but the last layer's weight and bias
    assert changed == set(inner)
    assert all(weight.grad is None and weight.requires_grad for weight in control.parameters())
    assert not any(module._forward_hooks for module in control.modules())


def test_it_is_the_same_every_time_and_draws_no_global_numbers(control: UNetControl) -> None:
    other, state = copy.deepcopy(control), torch.get_rng_state()
    for one in (control, other):
        scale_hint_encoder(one, make_edges(), 3)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(control.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_blank_hints_leave_finite_weights(control: UNetControl) -> None:
    scale_hint_encoder(control, torch.zeros(8, 3, 64, 64), 0)
    assert all(weight.isfinite().all() for weight in control.parameters())
