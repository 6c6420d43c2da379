"""On a GPU: channels last from layer to layer, which is how convolutions in bfloat16 compute there.

PyTorch leaves them first. Every convolution then turns its input around, and its output back.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from bridle.kernels.choice import kept, pick
from bridle.kernels.norm import normalise as normalise_last
from bridle.kernels.patches import LAST
from bridle.kernels.quicken import turn_weights
from bridle.kernels.record import Recorded
from bridle.kernels.stand_in import Forward, Undo, stand_in
from bridle.kernels.working import BF16, numbers_of

CHANNELS = 320
TIMES = 10
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
    if not hidden.is_cuda or numbers_of(hidden) is not BF16 or hidden.ndim != 4 or hidden.numel() == 0:
        return plain(hidden)
    return normalise_last(norm, hidden.to(BF16).contiguous(memory_format=LAST))


@cache
def pays(device: torch.device, *, recorded: bool) -> bool:
    """Whether a normalisation and a convolution, there and back, are faster so on this GPU, and give the same.

    Args:
        recorded: whether their kernels are to be a CUDA graph's; otherwise the time that Python takes to start them
            counts, and a fast GPU waits for that.
    """
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False), catch_warnings():
        simplefilter("ignore")  # Triton's, of its own making
        try:
            return faster(device, recorded)
        except Exception:  # whatever Triton may raise that is not there, finds no compiler, or does not know this GPU
            return False


def faster(device: torch.device, recorded: bool) -> bool:
    """See `pays`. What is faster is measured once per GPU; unless that is PyTorch's, ours are tried every time."""
    shape = ("channels", recorded, torch.cuda.get_device_name(device))
    if kept(shape) == "first":
        return False
    plain, last = block(device), block(device)
    turn_weights(last)
    keep_last(last)
    if not agree(plain, last):  # which may be otherwise tomorrow, with another driver
        return False

    def make_ways() -> dict[str, Callable[[], None]]:
        features = make_features(64, device)  # large enough for a GPU to be busy with
        ways = {"first": (plain, features), "last": (last, features.contiguous(memory_format=LAST))}
        return {name: often(partial(there_and_back, layers), given, recorded) for name, (layers, given) in ways.items()}

    return pick(shape, make_ways) == "last"


def agree(plain: nn.Sequential, last: nn.Sequential) -> bool:
    """But for rounding."""
    features = make_features(4, next(last.parameters()).device)
    found, wanted = there_and_back(last, features), there_and_back(plain, features)
    return all(bool((a - b).norm() < NEAR * b.norm()) for a, b in zip(found, wanted, strict=True))


def block(device: torch.device) -> nn.Sequential:
    """As residual blocks of Stable Diffusion have it, always the same."""
    layers = nn.Sequential(nn.GroupNorm(32, CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
    for number, parameter in enumerate(layers.parameters()):
        parameter.data.copy_(
            torch.linspace(-99, 99, parameter.numel()).add_(number).sin_().mul_(0.02).view_as(parameter)
        )
    return layers.to(device, BF16)


def make_features(side: int, device: torch.device) -> Tensor:
    shape = (8, CHANNELS, side, side)
    return torch.linspace(-99, 99, math.prod(shape), device=device).sin_().view(shape).to(BF16)


def there_and_back(layers: nn.Sequential, features: Tensor) -> list[Tensor]:
    """Output and gradients."""
    hidden = features.detach().requires_grad_()
    output = layers(hidden)
    return [output.detach(), *torch.autograd.grad(output, [hidden, *layers.parameters()], output.detach())]


def often(way: Callable[[Tensor], Any], features: Tensor, recorded: bool) -> Callable[[], None]:
    """So often that starting to wait for the GPU, and recording, do not count."""
    called = Recorded(way) if recorded else way

    def run() -> None:
        for _ in range(TIMES):
            called(features)
        torch.cuda.synchronize(features.device)

    return run
