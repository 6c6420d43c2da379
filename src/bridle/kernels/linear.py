"""Linear layers in bfloat16 that cast their weight once a step, and keep their input only where it is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels.working import BF16, cast, sum_rows


def project(linear: nn.Linear, hidden: Tensor) -> Tensor:
    """Stands in for a linear layer's `forward`: [..., C] to [..., D], bfloat16."""
    hidden = hidden.to(BF16)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or linear.weight.requires_grad):
        return F.linear(hidden, cast(linear, "weight", forward=True), cast(linear, "bias", forward=True))
    output: Tensor = Linear.apply(hidden, linear.weight, linear.bias, linear)
    return output


class Linear(Function):
    """The same, with gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, linear: nn.Linear) -> Any:
        ctx.linear = linear
        ctx.save_for_backward(hidden if weight.requires_grad else None)
        return F.linear(hidden, cast(linear, "weight", forward=True), cast(linear, "bias", forward=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,), linear = ctx.saved_tensors, ctx.linear
        gradient = gradient.to(BF16)
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_hidden = gradient @ cast(linear, "weight")
        if ctx.needs_input_grad[1]:
            for_weight = (rows.t() @ hidden.reshape(-1, hidden.shape[-1])).to(linear.weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = sum_rows(rows).to(linear.bias.dtype)
        return for_hidden, for_weight, for_bias, None
