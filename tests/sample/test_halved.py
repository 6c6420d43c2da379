"""As a GPU draws: base and control in 16 bits themselves and no autocast, in every family."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_pixel
import tiny_sdxl
import tiny_transformers
import torch

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.sample import sampler
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Steering

pytestmark = [
    # Of autocast on Flux's normalisations.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    # SDXL's stock pipeline decodes in float32 where its autoencoder is float16.
    pytest.mark.filterwarnings("ignore:.upcast_vae. is deprecated:FutureWarning"),
]

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {
    "sd": (tiny.make_base, tiny.wake),
    "sd2": (lambda: Base(tiny.make_sd2_pipeline()), tiny.wake),
    "sdxl": (lambda: Base(tiny_sdxl.make_pipeline()), tiny.wake),
    "sd3": (lambda: Base(tiny_transformers.sd3_pipeline()), tiny_transformers.wake),
    "flux": (lambda: Base(tiny_transformers.flux_pipeline()), tiny_transformers.wake),
    "pixel": (tiny_pixel.make_base, tiny_pixel.wake),
}


def steer(control: Control, size_px: int) -> dict[str, Steering]:
    """One control in the first picture, inside a mask, and in the second."""
    mask = np.zeros((size_px, size_px), np.uint8)
    mask[:, size_px // 3 :] = 255
    left, right = ([tiny.make_hint(seed, size_px=size_px)] for seed in range(2))
    return {
        "left": Steering(control=control, hints=left, strength=Strength(scale=0.8), mask=mask, pictures=[0]),
        "right": Steering(control=control, hints=right, strength=Strength(end=0.6), pictures=[1]),
    }


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_autocast_but_for_rounding(
    family: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: tuple[Callable[[], Base], Callable[[Control], Control]] = FAMILIES[family]
    base = make[0]()
    control = make[1](Control.from_base(base.pipeline, size_factor=base.size_factor))

    size_px = tiny.SIZE_PX if base.vae is not None else base.size_px
    steering, how = steer(control, size_px), SampleSettings(steps=3, precision=precision)

    def draw(steering: Any) -> np.ndarray:
        pictures = generate(base, steering, [], ["a red apple", "a fish"], [1, 2], how, (size_px, size_px))
        return np.stack(pictures).astype(float)

    wanted = draw(steering)
    fingerprint = base.fingerprint
    base.halve(KINDS[precision])
    control.to(base.denoiser.dtype)
    monkeypatch.setattr(sampler, "casts", lambda base, precision: base.denoiser.dtype is torch.float32)
    found = draw(steering)
    assert base.fingerprint == fingerprint
    assert base.denoiser.dtype is (torch.float32 if base.vae is None else KINDS[precision])
    assert np.abs(found - wanted).mean() < 2
    assert np.abs(draw(None) - found).mean() > 2 * np.abs(found - wanted).mean()
