"""Residuals can be scaled, masked and summed, link by link."""

import pytest
import torch

from bridle.control.residuals import Residuals
from bridle.errors import ConfigError

SIZES = (8, 8, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1)


def make(seed: int) -> Residuals:
    generator = torch.Generator().manual_seed(seed)
    down = tuple(torch.randn(2, 4, size, size, generator=generator) for size in SIZES)
    return Residuals((*down, torch.randn(2, 4, 1, 1, generator=generator)))


def equal(left: Residuals, right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.links, right, strict=True))


def test_one_number_scales_every_link() -> None:
    residuals = make(0)
    assert equal(residuals.scaled(0.5), [link * 0.5 for link in residuals.links])


def test_thirteen_numbers_scale_their_links_the_middle_last() -> None:
    residuals, scales = make(0), [float(index) for index in range(13)]
    scaled = residuals.scaled(scales)
    assert equal(scaled, [link * scale for link, scale in zip(residuals.links, scales, strict=True)])
    assert torch.equal(scaled.mid, residuals.mid * 12)


@pytest.mark.parametrize("count", [0, 12, 14])
def test_another_number_of_scales_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} scales for 13 links; give one number, or one per link"):
        make(0).scaled([1.0] * count)


def test_a_mask_is_zero_outside_and_averaged_on_its_border() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :20] = 1  # 2.5 cells of 8 at the first links, 0.3125 of the whole at the last
    residuals = make(0)
    masked = residuals.masked(mask)
    first = residuals.down[0]
    assert torch.equal(masked.down[0][..., :2], first[..., :2])
    assert torch.allclose(masked.down[0][..., 2], first[..., 2] * 0.5)
    assert not masked.down[0][..., 3:].any()
    assert torch.allclose(masked.mid, residuals.mid * 0.3125)


def test_each_picture_has_a_mask_of_its_own() -> None:
    residuals = make(0)
    masked = residuals.masked(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 64, 64))
    assert not any(link[0].any() for link in masked.links)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(masked.links, residuals.links, strict=True))


def test_a_link_that_is_not_connected_stays_zero_whatever_is_done_to_it() -> None:
    whole = make(0)
    middle = Residuals((*(torch.zeros(1, 1, 1, 1) for _ in SIZES), whole.mid))
    changed = middle.scaled(2.0).masked(torch.ones(1, 1, 64, 64))
    assert not any(link.any() for link in changed.down)
    assert equal(whole + middle, [*whole.down, whole.mid + whole.mid])


def test_controls_are_summed_link_by_link() -> None:
    left, right = make(0), make(1)
    assert equal(left + right, [a + b for a, b in zip(left.links, right.links, strict=True)])
