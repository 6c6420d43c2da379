"""On a GPU: channels last from layer to layer, which is how convolutions in bfloat16 compute there.

PyTorch leaves them first. Every convolution then turns its input around, and its output back.
"""

import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bridle.kernels.norm import GroupNorm, forward
from bridle.kernels.quicken import turn_weights
from bridle.kernels.record import WARM_UP, Recorded
from bridle.kernels.stand_in import Forward, Undo, stand_in
from bridle.kernels.working import BF16, learns

LAST = torch.channels_last
SHAPE = (8, 320, 64, 64)  # large enough for a GPU to be busy with
ROUNDS = 7
NEAR = 0.02  # relative: what bfloat16 may round off in a convolution of a normalisation


def keep_last(*models: nn.Module) -> Undo:
    """Have group normalisations in bfloat16 on a GPU leave channels last, and put them there.

    Results differ by rounding alone. To be used where `pays` says so, on models whose weights are turned.

    Returns: what makes the models as they were; calling it twice does no harm.
    """
    with ExitStack() as undo:
        for module in [module for model in models for module in model.modules()]:
            if type(module) is nn.GroupNorm and module.affine:
                undo.callback(stand_in(module, partial(partial, normalise, module)))
        return undo.pop_all().close


def normalise(norm: nn.GroupNorm, plain: Forward, hidden: Tensor) -> Any:
    """Stands in for a group normalisation's `forward`."""
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    if kind is not BF16 or hidden.ndim != 4 or not hidden.is_cuda or hidden.numel() == 0:
        return plain(hidden)
    hidden = hidden.to(kind).contiguous(memory_format=LAST)
    if not learns(hidden, norm.weight, norm.bias):
        return forward(hidden, norm)[0]
    return GroupNorm.apply(hidden, norm.weight, norm.bias, norm)


@cache
def pays(device: torch.device, *, recorded: bool) -> bool:
    """Whether a normalisation and a convolution, there and back, are faster so on this GPU, and give the same.

    Args:
        recorded: whether their kernels are to be a CUDA graph's; otherwise the time that Python takes to start them
            counts, and a fast GPU waits for that.
    """
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        try:
            return compare(device, recorded)
        except Exception:  # whatever Triton may raise that is not there, finds no compiler, or does not know this GPU
            return False


def compare(device: torch.device, recorded: bool) -> bool:
    """See `pays`."""
    plain, last = block(device), block(device)
    turn_weights(last)
    keep_last(last)
    first = torch.linspace(-99, 99, math.prod(SHAPE), device=device).sin().view(SHAPE).to(BF16)
    turned = first.contiguous(memory_format=LAST)
    found, wanted = there_and_back(last, turned), there_and_back(plain, first)
    near = all(bool((a - b).norm() < NEAR * b.norm()) for a, b in zip(found, wanted, strict=True))
    ours, theirs = partial(there_and_back, last), partial(there_and_back, plain)
    ours, theirs = (Recorded(ours), Recorded(theirs)) if recorded else (ours, theirs)
    return near and time_ms(ours, turned) < time_ms(theirs, first)


def block(device: torch.device) -> nn.Sequential:
    """As residual blocks of Stable Diffusion have it, always the same."""
    layers = nn.Sequential(nn.GroupNorm(32, 320), nn.SiLU(), nn.Conv2d(320, 320, 3, padding=1))
    for number, parameter in enumerate(layers.parameters()):
        values = torch.linspace(-99, 99, parameter.numel()).add_(number).sin_().mul_(0.02)
        parameter.data.copy_(values.view_as(parameter))
    return layers.to(device, BF16)


def there_and_back(layers: nn.Sequential, features: Tensor) -> list[Tensor]:
    """Output and gradients."""
    hidden = features.detach().requires_grad_()
    output = layers(hidden)
    return [output.detach(), *torch.autograd.grad(output, [hidden, *layers.parameters()], output.detach())]


def time_ms(way: Callable[[Tensor], Any], features: Tensor) -> float:
    """Median over rounds, on the GPU."""
    for _ in range(WARM_UP + 1):
        way(features)
    taken = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way(features)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)
