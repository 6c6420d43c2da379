"""The control of a U-Net: a trainable copy of its encoder and middle block, and a zero convolution per link.

Stable Diffusion 1 and 2, and SDXL. Composed from the base's own modules, never retyped; parameter names and
configuration are those of diffusers' `ControlNetModel`, so a saved control loads there.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from bridle.control.block import zero_conv
from bridle.control.control import Call, Control, Links
from bridle.control.hint import HintEncoder, build_hint_encoder, check_hint, official_channels
from bridle.control.residuals import Residuals
from bridle.control.text import Text
from bridle.errors import BaseError, ConfigError

COPIED = ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block")
ADDED = ("add_time_proj", "add_embedding")  # only where the base is told sizes and one vector per caption: SDXL
# Conditions of bases that no control carries; one that asks for them is refused, not half-served.
UNSUPPORTED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
# What diffusers' `ControlNetModel` cannot be told, or Bridle not read back: a control would be trained and never load.
PLAIN = {
    "time_cond_proj_dim": None,
    "timestep_post_act": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "conv_in_kernel": 3,
    "attention_type": "default",
    "resnet_time_scale_shift": "default",
    "cross_attention_norm": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
}
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D"}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


class UNetControl(Control):
    """The trainable copy of a `UNet2DConditionModel`'s encoder.

    Args:
        parts: the copied modules, under diffusers' names.
        config: what diffusers' `ControlNetModel` would be configured with.
    """

    CLASS = "ControlNetModel"
    SHARED = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
    SKIPS = ("controlnet_down_blocks.",)
    DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")  # what the official code unlocks

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
        super().__init__(config, hint_encoder, links, size_factor)
        self.conv_in = parts["conv_in"]
        self.time_proj = parts["time_proj"]
        self.time_embedding = parts["time_embedding"]
        self.add_time_proj: Any = parts.get("add_time_proj")
        self.add_embedding: Any = parts.get("add_embedding")
        self.down_blocks = parts["down_blocks"]
        self.mid_block = parts["mid_block"]
        width = config["block_out_channels"][0]
        self.controlnet_cond_embedding = build_hint_encoder(hint_encoder, self.hint_channels, width, size_factor)
        widths = link_widths(self.conv_in, self.down_blocks)
        self.controlnet_down_blocks = nn.ModuleList([zero_conv(width, width) for width in widths])
        self.controlnet_mid_block = zero_conv(widths[-1], widths[-1])

    @classmethod
    def check_base(cls, denoiser: Any) -> None:
        asked = [name for name in UNSUPPORTED if denoiser.config.get(name) is not None]
        if denoiser.config.get("addition_embed_type") not in (None, "text_time"):
            asked.append(f"addition_embed_type {denoiser.config.addition_embed_type!r}")
        extra = denoiser.config.in_channels - denoiser.config.out_channels
        if extra:
            asked.append(f"{extra} channels beside the noisy ones, as for inpainting or another picture")
        if asked:
            remedy = "use a base of the Stable Diffusion 1, 2 or XL kind"
            raise BaseError(f"base needs {', '.join(asked)}, which controls do not carry: {remedy}")
        if denoiser.mid_block is None:
            remedy = "use a base that has one, or make the control with Control.for_module"
            raise BaseError(f"base has no middle block, which controls copy: {remedy}")

    @classmethod
    def copy_of(
        cls,
        denoiser: Any,
        hint_channels: int,
        hint_encoder: HintEncoder,
        links: Links,
        size_factor: int,
        layers: int | None,
    ) -> Self:
        """Copy the encoder and the middle block."""
        if layers is not None:
            raise ConfigError(f"layers is {layers}, but of a U-Net the whole encoder is copied; leave it out")
        # Such a base can still be drawn with, and steered by the controls of others.
        if other := ", ".join(f"{name} {value!r}" for name, value in unusual(denoiser.config)):
            remedy = "train on a base of the Stable Diffusion 1, 2 or XL kind"
            raise BaseError(f"base has {other}, which no file of a control can say, so none could be loaded: {remedy}")
        parts = {name: copy.deepcopy(part).requires_grad_(True) for name, part in parts_of(denoiser).items()}
        config = control_config(denoiser, hint_channels, size_factor)
        return cls(parts, config, hint_encoder, links, size_factor).to(denoiser.device, denoiser.dtype)

    @classmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> Self:
        model: Any = ControlNetModel.from_config(config)
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        halvings = len(settings["conditioning_embedding_out_channels"]) - 1
        hint_encoder, links = facts.get("hint_encoder", "official"), facts.get("links", "all")
        return cls(parts_of(model), settings, hint_encoder, links, facts.get("size_factor", 2**halvings))

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def pools(self) -> bool:
        return bool(self.config.get("global_pool_conditions"))

    @property
    def zero_layers(self) -> list[nn.Module]:
        return [*self.controlnet_down_blocks, self.controlnet_mid_block]

    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        call = {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text.states}
        if text.pooled is None:
            return call
        # Pictures are trained on as they are cut: made at this size, nothing cropped. So do stock pipelines by default.
        height, width = latents.shape[-2] * self.size_factor, latents.shape[-1] * self.size_factor
        sizes = text.pooled.new_zeros(6)  # filled where it is: a CUDA graph may not copy from the CPU
        sizes[0::4], sizes[1::4] = height, width  # height, width, 0, 0, height, width
        added = {"text_embeds": text.pooled, "time_ids": sizes.expand(len(latents), -1)}
        return call | {"added_cond_kwargs": added}

    def check_hint(self, hint: Tensor, call: Call) -> None:
        height, width = call["sample"].shape[-2:]
        check_hint(hint, self.hint_channels, (height * self.size_factor, width * self.size_factor))

    def encode(self, hint: Tensor) -> Tensor:
        """E(hint): [B, K, H, W] to features [B, C, h, w]."""
        if self.config.get("controlnet_conditioning_channel_order") == "bgr":
            hint = hint.flip(1)
        features: Tensor = self.controlnet_cond_embedding(hint.to(self.dtype))
        return features

    def residuals(self, call: Call, features: Tensor) -> Residuals:
        latents, text = call["sample"], call.get("encoder_hidden_states")
        time = self._embed_time(call)
        sample = self.conv_in(latents) + features  # the hint enters once, right after the first convolution
        skips: tuple[Tensor, ...] = (sample,)
        for block in self.down_blocks:
            sample, outputs = call_block(block, sample, time, text)
            skips += outputs
        sample = call_block(self.mid_block, sample, time, text)
        links = (*self._open(skips), self.controlnet_mid_block(sample))
        if self.pools:
            links = tuple(link.mean((2, 3), keepdim=True) for link in links)
        return Residuals(links)

    def _embed_time(self, call: Call) -> Tensor:
        latents = call["sample"]
        timesteps = torch.as_tensor(call["timestep"], device=latents.device).expand(len(latents))
        time: Tensor = self.time_embedding(self.time_proj(timesteps).to(latents.dtype))
        if self.add_embedding is None:
            return time
        pooled, sizes = call["added_cond_kwargs"]["text_embeds"], call["added_cond_kwargs"]["time_ids"]
        sizes = self.add_time_proj(sizes.flatten()).reshape(len(pooled), -1)
        added: Tensor = self.add_embedding(torch.cat([pooled, sizes], dim=-1).to(time.dtype))
        return time + added

    def _open(self, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.links == "middle":
            return tuple(skip.new_zeros(1, 1, 1, 1) for skip in skips)
        return tuple(conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True))

    def keywords(self, residuals: Residuals) -> dict[str, Any]:
        return {
            "down_block_additional_residuals": residuals.down,
            "mid_block_additional_residual": residuals.mid,
        }

    def given(self, call: Call) -> Residuals | None:
        if call.get("mid_block_additional_residual") is None:
            return None
        return Residuals((*call["down_block_additional_residuals"], call["mid_block_additional_residual"]))


def parts_of(unet: Any) -> dict[str, nn.Module]:
    """What a control copies, by name; the same names in a U-Net and in diffusers' control of it."""
    found = {name: getattr(unet, name, None) for name in (*COPIED, *ADDED)}
    return {name: part for name, part in found.items() if part is not None}


