"""Group normalisation with channels last on a GPU. Without one Triton's interpreter runs it, where Triton is there."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from bridle.kernels import triton_norm  # noqa: E402 - how Triton runs is decided when it is imported

# One program for a group and many; groups of one channel; channels that fill no power of two.
SHAPES = [(2, 320, 8, 8), (1, 64, 40, 33), (3, 96, 5, 7), (2, 1280, 2, 2), (1, 32, 100, 170)]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_group_normalisations(shape: Any, kind: torch.dtype, mean: float) -> None:
    torch.manual_seed(0)
    norm, exact = (nn.GroupNorm(32, shape[1], eps=1e-6, device=DEVICE) for _ in range(2))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    exact.load_state_dict(norm.state_dict())
    exact.double()
    hidden, gradient = (torch.randn(shape, device=DEVICE).to(kind) for _ in range(2))
    hidden = (hidden + mean).contiguous(memory_format=torch.channels_last)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    normal, middle, inverse = triton_norm.forward(hidden, norm)
    found = triton_norm.backward(gradient, hidden, middle, inverse, norm, True)
    given = hidden.double().requires_grad_()
    output = exact(given)
    wanted = torch.autograd.grad(output, [given, *exact.parameters()], gradient.double())
    rounding = 5e-3 if kind is torch.bfloat16 else 1e-6
    assert normal.dtype is found[0].dtype is kind
    assert normal.is_contiguous(memory_format=torch.channels_last)
    assert off(normal, output.detach()) < rounding
    assert off(found[0], wanted[0]) < rounding
    assert off(found[1], wanted[1]) < 5e-6
    assert off(found[2], wanted[2]) < 5e-6
