"""A U-Net on pixels: no autoencoder, and no captions. Its stock pipelines draw one size, by plain schedulers.

They hand the picture to the denoiser as it is: a scheduler that wants it scaled first (Euler, Heun) would draw noise.
"""

from typing import Any

import torch

from bridle.base.family import Family
from bridle.control.text import Text


def encode(pipeline: Any, captions: list[str]) -> Text:
    """Nothing of captions reaches this base: one zero each."""
    return Text(torch.zeros(len(captions), 1, 1))


FAMILY = Family(
    name="pixel U-Net",
    parts=("unet", "scheduler"),
    encode=encode,
    text_to_image="DDPMPipeline",
    image_to_image="",
    inpaint="",
    scheduler="ddim",
    schedulers=("ddim", "ddpm", "dpm++"),
)
