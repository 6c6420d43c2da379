"""Linear layers in bfloat16 that cast their weight once a step, and keep their input only where it is trained."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels.outer import outer
from bridle.kernels.packed import multiply_packed, pack_rows, packs
from bridle.kernels.working import BF16, Form, Layer, gradient_type, identity, learns, sum_rows


def project(layer: Layer, hidden: Tensor) -> Tensor:
    """Stands in for a linear layer's `forward`: [..., C] to [..., D], bfloat16."""
    linear = layer.module
    if not learns(hidden, linear.weight, linear.bias):
        return forward(hidden, layer)
    output: Tensor = Linear.apply(hidden, linear.weight, linear.bias, layer)
    return output


def forward(hidden: Tensor, layer: Layer) -> Tensor:
    output = multiply("forward", hidden.reshape(-1, hidden.shape[-1]), layer.bias(), layer, identity)
    return output.unflatten(0, hidden.shape[:-1])


def multiply(what: str, rows: Tensor, bias: Tensor | None, layer: Layer, turn: Form) -> Tensor:
    """[N, C] to [N, D], with a packed weight where it lasts. Args: turn: the weight in bfloat16 to [D, C]."""
    if not layer.lasts or not packs():
        return F.linear(rows, turn(layer.form("cast", identity)), bias)
    packed = layer.form(f"packed {what}", lambda weight: pack_rows(turn(weight), len(rows)))
    return multiply_packed(rows, packed, bias)


class Linear(Function):
    """The same, with gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Any:
        ctx.layer = layer
        ctx.save_for_backward(hidden if weight.requires_grad else None)
        return forward(hidden, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,), linear = ctx.saved_tensors, ctx.layer.module
        gradient = gradient.to(BF16)
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            found = multiply("input", rows, None, ctx.layer, Tensor.t)
            for_hidden = found.unflatten(0, gradient.shape[:-1])
        if ctx.needs_input_grad[1]:
            for_weight = outer(rows, hidden.reshape(-1, hidden.shape[-1])).to(gradient_type(linear.weight))
        if ctx.needs_input_grad[2]:
            for_bias = sum_rows(rows).to(linear.bias.dtype)
        return for_hidden, for_weight, for_bias, None
