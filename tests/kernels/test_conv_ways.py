"""Every way to compute a convolution gives what PyTorch gives in float64, within the rounding of its type."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.kernels import conv as kernels
from bridle.kernels import outer
from bridle.kernels.packed import packs

BF16, LAST = torch.bfloat16, torch.channels_last
OFF = {BF16: 0.006, torch.float32: 2e-6}
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
    return ((found.double() - expected).norm() / expected.norm()).item()


class Case:
    """A convolution, an input, and what autograd gives in float64."""

    def __init__(self, shape: tuple[int, ...], kind: torch.dtype = BF16) -> None:
        channels, out, size, kernel, stride, padding = shape
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding).to(memory_format=LAST)
        self.spec = kernels.Spec(self.conv)
        exact = copy.deepcopy(self.conv).double()
        hidden = torch.randn(3, channels, size, size, dtype=torch.float64).to(kind).double().requires_grad_()
        self.output = exact(hidden)
        gradient = torch.randn_like(self.output).to(kind).double()
        self.for_input, self.for_weight = torch.autograd.grad(self.output, (hidden, exact.weight), gradient)
        self.hidden = hidden.detach().to(kind).to(memory_format=LAST)
        self.gradient = gradient.to(kind).to(memory_format=LAST)
        self.size, self.kind = size, kind

    def by(self, what: str, name: str, *args: Any) -> Tensor:
        way = {"forward": kernels.FORWARD, "input": kernels.INPUT}[what][name]
        if way.packs and not (self.kind is BF16 and packs()):
            pytest.skip("this processor, PyTorch or type is not packed for")
        if way.planes and not kernels.filters(self.spec, args[0]):
            pytest.skip("not a convolution for Winograd's way")
        form = way.form(self.conv.weight.detach().to(self.kind), self.spec, args[0].shape)
        return way.compute(args[0], form, self.spec, *args[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.FORWARD)
@pytest.mark.parametrize("kind", OFF)
def test_forward(shape: tuple[int, ...], name: str, kind: torch.dtype) -> None:
    case = Case(shape, kind)
    assert deviation(case.by("forward", name, case.hidden), case.output) < OFF[kind]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.INPUT)
@pytest.mark.parametrize("kind", OFF)
def test_gradient_of_the_input(shape: tuple[int, ...], name: str, kind: torch.dtype) -> None:
    if shape[4] > 1 and not kernels.INPUT[name].strides:
        pytest.skip("a strided convolution's transpose is none")
    case = Case(shape, kind)
    found = case.by("input", name, case.gradient, case.size, case.size)
    assert found.shape == case.for_input.shape
    assert deviation(found, case.for_input) < OFF[kind]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", kernels.WEIGHT_WAYS)
@pytest.mark.parametrize("kind", OFF)
def test_gradient_of_the_weight(shape: tuple[int, ...], name: str, kind: torch.dtype) -> None:
    case = Case(shape, kind)
    if name == "winograd" and not kernels.filters(case.spec, case.hidden):
        pytest.skip("not a convolution for Winograd's way")
    found = kernels.WEIGHT_WAYS[name](case.gradient, case.hidden, case.spec)
    assert deviation(found, case.for_weight) < OFF[kind]


@pytest.mark.parametrize("name", kernels.INPUT)
@pytest.mark.parametrize("kind", OFF)
def test_only_the_wanted_channels_get_a_gradient(name: str, kind: torch.dtype) -> None:
    case = Case(SHAPES[0], kind)
    case.spec.channels = 5
    found = case.by("input", name, case.gradient, case.size, case.size)
    assert found.shape[1] == 5
    assert deviation(found, case.for_input[:, :5]) < OFF[kind]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 3, padding=3),
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
