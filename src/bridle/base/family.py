"""A family of bases: what its pipelines consist of, and how they are told of captions. One small file each beside this.

Stable Diffusion 1 and 2: sd.py    SDXL: sdxl.py    Stable Diffusion 3: sd3.py    Flux.1: flux.py
U-Nets on pixels: pixel.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

from bridle.control.control import denoiser_of, kind_of
from bridle.control.text import Text
from bridle.errors import BaseError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs from family to family, beside the control.

    Attributes:
        name: for people.
        parts: of its pipelines, that none may lack; its text encoders' names begin with "text_encoder".
        encode: captions to what the denoiser is told of them, on the pipeline's device; what is too long is cut.
        text_to_image, image_to_image, inpaint: diffusers' stock pipelines; empty where there is none.
        optional: further parts, which a pipeline may hold or lack.
        scheduler: the one to sample with where none is named, see `bridle.sample.settings.SCHEDULERS`.
        limits: tokens that are read of a caption, by tokenizer; where not here, all that it is configured for.
        schedulers: the only ones that its stock pipelines work with; empty: any for its kind of noise schedule.
    """

    name: str
    parts: tuple[str, ...]
    encode: Callable[[Any, list[str]], Text]
    text_to_image: str
    image_to_image: str
    inpaint: str
    scheduler: str
    optional: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(part for part in (*self.parts, *self.optional) if part.startswith("text_encoder"))


# By the denoiser's class and the number of text encoders.
HOMES = {
    ("UNet2DConditionModel", 1): "bridle.base.sd",
    ("UNet2DConditionModel", 2): "bridle.base.sdxl",
    ("SD3Transformer2DModel", 3): "bridle.base.sd3",
    ("FluxTransformer2DModel", 2): "bridle.base.flux",
    ("UNet2DModel", 0): "bridle.base.pixel",
}


def family_of(pipeline: Any) -> Family:
    """Raises: BaseError: it belongs to none."""
    count = sum(name.startswith("text_encoder") for name in getattr(pipeline, "components", {}))
    return find_family(kind_of(denoiser_of(pipeline)), count, "base")


def find_family(kind: str, count: int, owner: str) -> Family:
    """Of a denoiser's class and the number of text encoders beside it.

    Args: owner: what errors call the base. Raises: BaseError: there is none.
    """
    if (kind, count) not in HOMES:
        known = ", ".join(f"{kind} with {count} text encoders" for kind, count in HOMES)
        raise BaseError(f"{owner} is a {kind} with {count} text encoders; expected {known}")
    return cast(Family, import_module(HOMES[kind, count]).FAMILY)
