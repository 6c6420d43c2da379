"""Products with weights in the layout that the processor multiplies by: bfloat16 on a CPU.

oneDNN rearranges a weight at every call, unless it is given one that was rearranged before. Where there are many
channels and few pixels that takes several times as long as the product. A weight that does not change is rearranged
once; that takes as much memory again as the weight in bfloat16.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NO_EPILOGUE = ("none", [], "")  # oneDNN could also apply an activation


def pack_filters(weight: Tensor, stride: int, padding: int, shape: Sequence[int]) -> Tensor:
    """[D, C, k, k] for inputs of a shape [B, C, H, W]; others do as well."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its types leave the last argument out
    packed: Tensor = reorder(weight.to_mkldnn(), [padding] * 2, [stride] * 2, [1, 1], 1, list(shape))
    return packed


def convolve_packed(hidden: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """[B, C, H, W] to [B, D, H', W'], channels last."""
    numbers = [padding] * 2, [stride] * 2, [1, 1], 1
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(hidden, weight, bias, *numbers, *NO_EPILOGUE)
    return found


def pack_rows(weight: Tensor, count: int) -> Tensor:
    """[D, C] for products with so many rows; others do as well."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), count)
    return packed


def multiply_packed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, C] to [N, D]."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *NO_EPILOGUE)
    return found


@cache
def packs() -> bool:
    """Whether this PyTorch and processor can: neither function is a promise of PyTorch's, so they are tried."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    hidden = torch.ones(1, 32, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    filters, weight = torch.full((32, 32, 3, 3), 0.01).bfloat16(), torch.full((8, 32), 0.01).bfloat16()
    rows, bias = hidden[0, :, 0], torch.ones(32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            convolved = convolve_packed(hidden, pack_filters(filters, 1, 1, hidden.shape), bias, 1, 1)
            near = torch.allclose(convolved, F.conv2d(hidden, filters, bias, 1, 1), atol=0.05)
            multiplied = multiply_packed(rows.t().contiguous(), pack_rows(weight, 4), bias[:8])
            return near and torch.allclose(multiplied, F.linear(rows.t(), weight, bias[:8]), atol=0.05)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
