"""Every family draws by `generate`: from text, from a picture, into one; steered in the steps and half it is told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_pixel
import tiny_sdxl
import tiny_transformers

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.errors import SampleError
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Init, Steering

HINT, IMAGE = tiny.make_hint(), tiny.make_hint(6)
LEFT = np.zeros((64, 64), np.uint8)
LEFT[:, :32] = 255
BEGINNINGS = {"text": None, "picture": Init(image=IMAGE, strength=0.5), "inpainting": Init(image=IMAGE, mask=LEFT)}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "sdxl": (tiny_sdxl.make_pipeline, tiny.wake),
    "sd3": (tiny_transformers.sd3_pipeline, tiny_transformers.wake),
    "flux": (tiny_transformers.flux_pipeline, tiny_transformers.wake),
}


@pytest.fixture(scope="module", params=FAMILIES)
def steered(request: pytest.FixtureRequest) -> tuple[Base, Control]:
    make, wake = FAMILIES[request.param]
    base = Base(make())
    return base, wake(Control.from_base(base.pipeline))


def draw(base: Base, control: Control, init: Init | None, **strength: Any) -> np.ndarray:
    steering = {"edge": Steering(control=control, hints=[HINT], strength=Strength(**strength))}
    how = SampleSettings(steps=4, guidance=3.0)
    (picture,) = generate(base, steering, [], ["a red apple"], [0], how, (64, 64), init=init)
    return picture


@pytest.mark.parametrize("way", BEGINNINGS)
def test_a_control_acts_in_every_way_of_drawing_and_when_it_is_told(steered: tuple[Base, Control], way: str) -> None:
    (base, control), init = steered, BEGINNINGS[way]
    picture, free = draw(base, control, init), draw(base, control, init, scale=0.0)
    assert picture.shape == (64, 64, 3)
    assert not np.array_equal(picture, free)
    assert np.array_equal(draw(base, control, init, keyframes=((0.0, 0.0),)), free)
    assert not np.array_equal(draw(base, control, init, end=0.5), picture)
    assert not np.array_equal(draw(base, control, init, end=0.5), free)
    if way == "inpainting":
        assert np.array_equal(picture[:, 32:], IMAGE[:, 32:])


def test_each_half_of_guidance_can_be_steered_alone(steered: tuple[Base, Control]) -> None:
    base, control = steered
    both, free = draw(base, control, None), draw(base, control, None, scale=0.0)
    conditional, other = (draw(base, control, None, half=half) for half in ("conditional", "unconditional"))
    if base.family.name.startswith("Flux"):  # it guides by a number: all of a call is conditional
        assert np.array_equal(conditional, both)
        assert np.array_equal(other, free)
    else:
        assert len({picture.tobytes() for picture in (both, free, conditional, other)}) == 4


def test_what_a_family_cannot_do_is_refused() -> None:
    flux = Base(tiny_transformers.flux_pipeline())
    with pytest.raises(SampleError, match="FluxPipeline draws without negative prompts; leave it out"):
        generate(flux, None, [], ["a"], [0], SampleSettings(steps=1), (64, 64), negative_prompts=["b"])
    pixel = tiny_pixel.make_base()
    size = (pixel.size_px, pixel.size_px)
    init = Init(image=np.zeros((*size, 3), np.uint8), strength=1.0)
    with pytest.raises(SampleError, match="pixel U-Net has no pipeline for image-to-image; draw without an init"):
        generate(pixel, None, [], [""], [0], SampleSettings(steps=1), size, init=init)
