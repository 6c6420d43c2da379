"""The control of Stable Diffusion 3: trainable copies of its transformer's first blocks, a zero linear layer each.

Parameter names and configuration are those of diffusers' `SD3ControlNetModel`, so a saved control loads there. Half of
the blocks are copied unless something else is asked for, as in the published ones (12 of SD3-medium's 24). Also as in
those (`force_zeros_for_pooled_projection`), the copy is told nothing of the pooled captions, and hints are not shifted.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import SD3ControlNetModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from bridle.control.block import zero
from bridle.control.control import Call, Links
from bridle.control.hint import HintEncoder
from bridle.control.residuals import Residuals
from bridle.control.text import Text
from bridle.control.transformer import (
    TEXT_OUTPUT,
    TransformerControl,
    check_options,
    copy_first,
    encode_hint,
    zero_links,
)
from bridle.errors import BaseError, FileError

COPIED = ("pos_embed", "time_text_embed", "context_embedder")


class SD3Control(TransformerControl):
    """The trainable copy of the first blocks of an `SD3Transformer2DModel`."""

    CLASS = "SD3ControlNetModel"
    SHARED = (
        "in_channels",
        "patch_size",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def __init__(self, parts: Mapping[str, Any], config: dict[str, Any], size_factor: int) -> None:
        super().__init__(config, size_factor)
        self.pos_embed = parts["pos_embed"]
        self.time_text_embed = parts["time_text_embed"]
        self.context_embedder = parts["context_embedder"]
        self.transformer_blocks = parts["transformer_blocks"]
        self.controlnet_blocks = zero_links(self.transformer_blocks, self.width)
        self.pos_embed_input = zero(hint_embed(config, self.width))

    @classmethod
    def check_base(cls, denoiser: Any) -> None:
        extra = denoiser.config.in_channels - denoiser.config.out_channels
        if extra:
            remedy = "use a base that starts from noise alone"
            raise BaseError(f"base takes {extra} channels beside the noisy ones, which controls do not carry: {remedy}")

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
        """Copy the first blocks; the last one cannot be, as it gives no text on."""
        check_options(hint_channels, hint_encoder, links)
        most = len(denoiser.transformer_blocks) - 1
        count = len(denoiser.transformer_blocks) // 2 if layers is None else layers
        parts = {name: copy.deepcopy(getattr(denoiser, name)).requires_grad_(True) for name in COPIED}
        parts["transformer_blocks"] = copy_first(denoiser.transformer_blocks, count, most)
        return cls(parts, control_config(denoiser, count), size_factor).to(denoiser.device, denoiser.dtype)

    @classmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> Self:
        model: Any = SD3ControlNetModel.from_config(config)
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        check_supported(settings)
        if not settings["pos_embed_max_size"]:  # positions would then not be among the weights
            raise ValueError("pos_embed_max_size is missing")
        parts = {name: getattr(model, name) for name in (*COPIED, "transformer_blocks")}
        return cls(parts, settings, facts.get("size_factor", 8))

    @property
    def idle(self) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{len(self.transformer_blocks) - 1}.{part}" for part in TEXT_OUTPUT)

    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": torch.as_tensor(timesteps, device=latents.device).expand(len(latents)),
            "encoder_hidden_states": text.states,
            "pooled_projections": text.pooled,
        }

    @classmethod
    def prepare(cls, hint: Tensor, pipeline: Any) -> Tensor:
        return encode_hint(hint, pipeline, 0.0, cls.PATCH)

    def fit_hint(self, hint: Tensor, pipeline: Any) -> Tensor:
        if self.config["force_zeros_for_pooled_projection"]:
            return self.prepare(hint, pipeline)
        return encode_hint(hint, pipeline, pipeline.vae.config.shift_factor, self.PATCH)

    def check_hint(self, hint: Tensor, call: Call) -> None:
        self.check_latents(hint, self.config["in_channels"], call["hidden_states"].shape[-2:])

    def encode(self, hint: Tensor) -> Tensor:
        """Hint latents [B, C, h, w] to features [B, L, D]."""
        features: Tensor = self.pos_embed_input(hint.to(self.dtype))
        return features

    def residuals(self, call: Call, features: Tensor) -> Residuals:
        latents, pooled = call["hidden_states"], call["pooled_projections"]
        if self.config["force_zeros_for_pooled_projection"]:
            pooled = torch.zeros_like(pooled)
        time = self.time_text_embed(call["timestep"], pooled)
        text = self.context_embedder(call["encoder_hidden_states"])
        tokens = self.pos_embed(latents) + features
        links = []
        for block, link in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            text, tokens = self.through(block, tokens, text, time)
            links.append(link(tokens))
        height, width = latents.shape[-2:]
        return Residuals(tuple(links), grid=(height // self.PATCH, width // self.PATCH))

    def place(self, residuals: Residuals, denoiser: Any) -> Residuals:
        """As the base spreads links over its blocks: each serves as many in a row, the fractions where they fall."""
        count = len(denoiser.transformer_blocks)
        run = count / len(residuals.links)
        return replace(residuals, links=tuple(residuals.links[int(at / run)] for at in range(count)))

    def keywords(self, residuals: Residuals) -> dict[str, Any]:
        return {"block_controlnet_hidden_states": residuals.links}

    def given(self, call: Call) -> Residuals | None:
        links = call.get("block_controlnet_hidden_states")
        return None if links is None else Residuals(tuple(links))


def hint_embed(config: Mapping[str, Any], width: int) -> nn.Module:
    """Latents of a hint to tokens, without positions: those come with the picture's."""
    size, patch, channels = config["sample_size"], config["patch_size"], config["in_channels"]
    return PatchEmbed(size, size, patch_size=patch, in_channels=channels, embed_dim=width, pos_embed_type=None)


def control_config(transformer: Any, count: int) -> dict[str, Any]:
    """diffusers' `SD3ControlNetModel` settings for a base."""
    settings = inspect.signature(SD3ControlNetModel.__init__).parameters
    own = {name: setting.default for name, setting in settings.items() if name != "self"}
    shared = {name: transformer.config[name] for name in own.keys() & transformer.config.keys()}
    return own | shared | {"num_layers": count}


def check_supported(config: Mapping[str, Any]) -> None:
    """Raises: FileError: it is a control of a kind that cannot be used."""
    if config["extra_conditioning_channels"]:
        kind = f"wants {config['extra_conditioning_channels']} channels beside the hint's, for inpainting"
    elif config["joint_attention_dim"] is None or not config["use_pos_embed"]:
        kind = "is of the 8B kind (single blocks without text), which shares its base's position embedding"
    else:
        return
    raise FileError(f"this Stable Diffusion 3 control {kind}; Bridle cannot use it: take one that is told of captions")
