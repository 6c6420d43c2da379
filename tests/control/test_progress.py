"""A call's share of the sampling is counted as diffusers counts it for its own controls, whatever the scheduler."""

from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from bridle.control.progress import Place, Progress

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 asks to be changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler"),
)


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    return tiny.make_pipeline()


@pytest.fixture
def begun(stock: StableDiffusionPipeline) -> Any:
    """The same parts as an image-to-image pipeline, which leaves out the first steps."""
    pipeline = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def follow(pipeline: Any, **given: Any) -> list[Place]:
    """Where each call of the denoiser lies."""
    progress, places = Progress(pipeline), []

    def locate(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places.append(progress.locate(args[1]))

    hook = pipeline.unet.register_forward_pre_hook(locate, with_kwargs=True)
    for _ in range(2):  # the second sampling starts over
        places.clear()
        pipeline("", guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0), **given)
    hook.remove()
    return places


def whole(count: int) -> list[Place]:
    """What diffusers' pipelines compute for their own controls: i / n and (i + 1) / n for timestep i of n."""
    return [Place(step / count, (step + 1) / count) for step in range(count)]


def use(pipeline: Any, scheduler: str) -> None:
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(tiny.make_pipeline().scheduler.config, **options)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_followed_from_the_first_timestep_to_the_last(stock: Any, scheduler: str) -> None:
    use(stock, scheduler)
    places = follow(stock, num_inference_steps=5)
    assert len(places) == stock.num_timesteps >= 5
    assert places == whole(stock.num_timesteps)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_steps_that_image_to_image_leaves_out_do_not_count(begun: Any, scheduler: str) -> None:
    use(begun, scheduler)
    places = follow(begun, num_inference_steps=10, strength=0.5, image=Image.fromarray(tiny.make_hint()))
    assert len(places) == begun.num_timesteps < len(begun.scheduler.timesteps)
    assert places == whole(begun.num_timesteps)


class Flow:
    """A pipeline of a transformer: the timestep comes in bfloat16, and guidance is a second call."""

    def __init__(self, steps: int) -> None:
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
        self.scheduler.set_timesteps(steps)


def test_rounded_timesteps_and_second_calls_are_told_apart() -> None:
    pipeline = Flow(60)  # steps closer together than bfloat16 tells apart
    progress, seen = Progress(pipeline), []
    steps = pipeline.scheduler.timesteps
    assert len(np.unique(steps.to(torch.bfloat16).float().numpy())) < 60
    for timestep in steps:
        pipeline.scheduler.scale_noise(torch.zeros(1), timestep[None], torch.zeros(1))
        told = timestep.to(torch.bfloat16).expand(2)
        seen.append((progress.locate(told), progress.locate(told)))
        pipeline.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    expected = [(place, Place(place.begin, place.finish, again=1)) for place in whole(60)]
    assert seen == expected


@pytest.mark.parametrize("timestep", [torch.tensor([1, 2]), torch.empty(0)])
def test_a_call_of_no_one_timestep_is_all_of_the_sampling(stock: Any, timestep: Any) -> None:
    stock.scheduler.set_timesteps(4)
    assert Progress(stock).locate(timestep) == Place(0.0, 1.0, known=False)


def test_without_a_scheduler_every_call_is_all_of_the_sampling() -> None:
    assert Progress(object()).locate(500) == Place(0.0, 1.0, known=False)
