"""From hints and prompts to pictures: the base's own stock pipelines, with controls attached.

Each picture has a seed of its own, so it comes out the same alone and in a batch but for rounding, which in bfloat16 is
more than a level of 256.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bridle.base.base import Base
from bridle.base.tokens import quiet_about_cuts
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.hint import to_array, to_hint
from bridle.control.strength import Strength
from bridle.errors import HintError, SampleError
from bridle.kernels.precision import TYPES, Precision, choose_precision, computing
from bridle.kernels.stand_in import stand_in
from bridle.sample.hasten import hasten
from bridle.sample.pipelines import arguments, inpaintable, pick_pipeline
from bridle.sample.recall import SPEEDS, recalled
from bridle.sample.scheduler import set_scheduler
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Init, Steering

LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The pictures that are denoised at once."""

    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    seeds: Sequence[int]
    steering: Mapping[str, Steering]


def generate(
    base: Base,
    control: Control | Mapping[str, Steering] | None,
    hints: Sequence[np.ndarray | Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings = SampleSettings(),  # noqa: B008 - frozen, so it can be shared
    size_px: tuple[int, int] | None = None,
    on_step: Callable[[], None] | None = None,
    *,
    negative_prompts: Sequence[str] | None = None,
    init: Init | None = None,
    strict: bool = True,
) -> list[np.ndarray]:
    """Draw one picture per prompt.

    Args:
        control: one that is steered by `hints`, or several by name, each with hints of its own. None, or a scale of 0,
            draws the same pictures without control.
        hints: N arrays [H, W, K] uint8, or PIL images, all of one size, or a single one for all; unused without
            control, and for several.
        prompts, seeds: N of each.
        settings: its scale multiplies every control's.
        size_px: height and width; where None those of the init image, of the hints, or of the base.
        on_step: called after every pass of the denoiser; what it raises ends the drawing.
        negative_prompts: N, or None: empty ones.
        init: a picture to begin from, for image-to-image and inpainting.
        strict: whether a picture that overflows is an error; where not, it is black there.

    Returns: N pictures [H, W, 3] uint8.
    Raises: SampleError: the numbers differ, the family cannot do it, or a picture overflows. HintError: a hint does not
        fit.
    """
    hints = to_arrays(hints, control.hint_channels if isinstance(control, Control) else 3)
    steering = settle(control, hints, settings)
    check_numbers(steering, prompts, negative_prompts, seeds)
    all_hints = [*hints, *(hint for one in steering.values() for hint in one.hints)]  # also without control: their size
    size_px = pick_size(base, all_hints, init, size_px)
    if init is not None and int(settings.steps * init.strength) < 1:
        raise SampleError(f"{settings.steps} steps at strength {init.strength} are no step at all; raise either")
    pictures = []
    precision = choose_precision(settings.precision, base.device, base.denoiser.dtype)
    with (
        alone_with(base.denoiser, base.vae, *(one.control for one in steering.values())),
        computing(precision, base.device) if casts(base, precision) else nullcontext(),
        exempt(base.encoders) if precision == "fp16" else nullcontext(),
        hasten(base.pipeline, *(one.control for one in steering.values()), pack_weights=settings.pack_weights),
    ):
        set_scheduler(base, settings.scheduler)
        for rows in batches(base, len(prompts), negative_prompts, settings.batch):
            batch = Batch(
                prompts=prompts[rows],
                negative_prompts=negative_prompts[rows] if negative_prompts else [],
                seeds=seeds[rows],
                steering={name: own for name, one in steering.items() if (own := cut(one, rows))},
            )
            pictures += draw(base, batch, settings, size_px, init, on_step, strict)
    return pictures


@contextmanager
def alone_with(*models: nn.Module | None) -> Generator[None]:
    """Of two threads that draw with one model the second waits: what hastens and steers it, all calls of it see."""
    with ExitStack() as held:
        # In one order in all threads, or two could wait for each other.
        for model in sorted({model for model in models if model is not None}, key=id):
            held.enter_context(LOCKS.setdefault(model, RLock()))
        yield


def batches(base: Base, count: int, negative_prompts: Sequence[str] | None, most: int) -> Iterator[slice]:
    """Which pictures are drawn at once: neighbours.

    SDXL's pipelines are told zeros in place of an empty negative prompt, but only where none of the batch has another:
    of such a base no picture shares a batch with one that has what it lacks.
    """
    told = [bool(text) for text in negative_prompts or [""] * count]
    if not base.pipeline.config.get("force_zeros_for_empty_prompt"):
        told = [False] * count
    start = 0
    while start < count:
        stop = min(start + most, count)
        stop = next((at for at in range(start, stop) if told[at] != told[start]), stop)
        yield slice(start, stop)
        start = stop


def casts(base: Base, precision: Precision) -> bool:
    """Whether autocast is needed to compute so; stock pipelines do without where the weights are of that type."""
    kinds = {cast(Any, model).dtype for model in (base.denoiser, *base.encoders)}
    plain = kinds == {TYPES[precision]} and (base.device.type == "cuda" or precision != "bf16")
    return precision != "fp32" and not plain


@contextmanager
def exempt(encoders: Sequence[nn.Module]) -> Generator[None]:
    """Have autocast leave autoencoder and text encoders alone where their weights are float32.

    Those of SDXL and Stable Diffusion 3 overflow in float16, which stock pipelines know how to avoid in theirs.
    """

    def make(compute: Callable[..., Any]) -> Callable[..., Any]:
        def in_full(*given: Any, **named: Any) -> Any:
            given = tuple(in_float32(one) for one in given)
            with torch.autocast(device, enabled=False):
                return compute(*given, **named)

        return in_full

    with ExitStack() as around:
        # An autoencoder is called by its parts.
        for part in [part for encoder in encoders for part in (encoder, *encoder.children())]:
            weight = next(part.parameters(), None)
            if weight is not None and weight.dtype is torch.float32:
                device = weight.device.type
                around.callback(stand_in(part, make))
        yield


def in_float32(given: Any) -> Any:
    return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given


def draw(
    base: Base,
    batch: Batch,
    settings: SampleSettings,
    size_px: tuple[int, int],
    init: Init | None,
    on_step: Callable[[], None] | None,
    strict: bool,
) -> list[np.ndarray]:
    """One batch, by the stock pipeline of its kind."""
    pipeline = pick_pipeline(base, init)

    def after_pass(*args: Any) -> None:  # a hook, for not every pipeline calls back
        if on_step is not None:
            on_step()

    def call() -> list[np.ndarray]:
        how = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "output_type": "np"}
        if any(batch.negative_prompts):
            how["negative_prompt"] = list(batch.negative_prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        with inpaintable(pipeline, init), quiet_about_cuts(pipeline):
            output = pipeline(**arguments(pipeline, init, batch.prompts, size_px, how), generator=generators)
        if strict and not np.isfinite(output.images).all():
            remedy = "set precision to 'bf16' or 'fp32', or look for NaN among the weights"
            raise SampleError(f"picture holds values that are no numbers: {remedy}")
        pictures = [np.round(np.nan_to_num(image) * 255).astype(np.uint8) for image in output.images]
        return pictures if init is None else [init.keep(picture) for picture in pictures]

    with ExitStack() as around:
        around.callback(base.denoiser.register_forward_hook(after_pass).remove)
        around.enter_context(torch.no_grad())
        rig = None
        if batch.steering:
            rig = around.enter_context(attach(pipeline, **{name: one.control for name, one in batch.steering.items()}))
            for name, one in batch.steering.items():
                rein = rig[name].set(hint=stack(one.hints, one.control.hint_channels), mask=one.mask)
                rein.strength = one.strength
                rein.pictures = None if one.pictures is None else tuple(one.pictures)
        if settings.speed in SPEEDS:
            around.enter_context(recalled(pipeline, rig, SPEEDS[settings.speed]))
        return call()


def settle(
    control: Control | Mapping[str, Steering] | None, hints: Sequence[np.ndarray], settings: SampleSettings
) -> dict[str, Steering]:
    """All controls by name, the settings' scale in each one's; those that pull at nothing are left out."""
    if control is None:
        return {}
    if isinstance(control, Control):
        control = {"control": Steering(control=control, hints=hints, strength=Strength(half=settings.half))}
    scaled = {name: replace(one, strength=rescale(one.strength, settings.scale)) for name, one in control.items()}
    return {name: one for name, one in scaled.items() if one.strength.scale != 0}


def to_arrays(hints: Sequence[np.ndarray | Image.Image], channels: int) -> list[np.ndarray]:
    """PIL images as arrays, [H, W] for a control of one channel. Raises: HintError: a hint is neither."""
    found = []
    for hint in hints:
        if isinstance(hint, Image.Image):
            hint = to_array(hint, channels)
        if not isinstance(hint, np.ndarray):
            raise HintError(f"hint is a {type(hint).__name__}; expected a PIL image or a uint8 array [H, W, K]")
        found.append(hint)
    return found


def rescale(strength: Strength, scale: float) -> Strength:
    return replace(strength, scale=strength.scale * scale)


def cut(one: Steering, rows: slice) -> Steering | None:
    """Of some of the pictures; a single hint is everybody's. None where it acts in none of them."""
    if one.pictures is None:
        return one if len(one.hints) == 1 else replace(one, hints=one.hints[rows])
    places = [place for place, picture in enumerate(one.pictures) if rows.start <= picture < rows.stop]
    if not places:
        return None
    hints = one.hints if len(one.hints) == 1 else [one.hints[place] for place in places]
    return replace(one, hints=hints, pictures=[one.pictures[place] - rows.start for place in places])


def check_numbers(
    steering: Mapping[str, Steering],
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    seeds: Sequence[int],
) -> None:
    asked = f"{len(prompts)} prompts, {len(seeds)} seeds; expected as many of each"
    if len(prompts) != len(seeds):
        raise SampleError(asked)
    if negative_prompts is not None and len(negative_prompts) != len(prompts):
        raise SampleError(f"{len(negative_prompts)} negative prompts, {asked}")
    for one in steering.values():
        if one.pictures is not None and max(one.pictures) >= len(prompts):
            raise SampleError(f"control is to act in pictures {list(one.pictures)}; of {asked}")
        if len(one.hints) not in (1, len(prompts if one.pictures is None else one.pictures)):
            raise SampleError(f"{len(one.hints)} hints, {asked}, or one hint for all")


def pick_size(
    base: Base, hints: Sequence[np.ndarray], init: Init | None, size_px: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width. Raises: SampleError: the base cannot draw that size."""
    pictures = [*([init.image] if init else []), *hints]
    height, width = size_px or (pictures[0].shape[:2] if pictures else (base.size_px, base.size_px))
    step_px = base.size_factor * base.control_class.PATCH
    if min(height, width) < 1 or height % step_px or width % step_px:
        raise SampleError(f"picture is {width}x{height} px; expected multiples of {step_px}: resize or crop")
    if base.vae is None and (height, width) != (base.size_px, base.size_px):
        raise SampleError(f"picture is {width}x{height} px; this base draws {base.size_px}x{base.size_px} px alone")
    if init is not None and init.image.shape[:2] != (height, width):
        given = f"{init.image.shape[1]}x{init.image.shape[0]}"
        raise SampleError(f"init image is {given} px, the picture {width}x{height} px; expected one size: resize it")
    return height, width


def stack(hints: Sequence[np.ndarray], channels: int) -> Tensor:
    """N hints [H, W, K] uint8 to one tensor [N, K, H, W] in [0, 1]. Raises: SampleError: their sizes differ."""
    sizes = {hint.shape[:2] for hint in hints}
    if len(sizes) > 1:
        raise SampleError(f"hints of sizes {sorted(sizes)} in one batch; expected one size: resize them alike")
    return torch.cat([to_hint(hint, channels) for hint in hints])


def reconstruct(base: Base, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures through the autoencoder and back: the best that this base can draw. [H, W, 3] uint8 in and out."""
    pictures = []
    for image in images:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = base.decode(base.encode_images(pixels)[0])
        pictures.append(((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    return pictures
