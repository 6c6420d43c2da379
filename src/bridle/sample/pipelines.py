"""The family's stock pipelines: the base's own, and the ones that begin from a picture, built of the same parts."""

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
from PIL import Image

from bridle.base.base import Base
from bridle.errors import SampleError
from bridle.sample.steering import Init

PLAIN = 4  # channels of what a Stable Diffusion without a mask's or another picture's takes


def pick_pipeline(base: Base, init: Init | None) -> Any:
    """The pipeline for a drawing; no weight is copied. Raises: SampleError: the family has none of that kind."""
    if init is None:
        return base.pipeline
    kind = base.family.image_to_image if init.mask is None else base.family.inpaint
    if not kind:
        task = "image-to-image" if init.mask is None else "inpainting"
        raise SampleError(f"{base.family.name} has no pipeline for {task}; draw without an init image")
    return rebuild(base.pipeline, getattr(diffusers, kind))


@contextmanager
def inpaintable(pipeline: Any, init: Init | None) -> Generator[None]:
    """Stable Diffusion's inpainting pipelines know a U-Net that takes latents and nothing else by its four channels.

    One of more, such as the embedded base's, is inpainted with in the same way: meanwhile its configuration says four.
    """
    unet = getattr(pipeline, "unet", None)
    if init is None or init.mask is None or unet is None or unet.config.in_channels != unet.config.out_channels:
        yield
        return
    channels = unet.config.in_channels
    unet.register_to_config(in_channels=PLAIN)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


def rebuild(pipeline: Any, kind: Any) -> Any:
    """Another pipeline of the same parts and options."""
    asked = inspect.signature(kind.__init__).parameters
    parts = {**pipeline.config, **pipeline.components}
    other = kind(**{name: part for name, part in parts.items() if name in asked})
    other.set_progress_bar_config(disable=True)
    return other


def arguments(
    pipeline: Any, init: Init | None, prompts: Sequence[str], size_px: tuple[int, int], more: dict[str, Any]
) -> dict[str, Any]:
    """What a call is told; not every pipeline takes the size, and those without text take neither prompts nor guidance.

    Args:
        prompts: one per picture in the batch.
        size_px: height and width.
        more: arguments, all of which some pipelines take.

    Raises: SampleError: there is a negative prompt, of which the pipeline would take no notice.
    """
    count = len(prompts)
    given: dict[str, Any] = {"height": size_px[0], "width": size_px[1], "prompt": list(prompts), "batch_size": count}
    given |= more
    if init is not None:
        given |= {"image": [Image.fromarray(init.image)] * count, "strength": init.strength}
        if init.mask is not None:
            given["mask_image"] = [Image.fromarray(init.mask)] * count
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "negative_prompt" in given and ("negative_prompt" not in taken or "true_cfg_scale" in taken):
        # Flux's is heard only beside a second kind of guidance.
        raise SampleError(f"{type(pipeline).__name__} draws without negative prompts; leave it out")
    return {name: value for name, value in given.items() if name in taken}
