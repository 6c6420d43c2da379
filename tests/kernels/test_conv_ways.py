"""Every way to compute a convolution gives what PyTorch gives in float32, within bfloat16's rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.kernels import conv as kernels
from bridle.kernels import outer
from bridle.kernels.packed import packs

LAST = torch.channels_last
SHAPES = [
    # in, out, size, kernel, stride, padding
    (16, 24, 8, 3, 1, 1),
    (16, 24, 8, 1, 1, 0),
    (16, 24, 8, 3, 2, 1),
    (16, 24, 9, 3, 2, 1),
    (16, 24, 8, 3, 2, 0),
    (3, 16, 10, 4, 2, 1),
    (16, 16, 2, 3, 1, 1),
]


def deviation(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


class Case:
    """A convolution, an input, and what autograd gives in float32."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, out, size, kernel, stride, padding = shape
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding).to(memory_format=LAST)
        self.spec = kernels.Spec(self.conv)
        hidden = torch.randn(3, channels, size, size, requires_grad=True)
        self.output = self.conv(hidden)
        gradient = torch.randn_like(self.output)
        self.for_input, self.for_weight = torch.autograd.grad(self.output, (hidden, self.conv.weight), gradient)
        self.hidden = hidden.detach().bfloat16().to(memory_format=LAST)
        self.gradient = gradient.bfloat16().to(memory_format=LAST)
        self.size = size

    def by(self, what: str, name: str, *args: Any) -> Tensor:
        way = {"forward": kernels.FORWARD, "input": kernels.INPUT}[what][name]
        if way.packs and not packs():
            pytest.skip("this processor or PyTorch cannot pack")
        form = way.form(self.conv.weight.detach().bfloat16(), self.spec, args[0].shape)
        return way.compute(args[0], form, self.spec, *args[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.FORWARD)
def test_forward(shape: tuple[int, ...], name: str) -> None:
    case = Case(shape)
    assert deviation(case.by("forward", name, case.hidden), case.output) < 0.006


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.INPUT)
def test_gradient_of_the_input(shape: tuple[int, ...], name: str) -> None:
    if shape[4] > 1 and not kernels.INPUT[name].strides:
        pytest.skip("a strided convolution's transpose is none")
    case = Case(shape)
    found = case.by("input", name, case.gradient, case.size, case.size)
    assert found.shape == case.for_input.shape
    assert deviation(found, case.for_input) < 0.006


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.WEIGHT_WAYS)
def test_gradient_of_the_weight(shape: tuple[int, ...], name: str) -> None:
    case = Case(shape)
    found = kernels.WEIGHT_WAYS[name](case.gradient, case.hidden, case.spec)
    assert deviation(found, case.for_weight) < 0.006


@pytest.mark.parametrize("name", kernels.INPUT)
def test_only_the_wanted_channels_get_a_gradient(name: str) -> None:
    case = Case(SHAPES[0])
    case.spec.channels = 5
    found = case.by("input", name, case.gradient, case.size, case.size)
    assert found.shape[1] == 5
    assert deviation(found, case.for_input[:, :5]) < 0.006


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
    ],
)
def test_other_convolutions_are_left_to_pytorch(conv: nn.Conv2d) -> None:
    assert not kernels.fits(conv)


@pytest.mark.parametrize("name", outer.WAYS)
def test_products_over_rows(name: str) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 30, 20).bfloat16()
    found = outer.WAYS[name](left, right[:, :7])
    assert found.shape == (20, 7)
    assert deviation(found, left.float().t() @ right[:, :7].float()) < 0.006
