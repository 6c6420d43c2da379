"""What a drawing is steered by, and what it begins from: values that are handed to `generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.errors import SampleError


@dataclass(frozen=True, kw_only=True)
class Steering:
    """One of several controls.

    Args:
        control: of the base's family.
        hints: [H, W, K] uint8: one for all pictures, or one per picture.
        strength: see `Strength`.
        mask: [H, W] uint8: where it acts, 255 inside; everywhere where None.
        pictures: which of the pictures it acts in, by their numbers, rising; all where None. The hints are then one
            for all of these, or one for each. So requests with controls of their own share a pass of the denoiser.

    Raises: SampleError: the numbers do not rise, or the control changes its base, which all pictures share.
    """

    control: Control
    hints: Sequence[np.ndarray]
    strength: Strength = field(default_factory=Strength)
    mask: np.ndarray | None = None
    pictures: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.pictures is None:
            return
        numbers = list(self.pictures)
        if not numbers or numbers[0] < 0 or numbers != sorted(set(numbers)):
            raise SampleError(f"control is to act in pictures {numbers}; expected their numbers from 0, rising")
        if self.control.base_delta:
            remedy = "draw its pictures by themselves"
            raise SampleError(f"control changes the base, which pictures {numbers} share with the others; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Init:
    """A picture to begin from.

    Args:
        image: [H, W, 3] uint8.
        strength: how far to go from it, in (0, 1]: the share of the steps that are done, on noise of their level.
        mask: [H, W] uint8: what is drawn anew is at least 128, the rest keeps its pixels; everything where None.

    Raises: SampleError: the strength is out of range, or the mask has another size.
    """

    image: np.ndarray
    strength: float = 0.75
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise SampleError(f"strength is {self.strength}; expected above 0 and at most 1")
        if self.mask is not None and self.mask.shape != self.image.shape[:2]:
            sizes = f"{list(self.mask.shape)} for a picture of {list(self.image.shape[:2])}"
            raise SampleError(f"mask has shape {sizes}; expected its height and width, in one channel")

    def keep(self, drawn: np.ndarray) -> np.ndarray:
        """The drawn picture with the pixels that were to be kept: the autoencoder gives them back only nearly."""
        return drawn if self.mask is None else np.where(self.mask[..., None] < 128, self.image, drawn)
