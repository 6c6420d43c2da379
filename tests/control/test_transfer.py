"""A control moves to a fine-tuned variant of its base: what it learned comes along, what the base learned as well."""

from typing import Any

import pytest
import tiny
import tiny_pixel
import tiny_sdxl
import tiny_transformers
import torch

from bridle.control.control import Control
from bridle.control.transfer import transfer
from bridle.errors import ConfigError


def tuned(unet: Any, seed: int = 11) -> Any:
    """A variant of a U-Net: every weight moved a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return unet


def train(control: Control, by: float = 0.02) -> Control:
    torch.manual_seed(12)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return control


MAKERS = {
    "sd1": tiny.make_unet,
    "sdxl": tiny_sdxl.make_unet,
    "sd3": tiny_transformers.make_sd3,
    "flux": tiny_transformers.make_flux,
    "pixel": tiny_pixel.make_unet,
}


@pytest.mark.parametrize("family", MAKERS)
def test_copied_weights_move_as_the_base_did_and_all_others_stay(family: str) -> None:
    source, target = MAKERS[family](), tuned(MAKERS[family]())
    fresh = Control.from_base(source).state_dict()
    control = train(Control.from_base(source))
    before = {name: value.clone() for name, value in control.state_dict().items()}
    moved = transfer(control, source, target)
    ours, theirs = source.state_dict(), target.state_dict()
    copied = {name for name, value in source.named_parameters() if name in fresh and torch.equal(value, fresh[name])}
    assert len(copied) > 10
    for name, value in moved.state_dict().items():
        if name in copied:
            assert torch.equal(value, (before[name].double() + theirs[name].double() - ours[name].double()).float())
        assert torch.equal(value, before[name]) == (name not in copied), name
    assert all(torch.equal(value, before[name]) for name, value in control.state_dict().items())


def test_from_a_base_to_itself_it_comes_back_bit_for_bit() -> None:
    unet = tiny.make_unet()
    control = train(Control.from_base(unet), by=1e-6)
    moved = transfer(control, unet, tiny.make_unet())
    assert moved is not control
    assert all(torch.equal(value, control.state_dict()[name]) for name, value in moved.state_dict().items())


def test_an_untrained_control_becomes_an_untrained_one_of_the_target() -> None:
    source, target = tiny.make_pipeline(), tiny.make_pipeline(tuned(tiny.make_unet()))
    control = Control.from_base(source)
    expected = Control.from_base(target).state_dict()
    moved = transfer(control, source, target).state_dict()
    copied = [name for name in moved if not name.startswith("controlnet_")]
    assert [name for name in copied if not torch.equal(moved[name], expected[name])] == []


def test_what_training_changed_in_the_base_comes_along() -> None:
    unet = tiny.make_unet()
    control = train(Control.from_base(unet))
    control.base_delta = {"conv_out.bias": torch.ones(4)}
    moved = transfer(control, unet, tuned(tiny.make_unet()))
    assert torch.equal(moved.base_delta["conv_out.bias"], torch.ones(4))


def test_a_base_of_another_kind_is_refused_and_named() -> None:
    control = Control.from_base(tiny.make_unet())
    wider = tiny.make_unet(cross_attention_dim=48)
    with pytest.raises(ConfigError, match="the control, for its target, has cross_attention_dim 32"):
        transfer(control, tiny.make_unet(), wider)
    with pytest.raises(ConfigError, match="the control, for its source, has cross_attention_dim 32"):
        transfer(control, wider, tiny.make_unet())