def call_block(block: nn.Module, sample: Tensor, time: Tensor, text: Tensor | None) -> Any:
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


def unusual(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings of a U-Net that no control of it could be loaded with."""
    for name, plain in PLAIN.items():
        if config.get(name, plain) != plain:
            yield name, config[name]
    if set(config["down_block_types"]) - BLOCKS:
        yield "down_block_types", config["down_block_types"]
    if config.get("mid_block_type") not in (None, *MIDDLES):
        yield "mid_block_type", config["mid_block_type"]
    if not isinstance(config["layers_per_block"], int):
        yield "layers_per_block", config["layers_per_block"]
    depths = config.get("transformer_layers_per_block", 1)
    if not all(isinstance(depth, int) and depth > 0 for depth in ([depths] if isinstance(depths, int) else depths)):
        yield "transformer_layers_per_block", depths


def control_config(unet: Any, hint_channels: int, size_factor: int) -> dict[str, Any]:
    """diffusers' `ControlNetModel` settings for a base: every one that the two classes share."""
    shared = inspect.signature(ControlNetModel.__init__).parameters.keys() & unet.config.keys()
    return {name: unet.config[name] for name in sorted(shared)} | {
        "conditioning_channels": hint_channels,
        "conditioning_embedding_out_channels": official_channels(size_factor),
        "controlnet_conditioning_channel_order": "rgb",
    }
