"""With the same weights, seed and scheduler, stock pipelines with `attach` draw what diffusers' ControlNet ones draw.

Bit for bit, once diffusers' take the mean of the hint's latents, as `attach` does, where they would draw a sample. Only
Stable Diffusion 3 with classifier-free guidance differs by rounding: there they encode the hint in a batch of two.
"""

from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_transformers as tt
import torch
from diffusers import FluxControlNetModel, SD3ControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_hint

# diffusers' own `FluxControlNetModel` says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")

HINTS = [to_hint(tiny.make_hint(seed), 3) for seed in (8, 9)]
PICTURE = Image.fromarray(tiny.make_hint(10))
MASK = Image.fromarray(np.kron(np.array([[255, 0], [255, 0]], np.uint8), np.ones((32, 32), np.uint8)))
REDRAW = {"image": PICTURE, "strength": 0.75}
# diffusers' pipeline with control, the stock one, diffusers' controls, the tiny base, and what both are asked.
PIPELINES: dict[str, tuple[str, str, Any, Any, dict[str, Any]]] = {
    "sd3": ("StableDiffusion3ControlNetPipeline", "StableDiffusion3Pipeline", SD3ControlNetModel, tt.sd3_pipeline, {}),
    "flux": ("FluxControlNetPipeline", "FluxPipeline", FluxControlNetModel, tt.flux_pipeline, {}),
    "flux img2img": (
        "FluxControlNetImg2ImgPipeline",
        "FluxImg2ImgPipeline",
        FluxControlNetModel,
        tt.flux_pipeline,
        REDRAW,
    ),
    "flux inpaint": (
        "FluxControlNetInpaintPipeline",
        "FluxInpaintPipeline",
        FluxControlNetModel,
        tt.flux_pipeline,
        REDRAW | {"mask_image": MASK},
    ),
}
# scale, start and end of each control.
CELLS = {
    "one": [(1.0, 0.0, 1.0)],
    "scale": [(0.6, 0.0, 1.0)],
    "start and end": [(1.0, 0.2, 0.7)],
    "two": [(1.0, 0.0, 1.0), (1.0, 0.0, 1.0)],
    "two, scales, start and end": [(0.6, 0.0, 0.7), (1.3, 0.2, 1.0)],
}


@pytest.fixture(autouse=True)
def mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder's mean wherever a pipeline would draw a sample, in both pipelines alike."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def draw(pipeline: Any, guidance: float, **more: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        prompt="a bar",
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **more,
    ).images
    return images


def make_pipeline(name: str, parts: dict[str, Any], **more: Any) -> Any:
    kind: Any = getattr(diffusers, name)
    return kind(**{part: model for part, model in parts.items() if model is not None}, **more)


def draw_both(name: str, cell: str, guidance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns: the picture by diffusers' pipeline, by the stock one with `attach`, and by that one without control."""
    controlled, stock, kind, make, task = PIPELINES[name]
    parts = make().components
    pipeline = make_pipeline(stock, parts)
    controls = [tt.wake(Control.from_base(pipeline, layers=2), seed) for seed, _ in enumerate(CELLS[cell])]
    references = [kind.from_config(control.config).eval() for control in controls]
    for reference, control in zip(references, controls, strict=True):
        reference.load_state_dict(control.state_dict())
    scales, starts, ends = (list(values) for values in zip(*CELLS[cell], strict=True))
    alone = len(controls) == 1
    theirs = draw(
        make_pipeline(controlled, parts, controlnet=references[0] if alone else references),
        guidance,
        # As tensors, whose layout decides how kernels round, and in [-1, 1]: tensors they take as they are.
        control_image=2 * HINTS[0] - 1 if alone else [2 * hint - 1 for hint in HINTS],
        controlnet_conditioning_scale=scales[0] if alone else scales,
        control_guidance_start=starts,
        control_guidance_end=ends,
        # Without it their image-to-image pipeline asks neither of two Flux controls, and fails; these do not read it.
        **({} if alone or kind is SD3ControlNetModel else {"control_mode": [0, 0]}),
        **task,
    )
    with attach(pipeline, **{f"c{number}": control for number, control in enumerate(controls)}) as rig:
        for number, (scale, start, end) in enumerate(CELLS[cell]):
            rig[f"c{number}"].set(hint=HINTS[number], scale=scale, start=start, end=end)
        ours = draw(pipeline, guidance, **task)
    return theirs, ours, draw(pipeline, guidance, **task)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_are_those_of_diffusers_bit_for_bit(name: str, cell: str) -> None:
    theirs, ours, plain = draw_both(name, cell, guidance=1.0 if name == "sd3" else 4.0)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("cell", CELLS)
def test_with_classifier_free_guidance_they_differ_by_rounding(cell: str) -> None:
    theirs, ours, plain = draw_both("sd3", cell, guidance=4.0)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - plain).max() > 1e-2
