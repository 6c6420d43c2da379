"""bfloat16, float16 or float32: which of them this machine computes fastest in."""

import hashlib
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import skip_init

from bridle.errors import ConfigError
from bridle.kernels.choice import pick
from bridle.kernels.machine import instructions
from bridle.kernels.quicken import quicken

Precision = Literal["bf16", "fp16", "fp32"]
TYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {kind: name for name, kind in TYPES.items()}
ON_CPU: tuple[Precision, ...] = ("bf16", "fp32")  # PyTorch computes float16 on a CPU, many times slower than either
TIMES = 4
VOLTA = (7, 0)  # of NVIDIA's GPUs the first that compute faster in float16 throughout


def choose_precision(
    wanted: Precision | Literal["auto"], device: torch.device, weights: torch.dtype = torch.float32
) -> Precision:
    """What to compute in, where "auto" is the fastest.

    A processor without instructions for bfloat16 takes up to a dozen times as long in it as in float32, and does not
    say so: a convolution is measured, once per machine, and the answer kept. GPUs are asked: those before NVIDIA's
    Ampere have no bfloat16, and compute in float16 from Volta on.

    Args:
        weights: what the base's are kept in: with those of 16 bits nothing is computed in 32.

    Raises: ConfigError: float32 is asked for with weights of 16 bits.
    """
    kept = NAMES.get(weights, "fp32")
    if wanted == "fp32" and kept != "fp32":
        remedy = f"load the base in float32, or set it to 'auto' or {kept!r}"
        raise ConfigError(f"precision is 'fp32', but the base's weights are {str(weights)[6:]}: {remedy}")
    if wanted != "auto":
        return wanted
    if weights is not torch.float32:
        return kept
    if device.type == "cuda":
        return choose_for_gpu(device)
    if device.type != "cpu":
        return "fp32"
    fastest = pick(("precision", *can_do()), lambda: {name: convolution(TYPES[name]) for name in ON_CPU})
    return "bf16" if fastest == "bf16" else "fp32"


def choose_for_gpu(device: torch.device) -> Precision:
    """bfloat16 where a GPU has it: unlike float16 it has float32's range."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability(device) >= VOLTA else "fp32"


def computing(precision: Precision, device: torch.device, *, cached: bool = True) -> AbstractContextManager[Any]:
    """Compute in that inside the `with` block, whatever weights are kept in.

    Args:
        cached: whether the cast of a weight is kept, from its first use to the end of the block.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, TYPES[precision], cache_enabled=cached)


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
