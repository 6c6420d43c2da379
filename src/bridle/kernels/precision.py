"""bfloat16 or float32: which of them this machine computes faster in."""

from typing import Any, Literal

import torch
from torch.nn import functional as F

from bridle.kernels.choice import pick

Precision = Literal["bf16", "fp32"]
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TIMES = 4


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """What to compute in, where "auto" is the faster.

    A processor without instructions for bfloat16 takes up to a dozen times as long in it as in float32, and does not
    say so: a convolution is measured, once per machine, and the answer kept. GPUs are asked.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    fastest = pick(("precision",), lambda: {name: convolution(kind) for name, kind in TYPES.items()})
    return "bf16" if fastest == "bf16" else "fp32"


def convolution(kind: torch.dtype) -> Any:
    """One of the size that a small base has most of, with channels last, there and back.

    A few times: the answer is kept for good, and is not to hang on one moment in which something else took the core.
    """
    hidden = torch.ones(8, 128, 16, 16).to(kind).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.full((128, 128, 3, 3), 0.01).to(kind).contiguous(memory_format=torch.channels_last).requires_grad_()

    def once() -> None:
        with torch.enable_grad():
            for _ in range(TIMES):
                output = F.conv2d(hidden, weight, padding=1)
                torch.autograd.grad(output, (hidden, weight), output.detach())

    return once
