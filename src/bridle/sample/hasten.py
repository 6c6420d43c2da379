"""The same pictures in less time: all that a U-Net and its controls need not compute, or can compute faster."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bridle.control.control import denoiser_of
from bridle.kernels.attention import choose_attention
from bridle.kernels.layout import keep_last, pays
from bridle.kernels.quicken import quicken, speeds_up, turn_weights
from bridle.kernels.working import numbers_of
from bridle.sample.text_once import keep_text
from bridle.sample.twins import share_halves


@contextmanager
def hasten(pipeline: Any, *controls: nn.Module, pack_weights: bool = True) -> Generator[None]:
    """Sample faster inside the `with` block, and inside any autocast; what differs is the rounding of sums alone.

    Weights are packed, or in float32 and on a GPU turned, keys and values of the text kept, and what both halves of
    guidance have in common is computed once. Weights may change meanwhile, as `attach` changes them for a control of an
    unlocked base.

    Args:
        pipeline: any of diffusers'; only those with a U-Net are hastened.
        controls: those that are, or will be, attached to it.
        pack_weights: on a CPU; where not, it takes longer and less memory.
    """
    denoiser, vae = denoiser_of(pipeline), getattr(pipeline, "vae", None)
    with ExitStack() as around:
        if is_unet(denoiser):
            models = [denoiser, *controls]
            drawing = [*models, *([] if vae is None else [vae])]
            kind = numbers_of(denoiser)
            if denoiser.device.type == "cpu":
                if kind is torch.float32 and speeds_up(torch.float32):  # of those for bfloat16 copies are packed
                    around.callback(turn_weights(*drawing))
                around.callback(quicken(*drawing, fixed=True, sparing=not pack_weights))
                around.callback(choose_attention(*models))
            elif kind is torch.bfloat16 and pays(denoiser.device, recorded=False):
                around.callback(turn_weights(*drawing))
                around.callback(keep_last(*drawing))
            around.callback(keep_text(*models))
            around.callback(share_halves(*models))
        yield


def is_unet(denoiser: Any) -> bool:
    """Whole: a sharded one goes by another name, and its weights cannot be packed."""
    return type(denoiser).__name__ in ("UNet2DConditionModel", "UNet2DModel")
