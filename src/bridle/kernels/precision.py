"""bfloat16 or float32: which of them this machine computes faster in."""

import hashlib
import os
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import skip_init

from bridle.errors import ConfigError
from bridle.kernels.choice import pick
from bridle.kernels.machine import instructions
from bridle.kernels.quicken import quicken

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
        weights: what the base's are kept in: with bfloat16 ones nothing but bfloat16 is computed. With those of another
            type than these two it is computed in that: "auto" is then "fp32", for no autocast.

    Raises: ConfigError: float32 is asked for with weights in bfloat16.
    """
    if wanted == "fp32" and weights is torch.bfloat16:
        remedy = "load the base in float32, or set it to 'auto' or 'bf16'"
        raise ConfigError(f"precision is 'fp32', but the base's weights are bfloat16: {remedy}")
    if wanted != "auto":
        return wanted
    if weights is not torch.float32:
        return "bf16" if weights is torch.bfloat16 else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    fastest = pick(("precision", *can_do()), lambda: {name: convolution(kind) for name, kind in TYPES.items()})
    return "bf16" if fastest == "bf16" else "fp32"


def weights_type(precision: Precision, device: torch.device) -> torch.dtype:
    """What weights that nothing trains are best kept in to be computed with.

    On a GPU in bfloat16 themselves: cast at every use they take half a step more memory traffic, and twice the memory.
    For a CPU they are cast or packed once, and what is exact stays float32.
    """
    return TYPES[precision] if device.type == "cuda" else torch.float32


def can_do() -> tuple[str, ...]:
    """What instructions PyTorch and oneDNN may use: another machine of the same name may have others."""
    digest = hashlib.sha256(instructions().encode()).hexdigest()[:8]
    return torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""), digest


def convolution(kind: torch.dtype) -> Any:
    """One of the size that a small base has most of, there and back, as training computes it.

    A few times: the answer is kept for good, and is not to hang on one moment in which something else took the core.
    """

    def once() -> None:
        # Whoever asks may be drawing without gradients, or under an autocast that would make both ways the same.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            ExitStack() as undo,
        ):
            # Random numbers are left alone: those drawn later would depend on whether this was measured before.
            layer: Any = skip_init(nn.Conv2d, 128, 128, 3, padding=1, bias=False, dtype=kind, device="cpu")
            nn.init.constant_(layer.weight, 0.01)
            layer.to(memory_format=torch.channels_last)
            hidden = torch.full((8, 128, 16, 16), 0.01, dtype=kind, device="cpu", requires_grad=True)
            undo.callback(quicken(layer))
            for _ in range(TIMES):
                output = layer(hidden.to(memory_format=torch.channels_last))
                torch.autograd.grad(output, (hidden, layer.weight), output.detach())

    return once
