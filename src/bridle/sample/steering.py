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
    """

    control: Control
    hints: Sequence[np.ndarray]
    strength: Strength = field(default_factory=Strength)
    mask: np.ndarray | None = None


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
