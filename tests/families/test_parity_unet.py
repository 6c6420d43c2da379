"""With the same weights, seed and scheduler, stock pipelines with `attach` draw what diffusers' ControlNet ones draw.

Bit for bit, once diffusers' encode the hint of a picture once, as `attach` does. They do so without classifier-free
guidance and in guess mode; with it they encode the same hint in a batch of two, which convolutions round differently.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import promises
import pytest
import tiny
import tiny_sdxl
from diffusers import ControlNetModel
from torch import Tensor

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint

HINTS = [to_hint(tiny.make_hint(seed), 3) for seed in (8, 9)]
FAMILIES = {"sd1": tiny.make_pipeline, "sd2": tiny.make_sd2_pipeline, "sdxl": tiny_sdxl.make_pipeline}
XL = {"sdxl": "XL"}
# What diffusers calls its own pipelines with control, and where they take the hint.
WAYS = {
    "text_to_image": ("StableDiffusion{}ControlNetPipeline", "StableDiffusion{}Pipeline", "image"),
    "image_to_image": (
        "StableDiffusion{}ControlNetImg2ImgPipeline",
        "StableDiffusion{}Img2ImgPipeline",
        "control_image",
    ),
    "inpaint": ("StableDiffusion{}ControlNetInpaintPipeline", "StableDiffusion{}InpaintPipeline", "control_image"),
}
# Scale, start and end of each control, and whether in guess mode.
CELLS: dict[str, tuple[list[tuple[float, float, float]], bool]] = {
    "one": ([(1.0, 0.0, 1.0)], False),
    "scale": ([(0.6, 0.0, 1.0)], False),
    "start and end": ([(1.0, 0.2, 0.7)], False),
    "two": ([(1.0, 0.0, 1.0), (1.0, 0.0, 1.0)], False),
    "two, scales, start and end": ([(0.6, 0.0, 0.7), (1.3, 0.2, 1.0)], False),
    "guess mode": ([(0.8, 0.0, 1.0)], True),
    "guess mode, two, start and end": ([(0.6, 0.0, 0.7), (1.3, 0.2, 1.0)], True),
}
SCHEDULERS = {
    "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {},
}
# diffusers' own schedulers, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def make_pipelines(family: str, way: str, count: int) -> tuple[Any, Any, list[Control], list[ControlNetModel]]:
    """Theirs with its controls, the stock one, and ours with the same weights."""
    controlled, stock, _ = (name.format(XL.get(family, "")) for name in WAYS[way])
    source = FAMILIES[family]()
    controls = [tiny.wake(Control.from_base(source), seed) for seed in range(count)]
    references = [ControlNetModel.from_unet(source.unet).eval() for _ in controls]
    for reference, control in zip(references, controls, strict=True):
        reference.load_state_dict(control.state_dict())
    parts = dict(source.components)
    more = {} if family in XL else {"requires_safety_checker": False}
    theirs = getattr(diffusers, controlled)(**parts, **more, controlnet=references[0] if count == 1 else references)
    ours = getattr(diffusers, stock)(**parts, **more)
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
    return theirs, ours, controls, references


def draw_both(
    family: str, way: str, cell: str, *, once: bool, scheduler: Any = None, guidance: float = 5.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns: the picture by diffusers' pipeline, by the stock one with `attach`, and by that one without control.

    Args: once: whether diffusers' controls, too, encode the hint once for all rows of a batch.
    """
    strengths, guess = CELLS[cell]
    theirs, ours, controls, references = make_pipelines(family, way, len(strengths))
    if once:
        for reference in references:
            encoder: Any = reference.controlnet_cond_embedding
            encoder.forward = encode_once(encoder.forward)
    if scheduler is not None:
        kind, changes = scheduler
        for pipeline in (theirs, ours):
            pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changes)
    given = {"steps": 8, "guidance_scale": guidance}
    expected = promises.draw(theirs, way, **given, **options_of(way, cell))
    with attach(ours, **{f"c{number}": control for number, control in enumerate(controls)}) as rig:
        for number, (scale, start, end) in enumerate(strengths):
            rein = rig[f"c{number}"].set(hint=HINTS[number], scale=scale, start=start, end=end)
            if guess:
                rein.set(guess="diffusers")
        steered = promises.draw(ours, way, **given)
    return expected, steered, promises.draw(ours, way, **given)


def options_of(way: str, cell: str) -> dict[str, Any]:
    """A cell in the words of diffusers' pipelines."""
    strengths, guess = CELLS[cell]
    scales, starts, ends = (list(values) for values in zip(*strengths, strict=True))
    alone = len(strengths) == 1
    return {
        WAYS[way][2]: HINTS[0] if alone else HINTS,
        "controlnet_conditioning_scale": scales[0] if alone else scales,
        "control_guidance_start": starts,
        "control_guidance_end": ends,
        "guess_mode": guess,
    }


def encode_once(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For hints that are all the same."""

    def forward(hints: Tensor) -> Tensor:
        features = encode(hints[:1])
        return features.expand(len(hints), *features.shape[1:])

    return forward


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_diffusers_bit_for_bit(family: str, way: str, cell: str) -> None:
    theirs, ours, plain = draw_both(family, way, cell, once=True)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_any_scheduler_they_are(scheduler: str) -> None:
    other = (scheduler, SCHEDULERS[scheduler])
    theirs, ours, plain = draw_both("sd1", "text_to_image", "start and end", once=True, scheduler=other)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_guidance_they_are_as_diffusers_comes(family: str) -> None:
    theirs, ours, _ = draw_both(family, "text_to_image", "two, scales, start and end", once=False, guidance=1.0)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("cell", ["one", "two, scales, start and end"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_guidance_as_diffusers_comes_they_differ_by_rounding(family: str, cell: str) -> None:
    theirs, ours, plain = draw_both(family, "text_to_image", cell, once=False)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - plain).max() > 1e-2
