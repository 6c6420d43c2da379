"""Winograd's convolutions round little more than PyTorch's own, at every edge and on any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from bridle.kernels import winograd

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(winograd.library() is None, reason="no C compiler here")
SHAPES = [
    # samples, in, out, height, width
    (2, 5, 7, 9, 6),
    (1, 3, 16, 1, 1),
    (3, 20, 33, 4, 13),
    (24, 32, 48, 16, 16),  # more tiles than are worked on at once
]


def deviation(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape: tuple[int, ...], threads: int) -> None:
    samples, channels, out, height, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(samples, channels, height, width).to(memory_format=LAST)
    weight, bias = torch.randn(out, channels, 3, 3), torch.randn(out)
    exact = F.conv2d(hidden.double(), weight.double(), bias.double(), padding=1)
    found = winograd.forward(hidden, winograd.form(weight), bias)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=LAST)
    assert deviation(found, exact) < 1.5e-6
    assert torch.equal(winograd.forward(hidden, winograd.form(weight), bias), found)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_weight_gradient_is_the_convolutions(shape: tuple[int, ...], threads: int) -> None:
    samples, channels, out, height, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(samples, channels, height, width).to(memory_format=LAST)
    gradient = torch.randn(samples, out, height, width).to(memory_format=LAST)
    weight = torch.zeros(out, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(F.conv2d(hidden.double(), weight, padding=1), weight, gradient.double())
    assert deviation(winograd.weight_gradient(gradient, hidden), exact) < 3e-6


@pytest.mark.parametrize("channels", [64, 640])
def test_what_is_rounded_off_is_little_more_than_pytorch_rounds_off(channels: int) -> None:
    """With the usual points it would be three to four times as much."""
    torch.manual_seed(0)
    hidden = torch.randn(4, channels, 16, 16).to(memory_format=LAST)
    weight = torch.randn(64, channels, 3, 3)
    exact = F.conv2d(hidden.double(), weight.double(), padding=1)
    theirs = deviation(F.conv2d(hidden, weight, padding=1), exact)
    assert deviation(winograd.forward(hidden, winograd.form(weight), None), exact) < 3 * theirs


def test_what_is_no_number_stays_none() -> None:
    hidden = torch.ones(1, 16, 8, 8).to(memory_format=LAST)
    hidden[0, 3, 2, 5] = torch.nan
    found = winograd.forward(hidden, winograd.form(torch.ones(16, 16, 3, 3)), None)
    assert found[0, :, 2, 5].isnan().all()
    assert winograd.weight_gradient(hidden, hidden).isnan().any()
