"""Another scheduler than the base was saved with draws as stock pipelines do, whatever its configuration says."""

from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import tiny_pixel
import tiny_sdxl

from bridle.base.base import Base
from bridle.sample.pipelines import pick_pipeline, rebuild
from bridle.sample.sampler import generate
from bridle.sample.scheduler import set_scheduler
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Init

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SILENT = ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"]
INIT = Init(image=tiny.make_hint(), strength=0.5)

pytestmark = [
    # Stock pipelines say that a configuration is out of date, and correct it.
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
    # diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 asks to be changed.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def make_base(family: Any, kind: str, **said: Any) -> Base:
    """A base that was saved with that scheduler, of whose settings only these are in the file."""
    pipeline = family.make_pipeline()
    pipeline.scheduler = getattr(diffusers, kind)(**LEVELS, **said)
    return Base(rebuild(pipeline, type(pipeline)))


def draw(base: Base, init: Init | None = None) -> np.ndarray:
    return generate(base, None, [], ["a red apple"], [1], SampleSettings(steps=4, precision="fp32"), init=init)[0]


@pytest.mark.parametrize("init", [None, INIT], ids=["text", "picture"])
@pytest.mark.parametrize("kind", [*SILENT, "LMSDiscreteScheduler", "LCMScheduler", "HeunDiscreteScheduler"])
def test_latents_are_not_clipped_where_the_configuration_does_not_say_so(kind: str, init: Init | None) -> None:
    assert np.array_equal(draw(make_base(tiny, kind), init), draw(tiny.make_base(), init))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "DDIMParallelScheduler"])
@pytest.mark.parametrize("family", [tiny, tiny_sdxl])
def test_text_and_picture_begin_alike(family: Any, scheduler: str) -> None:
    base = make_base(family, "EulerDiscreteScheduler")
    set_scheduler(base, scheduler)
    before = dict(base.pipeline.scheduler.config)
    assert before["clip_sample"] is False
    assert dict(pick_pipeline(base, INIT).scheduler.config) == before


def test_what_a_configuration_says_stays_and_so_do_pixels_as_they_are() -> None:
    said = make_base(tiny_sdxl, "DDIMScheduler", clip_sample=True, set_alpha_to_one=True)
    for base in (said, tiny_pixel.make_base()):
        for scheduler in ("dpm++", "ddim"):
            set_scheduler(base, scheduler)
        config = base.pipeline.scheduler.config
        assert (config.clip_sample, config.set_alpha_to_one) == (True, True)
