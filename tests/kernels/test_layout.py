"""Channels last on a GPU: the same results, and nothing changed where it does not pay."""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import nn

from bridle.kernels import choice, layout
from bridle.kernels.quicken import turn_weights

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAST = torch.channels_last


def make_layers(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32))
    return layers.to(device, torch.bfloat16)


def test_on_a_cpu_it_does_not_pay_and_the_modules_answer_themselves() -> None:
    assert not layout.pays(torch.device("cpu"), recorded=True)
    layers, features = make_layers("cpu"), torch.randn(2, 32, 8, 8).bfloat16()
    wanted = layers(features)
    undo = layout.keep_last(layers)
    assert torch.equal(layers(features), wanted)
    undo()
    undo()
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Generator[torch.device]:
    """What asks is told of a GPU with bfloat16; what computes does so on the CPU, by the modules' own code."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    real = layout.faster
    monkeypatch.setattr(layout, "faster", lambda device, recorded: real(torch.device("cpu"), recorded))
    layout.pays.cache_clear()
    yield torch.device("cuda")
    layout.pays.cache_clear()


@pytest.mark.parametrize("fastest", ["first", "last"])
def test_what_is_faster_is_measured_for_each_gpu(
    gpu: torch.device, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pick(key: Any, make_ways: Any) -> str:
        assert key == ("channels", False, "some GPU")
        ways = make_ways()
        assert list(ways) == ["first", "last"]
        for way in ways.values():
            way()
        return fastest

    monkeypatch.setattr(layout, "TIMES", 1)
    monkeypatch.setattr(layout, "pick", pick)
    assert layout.pays(gpu, recorded=False) == (fastest == "last")


def test_kernels_that_fail_or_compute_something_else_are_not_used(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise = layout.normalise
    monkeypatch.setattr(layout, "pick", lambda key, make_ways: "last")
    assert layout.pays(gpu, recorded=True)
    layout.pays.cache_clear()
    monkeypatch.setattr(layout, "normalise", lambda norm, plain, hidden: 1.1 * plain(hidden))
    assert not layout.pays(gpu, recorded=True)
    layout.pays.cache_clear()
    monkeypatch.setattr(layout, "normalise", normalise)
    assert layout.pays(gpu, recorded=True)  # a failure is nothing to remember
    layout.pays.cache_clear()
    monkeypatch.setattr(layout, "normalise", lambda norm, plain, hidden: 1 / 0)
    assert not layout.pays(gpu, recorded=True)


@pytest.mark.usefixtures("new_machine")
def test_where_pytorchs_own_was_faster_ours_are_not_even_tried(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "TIMES", 1)
    monkeypatch.setattr(choice, "_measure", lambda ways: "first")
    assert not layout.pays(gpu, recorded=False)
    layout.pays.cache_clear()
    monkeypatch.setattr(layout, "block", lambda device: pytest.fail("tried"))
    assert not layout.pays(gpu, recorded=False)


@on_gpu
def test_outputs_and_gradients_differ_by_rounding_and_lie_with_channels_last() -> None:
    features = torch.randn(2, 32, 8, 8, device="cuda").bfloat16()
    wanted = layout.there_and_back(make_layers("cuda"), features)
    layers = make_layers("cuda")
    turn_weights(layers)
    layout.keep_last(layers)
    found = layout.there_and_back(layers, features)  # channels first: it is turned by the first normalisation
    assert found[0].is_contiguous(memory_format=LAST)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@on_gpu
def test_under_autocast_float32_features_are_normalised_in_bfloat16_and_without_it_in_float32() -> None:
    norm, features = nn.GroupNorm(4, 32).cuda(), torch.randn(2, 32, 8, 8, device="cuda")
    undo = layout.keep_last(norm)
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(features).dtype is torch.bfloat16
    plain = norm(features)
    undo()
    assert torch.equal(plain, norm(features))
