"""Linear layers in bfloat16 that cast their weight once a step, and keep their input only where it is trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels.choice import pick
from bridle.kernels.packed import multiply_packed, pack_rows, packs
from bridle.kernels.working import BF16, Form, cast, gradient_type, sum_rows, working


class Spec:
    """One linear layer. Args: fixed: whether its weight stays as it is for long, so that it is worth packing."""

    def __init__(self, linear: nn.Linear, *, fixed: bool = False) -> None:
        self.linear, self.fixed = linear, fixed

    @property
    def trained(self) -> bool:
        """Whether the weight will be another one in the next step."""
        return self.linear.weight.requires_grad and not self.fixed


def project(spec: Spec, hidden: Tensor) -> Tensor:
    """Stands in for a linear layer's `forward`: [..., C] to [..., D], bfloat16."""
    hidden, linear = hidden.to(BF16), spec.linear
    if not torch.is_grad_enabled() or not (hidden.requires_grad or linear.weight.requires_grad):
        return forward(hidden, spec)
    output: Tensor = Linear.apply(hidden, linear.weight, linear.bias, spec)
    return output


def forward(hidden: Tensor, spec: Spec) -> Tensor:
    linear, rows = spec.linear, hidden.reshape(-1, hidden.shape[-1])
    output = multiply("linear", rows, linear.weight, cast(linear, "bias"), spec, as_it_is)
    return output.unflatten(0, hidden.shape[:-1])


def multiply(what: str, rows: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec, turn: Form) -> Tensor:
    """[N, C] to [N, D], with a packed weight where it is not trained. Args: turn: the weight in bfloat16 to [D, C]."""
    forms = working(spec.linear, "weight")
    if spec.trained or not packs():
        return F.linear(rows, turn(forms.get(weight, "cast", as_it_is)), bias)
    packed = forms.get(weight, f"packed {what}", lambda weight: pack_rows(turn(weight), len(rows)))
    return multiply_packed(rows, packed, bias)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """[N, D] and [N, C] to [D, C], the sum over rows of their products, by the faster of two ways."""
    ways = {"plain": lambda: left.t() @ right, "turned": lambda: left.t().contiguous() @ right}
    return ways[pick(("outer", *left.shape, right.shape[1]), lambda: ways)]()


def as_it_is(weight: Tensor) -> Tensor:
    return weight


class Linear(Function):
    """The same, with gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Any:
        ctx.spec = spec
        ctx.save_for_backward(hidden if weight.requires_grad else None)
        return forward(hidden, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,), linear = ctx.saved_tensors, ctx.spec.linear
        gradient = gradient.to(BF16)
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            found = multiply("linear_input", rows, linear.weight, None, ctx.spec, Tensor.t)
            for_hidden = found.unflatten(0, gradient.shape[:-1])
        if ctx.needs_input_grad[1]:
            for_weight = outer(rows, hidden.reshape(-1, hidden.shape[-1])).to(gradient_type(linear.weight))
        if ctx.needs_input_grad[2]:
            for_bias = sum_rows(rows).to(linear.bias.dtype)
        return for_hidden, for_weight, for_bias, None
