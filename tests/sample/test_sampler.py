"""A picture is the same alone and in a batch, under every scheduler, and a request that does not add up is refused."""

import copy
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import tiny_sdxl
import torch
from PIL import Image

from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.errors import BridleError, ConfigError, HintError, SampleError
from bridle.kernels import conv
from bridle.kernels.quicken import speeds_up
from bridle.sample import sampler
from bridle.sample.pipelines import pick_pipeline
from bridle.sample.sampler import generate, reconstruct
from bridle.sample.scheduler import set_scheduler
from bridle.sample.settings import SCHEDULERS, SampleSettings
from bridle.sample.steering import Init, Steering

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
    options = {"steps": 2, "batch": 2, "precision": "fp32", **settings}  # bfloat16 rounds otherwise in a batch
    return generate(base, control, HINTS[rows], PROMPTS[rows], SEEDS[rows], SampleSettings(**options))


@pytest.mark.parametrize("family", [tiny, tiny_sdxl])
def test_a_prompt_that_is_cut_is_drawn_without_a_warning(family: Any) -> None:
    base, told = Base(family.make_pipeline()), Told()
    loggers = [logging.getLogger(name) for name in (type(base.pipeline).__module__, "transformers")]
    with ExitStack() as around:
        for logger in loggers:
            logger.addHandler(told)
            around.callback(logger.removeHandler, told)
        generate(base, None, [], ["a red apple on a table"], [0], SampleSettings(steps=1))
        base.encode_captions(["a red apple on a table"])
        assert not told.messages
        base.pipeline("a red apple on a table", num_inference_steps=1)  # stock calls warn as ever
        assert any("truncated" in message for message in told.messages)


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def distance(left: list[np.ndarray], right: list[np.ndarray]) -> int:
    """The largest difference of a pixel, in levels of 256."""
    assert len(left) == len(right) > 0
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(left, right, strict=True))


