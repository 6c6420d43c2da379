"""What a control hands to the base: one tensor per link, as a value that can be scaled, masked and summed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bridle.errors import ConfigError


@dataclass(frozen=True)
class Residuals:
    """The outputs of the zero convolutions, in the order of diffusers.

    Attributes:
        down: one [B, C, h, w] per skip connection, the base's first convolution first (12 for Stable Diffusion); a link
            that is not connected is a zero of shape [1, 1, 1, 1].
        mid: [B, C, h, w], added to the middle block's output.
    """

    down: tuple[Tensor, ...]
    mid: Tensor

    @property
    def links(self) -> tuple[Tensor, ...]:
        """All of them, the middle last: 13 for Stable Diffusion."""
        return (*self.down, self.mid)

    @classmethod
    def from_links(cls, links: Sequence[Tensor]) -> "Residuals":
        return cls(tuple(links[:-1]), links[-1])

    def scaled(self, scale: float | Sequence[float]) -> "Residuals":
        """Multiply by one factor, or by one per link (the middle last). Raises: ConfigError: their number is wrong."""
        scales = [scale] * len(self.links) if isinstance(scale, (int, float)) else list(scale)
        if len(scales) != len(self.links):
            raise ConfigError(f"{len(scales)} scales for {len(self.links)} links; give one number, or one per link")
        return Residuals.from_links([link * factor for link, factor in zip(self.links, scales, strict=True)])

    def masked(self, mask: Tensor) -> "Residuals":
        """Weight by a region: mask [1 or B, 1, H, W] in [0, 1], of any size, averaged down to each link's."""

        def shrink(link: Tensor) -> Tensor:
            return F.interpolate(mask.to(link), size=link.shape[-2:], mode="area")

        return Residuals.from_links([link * shrink(link) for link in self.links])

    def __add__(self, other: "Residuals") -> "Residuals":
        """Several controls are summed (arXiv:2302.05543, section 3.4)."""
        return Residuals.from_links([a + b for a, b in zip(self.links, other.links, strict=True)])

    def to(self, dtype: torch.dtype) -> "Residuals":
        return Residuals.from_links([link.to(dtype) for link in self.links])
