"""Winograd's convolutions round little more than PyTorch's own, at every edge and on any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from bridle.kernels import winograd

LAST, BF16 = torch.channels_last, torch.bfloat16
OFF = {torch.float32: 1.5e-6, BF16: 0.007}
WEIGHT_OFF = {torch.float32: 3e-6, BF16: 0.007}
TIMES = {torch.float32: 3, BF16: 3.5}  # as much as PyTorch rounds off
pytestmark = pytest.mark.skipif(winograd.library(BF16) is None, reason="no C compiler here")
SHAPES = [
    # samples, in, out, height, width
    (2, 5, 7, 9, 6),
    (1, 3, 16, 1, 1),
    (3, 20, 33, 4, 13),
    (24, 32, 48, 16, 16),  # more tiles than are worked on at once
]


def deviation(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", OFF)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape: tuple[int, ...], kind: torch.dtype, threads: int) -> None:
    samples, channels, out, height, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(samples, channels, height, width).to(kind, memory_format=LAST)
    weight, bias = torch.randn(out, channels, 3, 3).to(kind), torch.randn(out).to(kind)
    exact = F.conv2d(hidden.double(), weight.double(), bias.double(), padding=1)
    found = winograd.forward(hidden, winograd.form(weight), bias)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=LAST)
    assert found.dtype is kind
    assert deviation(found, exact) < OFF[kind]
    assert torch.equal(winograd.forward(hidden, winograd.form(weight), bias), found)


@pytest.mark.parametrize("kind", WEIGHT_OFF)
@pytest.mark.parametrize("most", [1, winograd.MOST_SUMMED])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_weight_gradient_is_the_convolutions(
    shape: tuple[int, ...], most: int, kind: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "MOST_SUMMED", most)
    samples, channels, out, height, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(samples, channels, height, width).to(kind, memory_format=LAST)
    gradient = torch.randn(samples, out, height, width).to(kind, memory_format=LAST)
    weight = torch.zeros(out, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(F.conv2d(hidden.double(), weight, padding=1), weight, gradient.double())
    assert deviation(winograd.weight_gradient(gradient, hidden), exact) < WEIGHT_OFF[kind]


@pytest.mark.parametrize("kind", OFF)
@pytest.mark.parametrize("channels", [64, 640])
def test_what_is_rounded_off_is_little_more_than_pytorch_rounds_off(channels: int, kind: torch.dtype) -> None:
    """In float32 with the usual points it would be three to four times as much."""
    torch.manual_seed(0)
    hidden = torch.randn(4, channels, 16, 16).to(kind, memory_format=LAST)
    weight = torch.randn(64, channels, 3, 3).to(kind)
    exact = F.conv2d(hidden.double(), weight.double(), padding=1)
    theirs = deviation(F.conv2d(hidden, weight, padding=1), exact)
    assert deviation(winograd.forward(hidden, winograd.form(weight), None), exact) < TIMES[kind] * theirs


@pytest.mark.parametrize("kind", OFF)
def test_what_is_no_number_stays_none(kind: torch.dtype) -> None:
    hidden = torch.ones(1, 16, 8, 8).to(kind, memory_format=LAST)
    hidden[0, 3, 2, 5] = torch.nan
    found = winograd.forward(hidden, winograd.form(torch.ones(16, 16, 3, 3, dtype=kind)), None)
    assert found[0, :, 2, 5].isnan().all()
    assert winograd.weight_gradient(hidden, hidden).isnan().any()
