"""What a control hands to the base: one tensor per link, as a value that can be scaled, masked and summed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bridle.errors import ConfigError


@dataclass(frozen=True)
class Residuals:
    """The outputs of the zero convolutions.

    Attributes:
        links: in the order in which the base takes them. A U-Net's: one [B, C, h, w] per skip connection, that of its
            first convolution first, then the middle block's (13 for Stable Diffusion); a link that is not connected is
            a zero of shape [1, 1, 1, 1]. A transformer's: one [B, L, D] per block.
        grid: where links are tokens: the rows and columns that the L picture tokens of each stand for.
        first: where links are for two kinds of blocks: how many are for the first kind.
    """

    links: tuple[Tensor, ...]
    grid: tuple[int, int] | None = None
    first: int | None = None

    @property
    def down(self) -> tuple[Tensor, ...]:
        """Of a U-Net: what is added to the skip connections."""
        return self.links[:-1]

    @property
    def mid(self) -> Tensor:
        """Of a U-Net: what is added to the middle block's output."""
        return self.links[-1]

    def scaled(self, scale: float | Sequence[float]) -> "Residuals":
        """Multiply by one factor, or by one per link. Raises: ConfigError: their number is wrong."""
        scales = [scale] * len(self.links) if isinstance(scale, (int, float)) else list(scale)
        if len(scales) != len(self.links):
            raise ConfigError(f"{len(scales)} scales for {len(self.links)} links; give one number, or one per link")
        return replace(self, links=tuple(link * factor for link, factor in zip(self.links, scales, strict=True)))

    def masked(self, mask: Tensor) -> "Residuals":
        """Weight by a region: mask [1 or B, 1, H, W] in [0, 1], of any size, averaged down to each link's."""
        return replace(self, links=tuple(link * self._shrink(mask, link) for link in self.links))

    def _shrink(self, mask: Tensor, link: Tensor) -> Tensor:
        if self.grid is None:
            return F.interpolate(mask.to(link), size=link.shape[2:], mode="area")
        return F.interpolate(mask.to(link), size=self.grid, mode="area").flatten(2).transpose(1, 2)

    def __add__(self, other: "Residuals") -> "Residuals":
        """Several controls are summed (arXiv:2302.05543, section 3.4)."""
        return replace(self, links=tuple(a + b for a, b in zip(self.links, other.links, strict=True)))

    def to(self, dtype: torch.dtype) -> "Residuals":
        return replace(self, links=tuple(link.to(dtype) for link in self.links))
