"""Where a control's hint encoder begins: with weights that let the hint through.

The released code, and all that follow it, draw the encoder's convolutions as PyTorch does by default: each passes on
about half of what it is given, SiLU half of that, and biases drown the rest. After seven of them edges vary by a
thousandth from place to place: the copy is told next to nothing, and until Adam has grown that there is nothing to
learn from. On the embedded base this is most of the "sudden convergence" of arXiv:2302.05543, section 3.3.

Here every convolution but the last is drawn with Gaussian weights, as the paper's text has it, and scaled on some of
the run's own hints so that each channel that leaves it has mean 0 and deviation 1. The last stays zero, as do the
links: the control begins as the exact copy, without a say, and its file is like any other.

Source: layer-sequential unit variance, arXiv:1511.06422; per channel and with the mean, arXiv:1602.07868, section 3.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bridle.cache.store import Cache
from bridle.control.unet import UNetControl

HINTS = 16  # that the scales are taken from: at 512 px they take 1 GB and 7 s of a CPU


def first_hints(cache: Cache) -> Tensor:
    """Those that the scales are taken from, [B, K, H, W]."""
    return cache.batch(cache.train_ids[:HINTS]).hint


@torch.no_grad()
def scale_hint_encoder(control: UNetControl, hints: Tensor, seed: int) -> None:
    """Draw the weights of an untrained control's hint encoder anew, in place.

    Args:
        hints: [B, K, H, W], as `control.encode` takes them: some of those that it is to learn from.
        seed: of the weights.
    """
    *inner, last = [module for module in control.controlnet_cond_embedding.modules() if isinstance(module, nn.Conv2d)]
    assert not last.weight.any(), "the control is trained already"
    with ExitStack() as around:
        source = torch.Generator().manual_seed(seed)  # of the CPU: the same weights on every device
        for conv in inner:
            conv.weight.copy_(nn.init.kaiming_normal_(torch.empty(conv.weight.shape), generator=source))
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            around.callback(conv.register_forward_hook(scale).remove)
        around.callback(last.register_forward_pre_hook(spare).remove)
        control.encode(hints)


def scale(conv: Any, given: Any, output: Tensor) -> Tensor:
    """Give every channel that leaves a convolution mean 0 and deviation 1. Returns: what leaves it then.

    A channel that is the same everywhere, as all are where the hints are blank, is left as it is.
    """
    mean = output.float().mean((0, 2, 3))
    # On a CPU torch.std_mean takes three times as long.
    deviation = (output - mean.view(-1, 1, 1)).square().mean((0, 2, 3)).sqrt()
    mean = mean.where(deviation > 0, 0.0)
    deviation = deviation.where(deviation > 0, 1.0)
    conv.weight /= deviation.view(-1, 1, 1, 1)
    conv.bias -= mean / deviation
    return ((output - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)).to(output.dtype)


def spare(conv: Any, given: tuple[Tensor]) -> Tensor:
    """One hint is enough for the last convolution, the largest: it says zero of all."""
    return given[0][:1]
