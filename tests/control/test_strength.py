"""A strength says by how much each link is multiplied in each step, and refuses what makes no sense."""

from typing import Any

import numpy as np
import pytest
import torch

from bridle.control.residuals import Residuals
from bridle.control.strength import PRESETS, Strength
from bridle.errors import ConfigError

SIDES = (16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2)  # of the links of latents of 16x16
LINKS = Residuals(tuple(torch.ones(1, 1, side, side) for side in SIDES))


def factors(strength: Strength, factor: float = 1.0) -> list[float]:
    """What every link of ones has become."""
    return [link.unique().item() for link in strength.apply(LINKS, factor, 16).links]


def test_guess_mode_has_the_weights_of_its_three_definitions() -> None:
    assert factors(Strength(weights="official")) == pytest.approx([0.825**power for power in range(12, -1, -1)])
    assert factors(Strength(weights="diffusers")) == torch.logspace(-1, 0, 13).tolist()
    assert factors(Strength(weights="paper")) == [16 / side for side in SIDES]
    assert factors(Strength(weights="even"), 0.5) == [0.5] * 13
    assert set(PRESETS) == {"even", "official", "diffusers", "paper"}


def test_links_that_are_tokens_weigh_alike_in_the_papers_definition() -> None:
    tokens = Residuals((torch.ones(1, 64, 8),) * 2, grid=(8, 8))
    assert Strength(weights="paper").apply(tokens, 1.0, 16).links[0].unique().item() == 1


def test_weights_of_ones_own_multiply_with_the_factor_and_must_be_as_many_as_links() -> None:
    weights = tuple(float(index) for index in range(13))
    assert factors(Strength(weights=weights), 0.5) == [0.5 * weight for weight in weights]
    with pytest.raises(ConfigError, match="2 scales for 13 links"):
        factors(Strength(weights=(1.0, 0.0)))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 2.0), (0.25, 2.0), (0.375, 1.5), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0)]
)
def test_keyframes_run_straight_from_one_to_the_next_stay_at_the_ends_and_may_jump(
    share: float, expected: float
) -> None:
    keyframes = ((0.25, 2.0), (0.5, 1.0), (0.5, 0.0), (1.0, 1.0))
    assert Strength(keyframes=keyframes).at(share, 1.0) == pytest.approx(expected)
    assert Strength(keyframes=keyframes, scale=0.5).at(share, 1.0) == pytest.approx(0.5 * expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_numbers_may_be_numpys(kind: Any) -> None:
    def strength(kind: Any) -> Strength:
        return Strength(scale=kind(3), end=kind(1), weights=(kind(2),) * 13, keyframes=((kind(0), kind(1)),))

    assert strength(kind) == strength(float)
    assert factors(strength(kind), strength(kind).at(0.0, 0.5)) == [6.0] * 13


def test_a_step_counts_where_all_of_it_lies_between_start_and_end() -> None:
    strength = Strength(start=0.25, end=0.75, scale=3.0)
    assert [strength.at(step / 8, (step + 1) / 8) for step in range(8)] == [0, 0, 3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": float("nan")}, "scale is nan; expected one number"),
        ({"scale": (1.0, 2.0)}, "factors per link go to weights"),
        ({"start": 0.8, "end": 0.2}, "from 0.8 to 0.2; expected 0 <= start <= end <= 1"),
        ({"weights": "offical"}, "weights are 'offical'; expected one of even, official, diffusers, paper"),
        ({"weights": ()}, "expected one number per link"),
        ({"weights": (1.0, float("inf"))}, "expected one number per link"),
        ({"keyframes": ((0.5, 1.0), (0.2, 0.0))}, "keyframes are .* in rising order"),
        ({"keyframes": ((1.5, 1.0),)}, "shares from 0 to 1"),
        ({"half": "cond"}, "half is 'cond'; expected one of both, conditional, unconditional"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Strength(**values)
