"""Moments in 8 bits: the codes are the nearest of bitsandbytes' type, and the loop is AdamW but for their rounding."""

import pytest
import torch
from torch import Tensor

from bridle.kernels import eight_bit, native
from bridle.kernels.eight_bit import BLOCK, dequantize, quantize, shares

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.01


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_what_bitsandbytes_has_them_stand_for(signed: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional").create_dynamic_map(signed=signed)
    torch.testing.assert_close(shares(signed), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_come_back_as_what_their_codes_stand_for(signed: bool) -> None:
    numbers = spread_out(1000).abs() if not signed else spread_out(1000)
    codes, largest = quantize(numbers, signed=signed)
    again, same = quantize(dequantize(codes, largest, signed=signed), signed=signed)
    assert codes.dtype is torch.uint8
    assert len(largest) == 4
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, largest, rtol=0.01, atol=0)  # -1 has no code


def spread_out(count: int) -> Tensor:
    """Over many decades, of both signs."""
    torch.manual_seed(0)
    return torch.randn(count) * 10 ** (-8 * torch.rand(count))


class Moments:
    """What the loop keeps of a weight, from zero."""

    def __init__(self, count: int) -> None:
        parts = (quantize(torch.zeros(count), signed=signed) for signed in (True, False))
        (self.first, self.largest_first), (self.second, self.largest_second) = parts

    def step(self, weight: Tensor, gradient: Tensor, taken: int, cast: Tensor | None = None, scale: float = 1) -> None:
        corrected, root = 1 / (1 - BETAS[0] ** taken), (1 - BETAS[1] ** taken) ** -0.5
        moments = self.first, self.second, self.largest_first, self.largest_second
        eight_bit.adamw(weight, gradient, *moments, cast, scale, LR, *BETAS, EPS, DECAY, corrected, root)

    def __iter__(self) -> object:
        return iter((self.first, self.largest_first, self.second, self.largest_second))


def expected_step(weight: Tensor, gradient: Tensor, kept: Moments, taken: int) -> tuple[Tensor, Tensor, Tensor]:
    """The new weight and both moments, in PyTorch, from what is kept."""
    first = dequantize(kept.first, kept.largest_first, signed=True) * BETAS[0] + gradient * (1 - BETAS[0])
    second = dequantize(kept.second, kept.largest_second, signed=False) * BETAS[1] + gradient**2 * (1 - BETAS[1])
    root = (second / (1 - BETAS[1] ** taken)).sqrt() + EPS
    return weight * (1 - LR * DECAY) - LR / (1 - BETAS[0] ** taken) * first / root, first, second


@needs_compiler
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("count", [BLOCK, 40 * BLOCK + 7])
def test_a_step_is_adamws_and_keeps_the_nearest_codes(count: int, halved: bool) -> None:
    kept, weight, cast = Moments(count), torch.randn(count), torch.empty(count, dtype=torch.bfloat16)
    for taken in range(1, 6):
        gradient = spread_out(count).bfloat16() if halved else spread_out(count)
        wanted, first, second = expected_step(weight, gradient.float() * 0.5, kept, taken)
        kept.step(weight, gradient, taken, cast, 0.5)
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(cast, weight.bfloat16())
        for found, numbers, signed in ((kept.first, first, True), (kept.second, second, False)):
            codes, _ = quantize(numbers, signed=signed)
            off = (codes.int() - found.int()).abs()
            assert off.max() <= 1  # half way between two codes either is right
            assert (off > 0).float().mean() < 1e-3


@needs_compiler
def test_what_is_not_zero_stays_so_where_it_is_divided_by() -> None:
    kept, gradient = Moments(BLOCK), torch.full((BLOCK,), 1e-9)
    gradient[0] = 1.0
    kept.step(torch.zeros(BLOCK), gradient, 1)
    assert (kept.second > 0).all()
    assert (quantize(gradient**2, signed=False)[0] > 0).all()


@needs_compiler
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_gradients_that_are_nothing_leave_moments_that_are_numbers(size: float) -> None:
    kept, weight = Moments(2 * BLOCK), torch.ones(2 * BLOCK)
    for taken in range(1, 4):
        kept.step(weight, torch.full((2 * BLOCK,), size), taken)
    moments = (dequantize(kept.first, kept.largest_first, signed=True), *kept)
    assert all(part.float().isfinite().all() for part in moments)
    torch.testing.assert_close(weight, torch.full_like(weight, (1 - LR * DECAY) ** 3))
