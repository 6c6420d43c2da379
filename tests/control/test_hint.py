"""A hint that does not fit is refused with what it is, what was expected and what to do; one that fits arrives."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bridle.control.hint import build_hint_encoder, check_hint, official_channels, to_hint, to_mask
from bridle.errors import ConfigError, HintError


@pytest.mark.parametrize(
    ("hint", "channels", "said"),
    [
        (torch.zeros(1, 2, 8, 8), 3, ["2 channels", "made for 3", "hint_channels=2"]),
        (np.zeros((8, 8, 1), np.uint8), 3, ["1 channels", "made for 3", "hint of 3"]),
        (torch.zeros(8, 8), 1, ["shape [8, 8]", "expected [batch, 1, height, width]"]),
        (torch.full((1, 1, 8, 8), -1.0), 1, ["[-1, -1]", "expected [0, 1]", "add 1 and halve it"]),
        (torch.full((1, 1, 8, 8), 255), 1, ["[255, 255]", "expected [0, 1]", "divide by 255"]),
        (torch.full((1, 1, 8, 8), float("nan")), 1, ["[nan, nan]", "expected [0, 1]"]),
        (torch.zeros(1, 1, 0, 8), 1, ["shape [1, 1, 0, 8]", "no pixels at all", "give a picture"]),
        (np.zeros((8, 8, 3), np.float32), 3, ["float32", "expected uint8", "tensor in [0, 1]"]),
        ("edges.png", 3, ["is a str", "expected a PIL image"]),
    ],
)
def test_a_hint_that_does_not_fit_is_refused(hint: Any, channels: int, said: list[str]) -> None:
    with pytest.raises(HintError) as raised:
        to_hint(hint, channels)
    assert [part for part in said if part not in str(raised.value)] == []


@pytest.mark.parametrize("mask", [np.zeros((8, 16, 3), np.uint8), torch.zeros(3, 8, 16), torch.zeros(2, 3, 8, 16)])
def test_a_mask_of_several_channels_is_refused_as_a_mask(mask: Any) -> None:
    with pytest.raises(HintError) as raised:
        to_mask(mask)
    assert str(raised.value).startswith(f"mask has shape {list(mask.shape)}; expected one channel")


def test_a_mask_is_a_hint_of_one_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    for mask in (pixels, pixels[..., None], Image.fromarray(pixels)):
        assert torch.equal(to_mask(mask), to_hint(pixels, 1))
    assert torch.equal(to_mask(to_hint(pixels, 1)), to_hint(pixels, 1))


def test_a_hint_of_another_size_than_the_picture_is_refused() -> None:
    with pytest.raises(HintError, match=r"16x8 px; the picture asks for 64x32 px: resize"):
        check_hint(torch.zeros(1, 3, 8, 16), 3, (32, 64))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_pixels_arrive_in_their_places(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 16, channels), dtype=np.uint8)
    tensor = to_hint(pixels, channels)
    assert tensor.shape == (2, channels, 8, 16)
    assert tensor.dtype == torch.float32
    assert tensor[1, channels - 1, 5, 9].item() == pytest.approx(pixels[1, 5, 9, channels - 1] / 255)
    assert torch.equal(to_hint(tensor, channels), tensor)
    assert torch.equal(to_hint(pixels[0], channels), tensor[:1])


def test_a_picture_and_its_array_are_the_same_hint() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    assert torch.equal(to_hint(Image.fromarray(pixels), 3), to_hint(pixels, 3))
    assert torch.equal(to_hint(Image.fromarray(pixels[..., 0]), 1), to_hint(pixels[..., 0], 1))


def test_a_grey_picture_serves_as_three_equal_channels() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    assert torch.equal(to_hint(grey, 3), to_hint(np.stack([grey] * 3, -1), 3))
    assert torch.equal(to_hint(Image.fromarray(grey), 3), to_hint(grey, 3))


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["official", "paper"])
def test_features_have_the_size_of_the_latents_and_start_at_zero(kind: Any, factor: int) -> None:
    encoder = build_hint_encoder(kind, hint_channels=2, channels_out=24, size_factor=factor)
    features = encoder(torch.rand(3, 2, 6 * factor, 4 * factor))
    assert features.shape == (3, 24, 6, 4)
    assert not features.any()


def test_the_official_widths_are_those_of_the_released_models_at_eight_pixels_per_latent() -> None:
    assert official_channels(8) == (16, 32, 96, 256)


def test_the_paper_encoder_is_four_gaussian_4x4_convolutions_with_relu() -> None:
    layers = list(build_hint_encoder("paper", 3, 320, 8).children())
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(4, 4)] * 4 + [(1, 1)]
    assert [conv.out_channels for conv in convolutions] == [16, 32, 64, 128, 320]
    assert [conv.stride for conv in convolutions] == [(2, 2)] * 3 + [(1, 1)] * 2
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in layers) == 4


def test_an_encoder_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'offical'; expected 'official' or 'paper'"):
        build_hint_encoder("offical", 3, 32, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0, 3, 32])
def test_a_factor_that_no_encoder_can_reach_is_refused(factor: int) -> None:
    with pytest.raises(ConfigError, match=rf"size factor {factor} .* expected 1, 2, 4, 8 or 16"):
        build_hint_encoder("official", 3, 32, factor)
