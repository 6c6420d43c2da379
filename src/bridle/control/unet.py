"""The control of a U-Net: a trainable copy of its encoder and middle block, and a zero convolution per link.

In: noisy latents, timesteps, text and a hint. Out: `Residuals`. Composed from the base's own modules, never retyped;
parameter names and configuration are those of diffusers' `ControlNetModel`, so a saved control loads there.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from bridle.control.block import zero_conv
from bridle.control.hint import HintEncoder, build_hint_encoder, check_hint, official_channels
from bridle.control.residuals import Residuals
from bridle.errors import BaseError, ConfigError

Links = Literal["all", "middle"]
COPIED = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
# Conditions of other families (SDXL and later); a base that asks for one of them is refused, not half-served.
UNSUPPORTED = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")


class Control(nn.Module):
    """The trainable branch. Make one with `Control.from_base`, or load one with `bridle.load_control`.

    Args:
        parts: the five copied modules, under diffusers' names.
        config: what diffusers' `ControlNetModel` would be configured with.
        hint_encoder: "official" (loads elsewhere) or "paper" (Bridle only).
        links: "all" 13, or "middle": the 12 skip links are neither computed nor trained.
        size_factor: pixels per latent in each direction.

    Attributes:
        base_delta: what training changed in the base, see `bridle.control.delta`; empty where the base stayed locked.
            `attach` applies it. No parameter: it is neither trained nor moved.
    """

    base_delta: dict[str, Tensor]
    conv_in: nn.Conv2d
    down_blocks: nn.ModuleList

    def __init__(
        self,
        parts: Mapping[str, Any],
        config: dict[str, Any],
        hint_encoder: HintEncoder,
        links: Links,
        size_factor: int,
    ) -> None:
        super().__init__()
        if links not in ("all", "middle"):
            raise ConfigError(f"links is {links!r}; expected 'all' or 'middle'")
        self.config, self.hint_encoder, self.links, self.size_factor = config, hint_encoder, links, size_factor
        self.base_delta = {}
        self.conv_in = parts["conv_in"]
        self.time_proj = parts["time_proj"]
        self.time_embedding = parts["time_embedding"]
        self.down_blocks = parts["down_blocks"]
        self.mid_block = parts["mid_block"]
        width = config["block_out_channels"][0]
        self.controlnet_cond_embedding = build_hint_encoder(hint_encoder, self.hint_channels, width, size_factor)
        widths = link_widths(self.conv_in, self.down_blocks)
        self.controlnet_down_blocks = nn.ModuleList([zero_conv(width, width) for width in widths])
        self.controlnet_mid_block = zero_conv(widths[-1], widths[-1])

    @classmethod
    def from_base(
        cls,
        base: Any,
        *,
        hint_channels: int = 3,
        hint_encoder: HintEncoder = "official",
        links: Links = "all",
        size_factor: int = 8,
    ) -> Self:
        """Copy the encoder and the middle block of a base.

        Args:
            base: a `UNet2DConditionModel`, or a pipeline that has one as `unet`; it is left as it is.
            hint_channels: of the hint: 1 for a mask, 3 for a picture, any other number as well.

        Raises: BaseError: the base is no such U-Net, or needs conditions that are not supported yet.
        """
        unet = getattr(base, "unet", base)
        check_base(unet)
        if hint_channels < 1:
            raise ConfigError(f"hint_channels is {hint_channels}; expected 1 or more")
        parts = {name: copy.deepcopy(getattr(unet, name)).requires_grad_(True) for name in COPIED}
        config = control_config(unet, hint_channels, size_factor)
        return cls(parts, config, hint_encoder, links, size_factor).to(unet.device, unet.dtype)

    @property
    def hint_channels(self) -> int:
        return int(self.config["conditioning_channels"])

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, hint: Tensor) -> Residuals:
        """What this control adds at every link.

        Args:
            latents: [B, C, h, w], noisy.
            timesteps: [B] or a scalar, integers in the base's schedule.
            text: [B, L, D], the text encoder's states.
            hint: [B, K, H, W] in [0, 1], with H = size_factor * h and W likewise.

        Raises: HintError: the hint's shape does not fit.
        """
        height, width = latents.shape[-2] * self.size_factor, latents.shape[-1] * self.size_factor
        check_hint(hint, self.hint_channels, (height, width))
        return self.residuals(latents, timesteps, text, self.encode(hint))

    def encode(self, hint: Tensor) -> Tensor:
        """E(hint): [B, K, H, W] to features [B, C, h, w]. They depend on no timestep: sampling computes them once."""
        features: Tensor = self.controlnet_cond_embedding(hint.to(self.dtype))
        return features

    def residuals(self, latents: Tensor, timesteps: Tensor, text: Tensor, features: Tensor) -> Residuals:
        """The same as calling the control, with the hint already encoded."""
        time = self.time_proj(timesteps.expand(len(latents))).to(latents.dtype)
        time = self.time_embedding(time)
        sample = self.conv_in(latents) + features  # the hint enters once, right after the first convolution
        skips: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            sample, outputs = call_block(block, sample, time, text)
            skips += outputs
        sample = call_block(self.mid_block, sample, time, text)
        return Residuals(self._open(skips), self.controlnet_mid_block(sample))

    def _open(self, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.links == "middle":
            return tuple(skip.new_zeros(1, 1, 1, 1) for skip in skips)
        return tuple(conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True))


def call_block(block: nn.Module, sample: Tensor, time: Tensor, text: Tensor) -> Any:
    """diffusers' blocks take the text only where they attend to it."""
    if getattr(block, "has_cross_attention", False):
        return block(sample, time, encoder_hidden_states=text)
    return block(sample, time)


def link_widths(conv_in: Any, down_blocks: Iterable[Any]) -> list[int]:
    """The channels of each skip connection, read off the modules themselves."""
    widths = [conv_in.out_channels]
    for block in down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [sampler.out_channels for sampler in block.downsamplers or ()]
    return widths


def check_base(unet: Any) -> None:
    """Raises: BaseError: no control can be made for this model."""
    if not isinstance(unet, UNet2DConditionModel):
        expected = "a diffusers UNet2DConditionModel, or a pipeline with one"
        raise BaseError(f"base is a {type(unet).__name__}; expected {expected}")
    asked = [name for name in UNSUPPORTED if unet.config.get(name) is not None]
    if asked:
        remedy = "use a base of the Stable Diffusion 1 or 2 kind"
        raise BaseError(f"base needs {', '.join(asked)}, which controls do not carry yet: {remedy}")


def control_config(unet: Any, hint_channels: int, size_factor: int) -> dict[str, Any]:
    """diffusers' `ControlNetModel` settings for a base: every one that the two classes share."""
    shared = inspect.signature(ControlNetModel.__init__).parameters.keys() & unet.config.keys()
    return {name: unet.config[name] for name in sorted(shared)} | {
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": official_channels(size_factor),
        "controlnet_conditioning_channel_order": "rgb",
    }
