"""What the cache asks of a base model, and the one way from pixels to tensors."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bridle.control.text import Text
from bridle.data.example import Pixels


class Encoders(Protocol):
    """The frozen parts of a base that training needs only once per pair."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever an encoder's output does: a hash of its weights and settings."""

    @property
    def size_factor(self) -> int:
        """Pixels per latent, along each side; 8 for Stable Diffusion."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures to the posterior of their latents.

        Args: pixels: [B, 3, H, W] float32 in [-1, 1].
        Returns: mean and standard deviation, each [B, C, h, w], already times the base's scaling factor.
        """

    def encode_hints(self, hints: Tensor) -> Tensor:
        """Prepare hints [B, K, H, W] uint8 for the control. Returns: the same, or floats [B, ...] of any shape."""

    def encode_captions(self, captions: list[str]) -> Text:
        """Encode N captions to one length."""

    @property
    def max_tokens(self) -> int:
        """As many tokens of a caption are read; the rest is cut off."""

    def count_tokens(self, captions: list[str]) -> list[int]:
        """Of each caption, uncut."""


def to_pixels(images: Sequence[Pixels]) -> Tensor:
    """B pictures [H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1]."""
    return to_channels_first(images).float() / 127.5 - 1


def to_channels_first(pictures: Sequence[Pixels]) -> Tensor:
    """B pictures or hints [H, W, K] uint8 to [B, K, H, W] uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
