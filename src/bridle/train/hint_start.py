"""Where a control's hint encoder begins: not at zero, but able to say what the hint shows in the base's own terms.

The official code begins it with random weights and a last layer of zeros. Every link ends in a zero convolution as
well, so what the hint says has to grow through two zeros at once, and for hundreds or thousands of steps nothing is to
be seen: the "sudden convergence" of arXiv:2302.05543, section 3.3. The links' zeros alone keep the base's output what
it is. So the encoder may begin anywhere, and here it first learns, by itself and cheaply, to predict from the hint what
the base's first convolution makes of the clean picture: a guess at it, in the space in which the copy reads pictures.

Whether that shortens the wait is not settled: docs/performance.md, "Time to control".
"""

import math

import torch
from torch import Tensor, nn

from bridle.cache.store import Cache
from bridle.control.unet import UNetControl
from bridle.train.draws import ids_of_step
from bridle.train.settings import TrainSettings

PAIRS = 3600  # that it is shown: a hundredth of what training costs by the time a control is learned
LR = 2e-3
OWN_ORDER = 2**31  # added to the seed: another order of pairs than training's


def start_hint_encoder(control: UNetControl, cache: Cache, settings: TrainSettings) -> float:
    """Teach an untrained control's hint encoder, in place; the control's output stays what it is.

    Returns: the error in the end, as a share of what there is to predict: 1 is a guess at nothing.
    """
    encoder = control.controlnet_cond_embedding
    draw_last_layer(encoder, settings.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LR, weight_decay=settings.weight_decay)
    precision = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    errors, steps = [], min(settings.steps, math.ceil(PAIRS / settings.batch))
    for step in range(steps):
        ids = ids_of_step(cache.train_ids, step, settings.batch, settings.seed + OWN_ORDER)
        pairs = cache.batch(ids)
        with torch.autocast(control.device.type, precision, enabled=precision is torch.bfloat16):
            wanted = first_features(control, pairs.mean.to(control.device))
            found = control.encode(pairs.hint.to(control.device))
        error = (found.float() - wanted).square().mean() / wanted.square().mean()
        error.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        control.zero_grad(set_to_none=True)
        errors.append(error.detach())
    return torch.stack(errors[-10:]).mean().item()


@torch.no_grad()
def first_features(control: UNetControl, latents: Tensor) -> Tensor:
    """What the copied first convolution makes of clean latents, without its bias, which is there anyway."""
    weight = control.conv_in.weight
    features: Tensor = nn.functional.conv2d(latents.to(weight.dtype), weight, None, padding=control.conv_in.padding)
    return features.float()


def draw_last_layer(encoder: nn.Module, seed: int) -> None:
    """Random weights, as PyTorch draws them, in the place of the zeros."""
    last = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        last.reset_parameters()
