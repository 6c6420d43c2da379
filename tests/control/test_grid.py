"""Hints on any grid come down to the features' grid, by the layers of the official encoder where it is a picture's."""

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

from bridle.control.grid import factors_between, grid_encoder, lay_out
from bridle.errors import HintError


@pytest.mark.parametrize(
    "factors", [(1,), (6,), (35,), (1, 1), (8, 8), (4, 6), (1, 14), (22, 5), (1, 2, 2), (4, 3, 1)], ids=str
)
def test_each_axis_shrinks_by_its_factor_and_every_position_counts(factors: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder, coarse = grid_encoder(2, 5, factors), (3, 2, 4)[: len(factors)]
    hint = torch.rand(1, 2, *(a * b for a, b in zip(factors, coarse, strict=True)), requires_grad=True)
    assert encoder(hint).shape == (1, 5, *coarse)
    assert not encoder(hint).any()
    torch.nn.init.ones_(encoder[-1].weight)
    encoder(hint).square().sum().backward()
    assert hint.grad is not None
    assert hint.grad.ne(0).all()


@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_for_pictures_the_layers_are_the_official_ones(halvings: int) -> None:
    ours = grid_encoder(3, 320, (2**halvings,) * 2)
    theirs = ControlNetConditioningEmbedding(320, 3, (16, 32, 96, 256)[: halvings + 1])
    official = [theirs.conv_in, *theirs.blocks, theirs.conv_out]
    layers = [layer for layer in ours if isinstance(layer, torch.nn.Conv2d)]
    assert [(a.in_channels, a.out_channels, a.stride) for a in layers] == [
        (b.in_channels, b.out_channels, b.stride) for b in official
    ]


@pytest.mark.parametrize(
    ("hint", "features", "factors"),
    [((64,), (16,), (4,)), ((32, 16), (8, 16), (4, 1)), ((32, 16), (32,), (4, 4)), ((4, 8, 8), (4, 4, 4), (1, 2, 2))],
)
def test_factors_are_those_between_the_grids_or_one_for_all_tokens(
    hint: tuple[int, ...], features: tuple[int, ...], factors: tuple[int, ...]
) -> None:
    assert factors_between(hint, features) == factors


@pytest.mark.parametrize(("hint", "features"), [((15, 16), (8, 8)), ((8, 8), (16, 16)), ((16, 16), (65,))])
def test_grids_that_are_no_multiples_are_refused(hint: tuple[int, ...], features: tuple[int, ...]) -> None:
    with pytest.raises(HintError, match="expected a whole multiple along each axis"):
        factors_between(hint, features)


def test_tokens_are_the_cells_row_by_row_and_channels_may_come_last() -> None:
    features = torch.arange(12.0).view(1, 2, 2, 3)
    assert lay_out(features, torch.zeros(1, 6, 2), True)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(lay_out(features, torch.zeros(1, 2, 3, 2), True), features.permute(0, 2, 3, 1))
    assert lay_out(features, torch.zeros(1, 2, 2, 3, dtype=torch.bfloat16), False).dtype == torch.bfloat16
    with pytest.raises(HintError, match="hint's features are 1x2x2x3, what they are added to is 1x2x3x2"):
        lay_out(features, torch.zeros(1, 2, 3, 2), False)
