"""A picture is the same alone and in a batch, under every scheduler, and a request that does not add up is refused."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.errors import BridleError, ConfigError, HintError, SampleError
from bridle.sample.sampler import generate, reconstruct, set_scheduler
from bridle.sample.settings import SCHEDULERS, SampleSettings

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 asks to be changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HINTS = [tiny.make_hint(seed) for seed in range(3)]
PROMPTS = ["a red apple", "a blue fish", ""]
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.make_base()


@pytest.fixture(scope="module")
def control(base: Base) -> Control:
    return tiny.wake(Control.from_base(base.pipeline))


def draw(base: Base, control: Control | None, rows: slice = slice(3), **settings: Any) -> list[np.ndarray]:
    options = {"steps": 2, "batch": 2, **settings}
    return generate(base, control, HINTS[rows], PROMPTS[rows], SEEDS[rows], SampleSettings(**options))


def distance(left: list[np.ndarray], right: list[np.ndarray]) -> int:
    """The largest difference of a pixel, in levels of 256."""
    assert len(left) == len(right) > 0
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(left, right, strict=True))


DIFFUSION = sorted(name for name in SCHEDULERS if not name.startswith("flow"))


@pytest.mark.parametrize("scheduler", DIFFUSION)
def test_a_picture_is_the_same_alone_and_in_a_batch(base: Base, control: Control, scheduler: str) -> None:
    alone = [draw(base, control, slice(row, row + 1), scheduler=scheduler)[0] for row in range(3)]
    together = draw(base, control, scheduler=scheduler, batch=3)
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in together)
    assert distance(together, alone) <= 1
    assert distance(together[:1], together[1:2]) > 10  # else they would be alike for another reason


def test_the_same_request_gives_the_same_bytes(base: Base, control: Control) -> None:
    assert distance(draw(base, control), draw(base, control)) == 0


def test_a_scheduler_leaves_no_trace_in_the_next(base: Base, control: Control) -> None:
    expected = draw(tiny.make_base(), control, scheduler="ddim")
    for name in DIFFUSION:
        set_scheduler(base, name)
        assert distance(draw(base, control, scheduler="ddim"), expected) == 0, name


def test_hint_and_scale_count_and_without_control_neither_does(base: Base, control: Control) -> None:
    free = draw(base, None)
    assert distance(draw(base, control, scale=0.0), free) == 0
    assert distance(draw(base, control), free) > 10
    assert distance(draw(base, control, scale=0.5), draw(base, control)) > 1
    assert not base.denoiser._forward_pre_hooks


def test_pictures_have_the_size_of_the_hints_of_the_request_or_of_the_base(base: Base, control: Control) -> None:
    settings = SampleSettings(steps=1)
    wide = np.concatenate([HINTS[0], HINTS[1]], 1)
    assert generate(base, control, [wide], [""], [0], settings)[0].shape == (64, 128, 3)
    assert generate(base, None, [], [""], [0], settings, size_px=(128, 64))[0].shape == (128, 64, 3)
    assert generate(base, None, [], [""], [0], settings)[0].shape == (64, 64, 3)
    assert generate(base, control, [], [], [], settings) == []


@pytest.mark.parametrize(
    ("hints", "prompts", "seeds", "size_px", "kind", "said"),
    [
        (HINTS[:2], PROMPTS, SEEDS, None, SampleError, "2 hints, 3 prompts, 3 seeds; expected as many of each"),
        (HINTS, PROMPTS, SEEDS[:2], None, SampleError, "3 hints, 3 prompts, 2 seeds"),
        ([HINTS[0], HINTS[1][:32]], PROMPTS[:2], SEEDS[:2], None, SampleError, "expected one size: resize them"),
        ([HINTS[0][:60]], [""], [0], None, SampleError, "picture is 64x60 px; expected multiples of 8"),
        (HINTS[:1], [""], [0], (0, 64), SampleError, "picture is 64x0 px; expected multiples of 8"),
        (HINTS[:1], [""], [0], (32, 64), HintError, "hint is 64x64 px; the picture asks for 64x32 px"),
        ([HINTS[0][..., :1]], [""], [0], None, HintError, "1 channels; this control was made for 3"),
    ],
)
def test_a_request_that_does_not_add_up_is_refused(
    base: Base, control: Control, hints: Any, prompts: Any, seeds: Any, size_px: Any, kind: Any, said: str
) -> None:
    with pytest.raises(BridleError, match=said) as raised:
        generate(base, control, hints, prompts, seeds, SampleSettings(steps=1), size_px)
    assert raised.type is kind
    assert not base.denoiser._forward_pre_hooks


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "sample.steps is 0; expected 1 or more"),
        ({"batch": -1}, "sample.batch is -1; expected 1 or more"),
        ({"guidance": -1.0}, "sample.guidance is -1.0"),
        ({"scale": float("nan")}, "sample.scale is nan; expected 0 or more"),
        ({"scheduler": "dimm"}, "sample.scheduler is 'dimm'; expected auto or one of ddim"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SampleSettings(**values)


def test_an_unknown_scheduler_is_refused(base: Base) -> None:
    with pytest.raises(SampleError, match="scheduler 'dimm' is unknown; expected one of ddim"):
        set_scheduler(base, "dimm")


def test_reconstruction_goes_through_the_autoencoder(base: Base) -> None:
    picture = reconstruct(base, HINTS[:2])[1]
    pixels = torch.from_numpy(HINTS[1]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        vae = base.pipeline.vae
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].clamp(-1, 1)
    expected = ((decoded.permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.abs(picture - expected).max() <= 1