def root_mean_square(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Of their pixels' differences, in levels of 256."""
    return float(np.sqrt(np.square(np.stack(left).astype(float) - np.stack(right)).mean()))


def test_bfloat16_is_known_of_before_weights_are_turned(base: Base, control: Control) -> None:
    """They are packed for it, and turning them takes a second for each gigabyte."""
    lie = []

    def look() -> None:
        lie.append(base.denoiser.conv_in.weight.is_contiguous())

    for precision in ("bf16", "fp32"):
        settings = SampleSettings(steps=1, precision=cast(Any, precision))
        generate(base, control, HINTS[:1], PROMPTS[:1], SEEDS[:1], settings, on_step=look)
    assert lie == [True, not speeds_up(torch.float32)]


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
        (HINTS, PROMPTS, SEEDS[:2], None, SampleError, "3 prompts, 2 seeds; expected as many of each"),
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
        ({"speed": "quick"}, "sample.speed is 'quick'; expected one of exact, fast, draft"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SampleSettings(**values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", [0, -1])
def test_pictures_are_those_of_the_plain_pipeline(
    base: Base, control: Control, precision: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 by all ways but Winograd's, which rounds more: it has the next test."""

    def pick(shape: Any, ways: Any) -> str:
        return [name for name in ways() if precision == "fp32" or name != "winograd"][place]

    monkeypatch.setattr(conv, "pick", pick)
    found = draw(base, control, precision=precision)
    monkeypatch.setattr(sampler, "hasten", lambda *models, **how: nullcontext())
    assert distance(found, draw(base, control, precision=precision)) <= (1 if precision == "fp32" else 8)


@pytest.mark.parametrize("way", [None, "winograd"], ids=["fastest", "roundest"])
def test_bfloat16_takes_pictures_hardly_further_from_float32_s_than_the_plain_pipeline_s(
    base: Base, control: Control, way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured on this machine: some ways to compute round more than others."""
    measured = conv.pick
    if way:
        monkeypatch.setattr(conv, "pick", lambda shape, ways: way if way in ways() else measured(shape, ways))
    found = draw(base, control, precision="bf16")
    monkeypatch.setattr(sampler, "hasten", lambda *models, **how: nullcontext())
    exact = draw(base, control, precision="fp32")
    assert 0 < root_mean_square(found, exact) <= 1.5 * root_mean_square(draw(base, control, precision="bf16"), exact)


def test_a_quicker_speed_draws_nearly_the_same_and_leaves_no_trace(base: Base, control: Control) -> None:
    exact = draw(base, control, steps=6)
    fast, draft = (draw(base, control, steps=6, speed=speed) for speed in ("fast", "draft"))
    assert distance(fast, exact) > 0
    assert distance(draft, fast) > 0
    assert distance(draw(base, control, steps=6), exact) == 0
    models = (base.denoiser, base.vae, control)
    assert not any("forward" in vars(module) for model in models for module in model.modules())
    assert not base.denoiser._forward_pre_hooks


def test_any_scheduler_of_diffusers_can_be_named_by_its_class(base: Base, control: Control) -> None:
    assert set_scheduler(base, "auto") == "ddim"
    assert distance(draw(base, control, scheduler="DDIMScheduler"), draw(base, control, scheduler="ddim")) == 0
    assert distance(draw(base, control, scheduler="LMSDiscreteScheduler"), draw(base, control)) > 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dimm", "scheduler 'dimm' is unknown; expected one of ddim"),
        ("NoScheduler", "scheduler 'NoScheduler' is unknown; .* or a scheduler class of diffusers"),
        ("StableDiffusionPipeline", "scheduler 'StableDiffusionPipeline' is unknown"),
        ("flow-euler", "scheduler 'flow-euler' is not for Stable Diffusion; expected one of ddim"),
        ("FlowMatchEulerDiscreteScheduler", "is not for Stable Diffusion"),
    ],
)
def test_a_scheduler_that_is_none_or_for_another_kind_of_base_is_refused(base: Base, name: str, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        set_scheduler(base, name)


# --- several controls, and pictures to begin from

LEFT = np.zeros((64, 64), np.uint8)
LEFT[:, :32] = 255


def ask(base: Base, control: Any, rows: slice = slice(3), **more: Any) -> list[np.ndarray]:
    settings = SampleSettings(steps=4, batch=2, precision="fp32", scale=more.pop("scale", 1.0))
    return generate(base, control, [], PROMPTS[rows], SEEDS[rows], settings, (64, 64), **more)


def test_several_controls_sum_each_with_its_own_hints_strength_and_region(base: Base, control: Control) -> None:
    other = tiny.wake(Control.from_base(base.pipeline), seed=30)
    one = Steering(control=control, hints=HINTS)
    two = Steering(control=other, hints=HINTS[:1], strength=Strength(scale=0.5, end=0.5), mask=LEFT)
    both = ask(base, {"a": one, "b": two})
    assert distance(ask(base, {"b": two, "a": one}), both) <= 1
    for fewer in ({"a": one}, {"b": two}, {}):
        assert distance(ask(base, fewer), both) > 1
    alone = [ask(base, {"a": Steering(control=control, hints=[HINTS[2]]), "b": two}, slice(2, 3))[0]]
    assert distance(alone, both[2:]) <= 1  # a batch has each picture's own hint, or the one for all
    assert distance(ask(base, {"a": one}), draw(base, control, steps=4)) <= 1
    assert distance(ask(base, {"a": one, "b": two}, scale=0.0), ask(base, {})) == 0


def test_a_single_control_acts_in_the_half_that_the_settings_name(base: Base, control: Control) -> None:
    halved = Steering(control=control, hints=HINTS, strength=Strength(half="conditional"))
    pictures = draw(base, control, half="conditional", steps=4)
    assert distance(pictures, ask(base, {"a": halved})) == 0
    assert distance(pictures, draw(base, control, steps=4)) > 1
    with pytest.raises(ConfigError, match=r"sample.half is 'none'; expected one of both, conditional, unconditional"):
        SampleSettings(half=cast(Any, "none"))


def test_a_control_that_pools_acts_in_its_own_half_unless_told_another(base: Base) -> None:
    pooling = tiny.wake(Control.from_base(base.pipeline))
    pooling.config["global_pool_conditions"] = True
    conditional = draw(base, pooling, half="conditional", steps=4)
    assert distance(draw(base, pooling, steps=4), conditional) == 0
    assert distance(ask(base, {"a": Steering(control=pooling, hints=HINTS)}), conditional) == 0
    assert distance(draw(base, pooling, half="both", steps=4), conditional) > 1


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("half", ["both", "conditional"])
def test_requests_with_controls_of_their_own_share_a_batch(base: Base, control: Control, batch: int, half: Any) -> None:
    other = tiny.wake(Control.from_base(base.pipeline), seed=30)
    weak = Strength(scale=0.5, half=half)
    mixed = {
        "a": Steering(control=control, hints=[HINTS[0], HINTS[2]], pictures=[0, 2]),
        "b": Steering(control=other, hints=[HINTS[1]], strength=weak, mask=LEFT, pictures=[1]),
        "everywhere": Steering(control=other, hints=[HINTS[1]], strength=weak),
    }
    alone = [
        ask(base, {"a": Steering(control=control, hints=[HINTS[0]]), "e": mixed["everywhere"]}, slice(0, 1)),
        ask(base, {"b": replace(mixed["b"], pictures=None), "e": mixed["everywhere"]}, slice(1, 2)),
        ask(base, {"a": Steering(control=control, hints=[HINTS[2]]), "e": mixed["everywhere"]}, slice(2, 3)),
    ]
    settings = SampleSettings(steps=4, batch=batch, precision="fp32")
    together = generate(base, mixed, [], PROMPTS, SEEDS, settings, (64, 64))
    assert distance(together, [picture for pictures in alone for picture in pictures]) <= 1
    assert distance(together[:1], ask(base, {"e": mixed["everywhere"]}, slice(0, 1))) > 1  # else nothing was asked


def test_a_request_for_pictures_that_are_not_there_or_for_a_control_that_all_share_is_refused(
    base: Base, control: Control
) -> None:
    with pytest.raises(SampleError, match=r"pictures \[3\]; of 3 prompts"):
        ask(base, {"a": Steering(control=control, hints=HINTS[:1], pictures=[3])})
    with pytest.raises(SampleError, match=r"3 hints, 3 prompts"):
        ask(base, {"a": Steering(control=control, hints=HINTS, pictures=[0, 1])})
    for numbers in ([], [1, 0], [-1]):
        with pytest.raises(SampleError, match="expected their numbers from 0, rising"):
            Steering(control=control, hints=HINTS[:1], pictures=numbers)
    unlocked = tiny.wake(Control.from_base(base.pipeline))
    unlocked.base_delta = {"conv_out.bias": torch.ones(4)}
    with pytest.raises(SampleError, match="changes the base"):
        Steering(control=unlocked, hints=HINTS[:1], pictures=[0])


@pytest.mark.parametrize("mask", [None, LEFT])
def test_a_picture_begins_from_another_one_and_is_the_same_alone_and_in_a_batch(
    base: Base, control: Control, mask: np.ndarray | None
) -> None:
    steering = {"a": Steering(control=control, hints=HINTS)}
    init = Init(image=HINTS[0], strength=0.5, mask=mask)
    pictures = ask(base, steering, init=init)
    assert (
        distance(ask(base, {"a": Steering(control=control, hints=[HINTS[1]])}, slice(1, 2), init=init), pictures[1:2])
        <= 1
    )
    for other in (None, Init(image=HINTS[1], strength=0.5, mask=mask), Init(image=HINTS[0], strength=1.0, mask=mask)):
        assert distance(ask(base, steering, init=other), pictures) > 1
    assert distance(ask(base, {}, init=init), pictures) > 1  # the control acts there, too


def test_inpainting_keeps_what_lies_outside_the_mask_pixel_by_pixel(base: Base) -> None:
    (picture,) = ask(base, {}, slice(1), init=Init(image=HINTS[0], mask=LEFT))
    assert np.array_equal(picture[:, 32:], HINTS[0][:, 32:])
    assert not np.array_equal(picture[:, :32], HINTS[0][:, :32])


def test_the_embedded_base_is_inpainted_with_although_its_latents_have_more_than_four_channels() -> None:
    base = load_base("embedded")
    image = np.full((128, 128, 3), 200, np.uint8)
    mask = np.zeros((128, 128), np.uint8)
    mask[:, :64] = 255
    init, how = Init(image=image, mask=mask), SampleSettings(steps=3, precision="fp32")
    (picture,) = generate(base, None, [], ["a red chair"], [0], how, init=init)
    assert not np.array_equal(picture[:, :64], image[:, :64])
    assert np.array_equal(picture[:, 64:], image[:, 64:])
    assert base.denoiser.config.in_channels == base.latent_channels > 4


def test_beginning_from_a_picture_copies_no_weights_and_leaves_the_base_as_it_is(base: Base) -> None:
    pipeline, parts = base.pipeline, dict(base.pipeline.components)
    ask(base, {}, slice(1), init=Init(image=HINTS[0], mask=LEFT))
    other = pick_pipeline(base, Init(image=HINTS[0], mask=LEFT))
    assert base.pipeline is pipeline
    assert all(other.components[name] is part for name, part in parts.items() if name != "scheduler")


def test_negative_prompts_count_picture_by_picture(base: Base) -> None:
    plain = ask(base, {})
    pictures = ask(base, {}, negative_prompts=["", "blur", ""])
    assert distance(pictures[:1], plain[:1]) <= 1
    assert distance(pictures[1:2], plain[1:2]) > 1


def test_an_empty_negative_prompt_means_the_same_beside_others_where_it_stands_for_zeros() -> None:
    sdxl = Base(tiny_sdxl.make_pipeline())
    assert sdxl.pipeline.config.force_zeros_for_empty_prompt
    steered = {"some": Steering(control=tiny.wake(Control.from_base(sdxl)), hints=HINTS[:2], pictures=[0, 1])}
    together = ask(sdxl, steered, negative_prompts=["", "blur", ""])
    assert distance(together[::2], ask(sdxl, steered)[::2]) <= 1
    assert distance(together[1:2], ask(sdxl, steered, negative_prompts=["blur"] * 3)[1:2]) <= 1
    assert distance(together[1:2], ask(sdxl, steered)[1:2]) > 1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"init": {"image": HINTS[0], "strength": 0.0}}, "strength is 0.0; expected above 0 and at most 1"),
        ({"init": {"image": HINTS[0], "strength": 0.2}}, "4 steps at strength 0.2 are no step at all; raise either"),
        ({"init": {"image": HINTS[0], "mask": LEFT[:32]}}, r"mask has shape \[32, 64\] for a picture of \[64, 64\]"),
        ({"init": {"image": HINTS[0][:32]}}, "init image is 64x32 px, the picture 64x64 px; expected one size"),
        ({"negative_prompts": ["blur"]}, "1 negative prompts, 3 prompts, 3 seeds; expected as many of each"),
    ],
)
def test_a_beginning_that_does_not_add_up_is_refused(base: Base, request_: dict[str, Any], said: str) -> None:
    def begin() -> None:
        ask(base, {}, **{name: Init(**value) if name == "init" else value for name, value in request_.items()})

    with pytest.raises(SampleError, match=said):
        begin()


def test_reconstruction_goes_through_the_autoencoder(base: Base) -> None:
    picture = reconstruct(base, HINTS[:2])[1]
    pixels = torch.from_numpy(HINTS[1]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        vae = base.pipeline.vae
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].clamp(-1, 1)
    expected = ((decoded.permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.abs(picture - expected).max() <= 1


def test_two_threads_with_one_base_wait_for_each_other_and_leave_nothing_behind(base: Base, control: Control) -> None:
    rows = [slice(0, 1), slice(1, 2)]
    alone = [draw(base, control, one) for one in rows]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda one: draw(base, control, one), rows))
    for found, wanted in zip(together, alone, strict=True):
        assert distance(found, wanted) == 0
    assert not [name for name, module in base.denoiser.named_modules() if "forward" in vars(module)]


def test_two_bases_that_share_a_control_wait_for_each_other_as_well(base: Base, control: Control) -> None:
    other = copy.deepcopy(base)
    began = threading.Event()

    def wait(*_: Any) -> None:
        began.set()
        time.sleep(0.2)  # for as long the other would come in between

    given = HINTS[:1], PROMPTS[:1], SEEDS[:1], SampleSettings(steps=2, precision="fp32")
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(generate, base, control, *given, on_step=wait)
        began.wait()
        two = threads.submit(generate, other, control, *given)
        assert distance(one.result(), two.result()) == 0
    assert not [name for name, module in control.named_modules() if "forward" in vars(module)]


def test_a_picture_of_no_numbers_is_an_error(base: Base, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = base.pipeline.vae.decode
    monkeypatch.setattr(base.pipeline.vae, "decode", lambda *a, **k: (decode(*a, **k)[0] * float("nan"),))
    with pytest.raises(SampleError, match="no numbers: set precision"):
        draw(base, control)


def test_a_hint_may_be_a_picture_as_for_a_rein_and_anything_else_is_named(base: Base, control: Control) -> None:
    how = SampleSettings(steps=1, precision="fp32")
    pictures = [
        generate(base, control, [hint], PROMPTS[:1], SEEDS[:1], how) for hint in (HINTS[0], Image.fromarray(HINTS[0]))
    ]
    assert distance(*pictures) == 0
    with pytest.raises(HintError, match="hint is a str; expected a PIL image or a uint8 array"):
        generate(base, control, cast(Any, ["edges.png"]), PROMPTS[:1], SEEDS[:1], how)
