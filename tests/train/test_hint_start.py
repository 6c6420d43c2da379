"""A new control's hint encoder begins by knowing what the base sees, and the base's output stays what it was."""

import copy
from typing import Any, cast

import pytest
import tiny
import torch
from torch import Tensor

from bridle.cache.store import CachedBatch
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.control.unet import UNetControl
from bridle.train.hint_start import first_features, start_hint_encoder
from bridle.train.settings import TrainSettings


class Pairs:
    """Hints that are pictures of flat colours, and latents of the same: what one shows the other tells."""

    train_ids = tuple(f"pair#{number}" for number in range(32))

    def __init__(self, channels: int) -> None:
        source = torch.Generator().manual_seed(0)
        colours = torch.rand(32, 3, 1, 1, generator=source)
        self.hint = colours.expand(32, 3, 64, 64)
        mixed = torch.randn(channels, 3, generator=source)
        self.mean = torch.einsum("ck,bkhw->bchw", mixed, colours - 0.5).expand(32, channels, 8, 8)

    def batch(self, ids: list[str]) -> CachedBatch:
        rows = [int(id.partition("#")[2]) for id in ids]
        text = Text(torch.zeros(len(ids), 4, 32))
        mean = self.mean[rows]
        return CachedBatch(mean=mean, std=0 * mean, hint=self.hint[rows], captions=("",) * len(ids), text=text)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 60, "batch": 8, "precision": "fp32"} | changes)


@pytest.fixture
def control() -> UNetControl:
    return cast(UNetControl, Control.from_base(tiny.make_unet()))


def predict(control: UNetControl, pairs: Pairs) -> Tensor:
    with torch.no_grad():
        return control.encode(pairs.hint)


def test_it_predicts_what_the_first_convolution_makes_of_the_picture(control: UNetControl) -> None:
    pairs = Pairs(4)
    error = start_hint_encoder(control, cast(Any, pairs), settings())
    wanted = first_features(control, pairs.mean)
    assert error < 0.5
    assert (predict(control, pairs) - wanted).square().mean() < 0.5 * wanted.square().mean()


def test_the_output_of_every_link_stays_zero(control: UNetControl) -> None:
    pairs = Pairs(4)
    start_hint_encoder(control, cast(Any, pairs), settings(steps=3))
    assert predict(control, pairs).any()
    latents, timesteps, text, hint = tiny.make_inputs()
    assert not any(link.any() for link in control(latents, timesteps, text, hint).links)


def test_nothing_but_the_hint_encoder_changes(control: UNetControl) -> None:
    before = copy.deepcopy(control.state_dict())
    start_hint_encoder(control, cast(Any, Pairs(4)), settings(steps=3))
    changed = {name for name, weight in control.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith("controlnet_cond_embedding.")}
    assert all(weight.grad is None and weight.requires_grad for weight in control.parameters())


def test_it_is_the_same_every_time_and_draws_no_global_numbers(control: UNetControl) -> None:
    other, state = copy.deepcopy(control), torch.get_rng_state()
    for one in (control, other):
        start_hint_encoder(one, cast(Any, Pairs(4)), settings(steps=3))
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(control.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_paper_s_encoder_can_begin_so_as_well() -> None:
    control = cast(UNetControl, Control.from_base(tiny.make_unet(), hint_encoder="paper"))
    assert start_hint_encoder(control, cast(Any, Pairs(4)), settings()) < 0.5
