"""A sampling recipe: all that one picture is drawn from, as a value. Written as TOML or JSON, and kept in the PNG.

Paths are relative to the folder that the command runs in, as everywhere in Bridle.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bridle.control.half import Half
from bridle.control.rein import guess_mode
from bridle.control.strength import Guess, Strength
from bridle.errors import ConfigError
from bridle.sample.settings import SampleSettings, Speed


@dataclass(frozen=True, kw_only=True)
class ControlRecipe:
    """One control. Every field can be set in the recipe under [[controls]].

    Args:
        file: a control's folder, or any file that `load_control` reads.
        hint: its hint as a picture; or
        image: a picture to make the hint of, with `annotator`.
        annotator: what made the hints in training where None, as the control's file says; "canny" where it does not.
        scale, start, end, keyframes: see `Strength`.
        weights, half: see `Strength`; where neither they nor `guess` are given, "even" and the control's own half.
        guess: guess mode in that definition; it stands for weights and half.
        mask: where it acts: a picture, white inside.

    Raises: ConfigError: not one of hint and image is given, or a value is out of range.
    """

    file: Path
    hint: Path | None = None
    image: Path | None = None
    annotator: str | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    weights: str | tuple[float, ...] | None = None
    keyframes: tuple[tuple[float, float], ...] = ()
    half: Half | None = None
    guess: Guess | None = None
    mask: Path | None = None

    def __post_init__(self) -> None:
        if (self.hint is None) == (self.image is None):
            raise ConfigError(f"control {self.file} needs one hint; give it a hint, or an image with annotator")
        _ = self.strength

    @property
    def strength(self) -> Strength:
        """Raises: ConfigError: a value is out of range."""
        named = guess_mode(self.guess, self.weights, self.half)
        named |= {name: value for name, value in (("weights", self.weights), ("half", self.half)) if value is not None}
        return Strength(scale=self.scale, start=self.start, end=self.end, keyframes=self.keyframes, **named)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One picture.

    Args:
        prompt, negative_prompt: what to draw, and what not.
        seed: of the noise.
        base: as `load_base` takes it.
        width_px, height_px: of the picture; the base's own size where None.
        steps, guidance, scheduler, precision, speed: see `SampleSettings`. A picture says what an "auto" precision was,
            so that the same one can be drawn elsewhere.
        controls: any number; what they add is summed.
        init: a picture to begin from, cut and resized to the size.
        strength: how far to go from it, in (0, 1].
        mask: a picture, white where the init image is drawn anew: inpainting.

    Raises: ConfigError: a value is out of range, or a mask is given without an init image.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    base: str = "embedded"
    width_px: int | None = None
    height_px: int | None = None
    steps: int = 20
    guidance: float = 4.0
    scheduler: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    speed: Speed = "exact"
    controls: tuple[ControlRecipe, ...] = ()
    init: Path | None = None
    strength: float = 0.75
    mask: Path | None = None

    def __post_init__(self) -> None:
        _ = self.settings
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more, below 2^63")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; expected above 0 and at most 1")
        if self.mask is not None and self.init is None:
            raise ConfigError(f"mask {self.mask} says where an init image is drawn anew; add init, the picture")
        for side in ("width_px", "height_px"):
            if getattr(self, side) is not None and getattr(self, side) < 1:
                raise ConfigError(f"{side} is {getattr(self, side)}; expected 1 or more")

    @property
    def settings(self) -> SampleSettings:
        """Raises: ConfigError: a value is out of range."""
        named = {name: getattr(self, name) for name in ("steps", "guidance", "scheduler", "precision", "speed")}
        return SampleSettings(**named)

    @property
    def files(self) -> list[Path]:
        """All that the picture is drawn from, but the base."""
        named = [path for one in self.controls for path in (one.file, one.hint, one.image, one.mask)]
        return [path for path in [*named, self.init, self.mask] if path is not None]


def to_table(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, such as JSON holds; what is None is left out. `bridle.config.build` reads it back."""
    return plain(dataclasses.asdict(recipe))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
