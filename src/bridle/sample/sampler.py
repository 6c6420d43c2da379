"""From hints and prompts to pictures: the base's own stock pipeline, with a control attached.

Each picture has a seed of its own, so it comes out the same alone and in a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from bridle.base.base import Base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint
from bridle.errors import SampleError
from bridle.sample.settings import SCHEDULERS, SampleSettings


def generate(
    base: Base,
    control: Control | None,
    hints: Sequence[np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),  # noqa: B008 - frozen, so it can be shared
    size_px: tuple[int, int] | None = None,
    on_step: Callable[[], None] | None = None,
) -> list[np.ndarray]:
    """Draw one picture per prompt.

    Args:
        control: None, or a scale of 0, draws the same pictures without control.
        hints: N arrays [H, W, K] uint8, all of one size; unused without control.
        prompts, seeds: N of each.
        size_px: height and width; the hints' where None, and the base's without hints.
        on_step: called after every denoising step; what it raises ends the drawing.

    Returns: N pictures [H, W, 3] uint8.
    Raises: SampleError: the numbers differ. HintError: a hint does not fit.
    """
    if len(prompts) != len(seeds) or (control is not None and len(hints) != len(prompts)):
        raise SampleError(f"{len(hints)} hints, {len(prompts)} prompts, {len(seeds)} seeds; expected as many of each")
    set_scheduler(base, settings.scheduler)
    height, width = size_px or (hints[0].shape[:2] if len(hints) else (base.size_px, base.size_px))
    if min(height, width) < 1 or height % base.size_factor or width % base.size_factor:
        raise SampleError(f"picture is {width}x{height} px; expected multiples of {base.size_factor}: resize or crop")
    pictures = []
    for start in range(0, len(prompts), settings.batch):
        rows = slice(start, start + settings.batch)
        steered = control if settings.scale > 0 else None
        pictures += _batch(base, steered, hints[rows], prompts[rows], seeds[rows], settings, (height, width), on_step)
    return pictures


def _batch(
    base: Base,
    control: Control | None,
    hints: Sequence[np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    size_px: tuple[int, int],
    on_step: Callable[[], None] | None,
) -> list[np.ndarray]:
    def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return tensors

    def draw() -> list[np.ndarray]:
        output = base.pipeline(
            list(prompts),
            height=size_px[0],
            width=size_px[1],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=after_step,
        )
        return [np.round(image * 255).astype(np.uint8) for image in output.images]

    with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        if control is None:
            return draw()
        with attach(base.pipeline, control=control) as rig:
            rig["control"].set(hint=stack(hints, control.hint_channels), scale=settings.scale)
            return draw()


def stack(hints: Sequence[np.ndarray], channels: int) -> Tensor:
    """N hints [H, W, K] uint8 to one tensor [N, K, H, W] in [0, 1]. Raises: SampleError: their sizes differ."""
    sizes = {hint.shape[:2] for hint in hints}
    if len(sizes) > 1:
        raise SampleError(f"hints of sizes {sorted(sizes)} in one batch; expected one size: resize them alike")
    return torch.cat([to_hint(hint, channels) for hint in hints])


def set_scheduler(base: Base, name: str) -> str:
    """Sample with another scheduler, on the base's own noise schedule; "auto" is the one of its family.

    Returns: its name. Raises: SampleError: there is none of that name, or it is for the other kind of bases.
    """
    name = base.family.scheduler if name == "auto" else name
    if name not in SCHEDULERS:
        raise SampleError(f"scheduler {name!r} is unknown; expected one of {', '.join(SCHEDULERS)}")
    fitting = [other for other in SCHEDULERS if other.startswith("flow") == (base.schedule.prediction == "flow")]
    if name not in fitting:
        raise SampleError(f"scheduler {name!r} is not for {base.family.name}; expected one of {', '.join(fitting)}")
    kind, options = SCHEDULERS[name]
    base.pipeline.scheduler = getattr(diffusers, kind).from_config(base.pipeline.scheduler.config, **options)
    return name


def reconstruct(base: Base, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures through the autoencoder and back: the best that this base can draw. [H, W, 3] uint8 in and out."""
    pictures = []
    for image in images:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = base.decode(base.encode_images(pixels)[0])
        pictures.append(((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    return pictures
