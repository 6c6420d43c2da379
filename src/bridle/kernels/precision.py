"""bfloat16 or float32: which of them this machine computes faster in."""

import hashlib
import os
from typing import Any, Literal

import torch
from torch.nn import functional as F

from bridle.kernels.choice import pick
from bridle.kernels.machine import instructions

Precision = Literal["bf16", "fp32"]
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TIMES = 4


def choose_precision(
    wanted: Precision | Literal["auto"], device: torch.device, weights: torch.dtype = torch.float32
) -> Precision:
    """What to compute in, where "auto" is the faster.

    A processor without instructions for bfloat16 takes up to a dozen times as long in it as in float32, and does not
    say so: a convolution is measured, once per machine, and the answer kept. GPUs are asked.

    Args:
        weights: what the base's are kept in: with bfloat16 ones nothing but bfloat16 is computed.
    """
    if wanted != "auto":
        return wanted
    if weights is torch.bfloat16:
        return "bf16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    fastest = pick(("precision", *can_do()), lambda: {name: convolution(kind) for name, kind in TYPES.items()})
    return "bf16" if fastest == "bf16" else "fp32"


def can_do() -> tuple[str, ...]:
    """What instructions PyTorch and oneDNN may use: another machine of the same name may have others."""
    digest = hashlib.sha256(instructions().encode()).hexdigest()[:8]
    return torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""), digest


def convolution(kind: torch.dtype) -> Any:
    """One of the size that a small base has most of, with channels last, there and back.

    A few times: the answer is kept for good, and is not to hang on one moment in which something else took the core.
    """

    def last(*shape: int) -> torch.Tensor:
        tensor = torch.full(shape, 0.01, dtype=kind, device="cpu")
        return tensor.contiguous(memory_format=torch.channels_last).requires_grad_()

    def once() -> None:
        # Whoever asks may be drawing without gradients, or under an autocast that would make both ways the same.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            hidden, weight = last(8, 128, 16, 16), last(128, 128, 3, 3)
            for _ in range(TIMES):
                output = F.conv2d(hidden, weight, padding=1)
                torch.autograd.grad(output, (hidden, weight), output.detach())

    return once
