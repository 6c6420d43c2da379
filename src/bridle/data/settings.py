"""Which data, and how it is prepared. Every field but `folder` is part of the cache's fingerprint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridle.data.annotate import check_name
from bridle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How pairs are read and drawn.

    Args:
        folder: the data set; see `sources.open_source` for the layouts.
        annotator: what makes the hints of a data set that brings none.
        size_px: side of the square that every pair is cut to, a multiple of 8 from 16: SSIM has windows of 11 pixels.
        held_out: pairs kept out of training, for previews and measuring.
        variants: how often each training pair is cached, under different draws of crop, flip and annotator.
        flip: mirror every other training pair. Turn it off where left and right, or writing, matter.
        crop: where training pairs wider or taller than a square are cut.
        seed: of all draws; any integer from 0.

    Raises: ConfigError: a value is out of range.
    """

    folder: Path
    annotator: str = "canny"
    size_px: int = 128
    held_out: int = 16
    variants: int = 1
    flip: bool = True
    crop: Literal["random", "center"] = "center"
    seed: int = 0

    def __post_init__(self) -> None:
        check_name(self.annotator)
        if self.size_px < 16 or self.size_px % 8:
            expected = "a multiple of 8 from 16, such as 128 or 512"
            raise ConfigError(f"setting data.size_px is {self.size_px}; expected {expected}")
        for name, least in (("held_out", 0), ("variants", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"setting data.{name} is {value}; expected {least} or more")
        if self.crop not in ("random", "center"):
            raise ConfigError(f'setting data.crop is {self.crop!r}; expected "random" or "center"')
