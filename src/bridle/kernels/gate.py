"""The gated activation of a transformer block: one half of its features times the GELU of the other."""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bridle.kernels import native


def gate(module: GEGLU, hidden: Tensor) -> Tensor:
    """Stands in for the module's `forward`: [..., C] to [..., D], in the input's type."""
    projected = module.proj(hidden).to(hidden.dtype).contiguous()
    output: Tensor = Gate.apply(projected) if torch.is_grad_enabled() else native.geglu(projected)
    return output


class Gate(Function):
    """The activation of what was projected, [..., 2 * D], with gradients."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Any:
        ctx.save_for_backward(projected)
        return native.geglu(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (projected,) = ctx.saved_tensors
        return native.geglu_backward(gradient.to(projected.dtype).contiguous(), projected)
