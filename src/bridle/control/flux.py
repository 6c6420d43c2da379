"""The control of Flux.1: trainable copies of its first double and single blocks, and a zero linear layer each.

Parameter names and configuration are those of diffusers' `FluxControlNetModel`, so a saved control loads there. Four
blocks of each kind are copied unless something else is asked for, as diffusers' `train_controlnet_flux.py` does.
Published ones have 5 and 10 (InstantX), or 2 and none: XLabs', whose hints go through convolutions instead of the
autoencoder and whose links serve the base's blocks in turns; such a file loads and works as well.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F

from bridle.control.block import zero_linear
from bridle.control.control import Call, Links
from bridle.control.hint import HintEncoder, check_hint
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
from bridle.errors import BaseError, ConfigError, FileError

COPIED = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder")
LAYERS = 4
# What a guidance-distilled base is told in training; the default of diffusers' `train_controlnet_flux.py`.
GUIDANCE = 3.5
KEYWORDS = ("controlnet_block_samples", "controlnet_single_block_samples")
TIMES = 1000  # the denoiser is told shares of these


class FluxControl(TransformerControl):
    """The trainable copy of the first blocks of a `FluxTransformer2DModel`."""

    CLASS = "FluxControlNetModel"
    SHARED = (
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "axes_dims_rope",
    )

    def __init__(self, parts: Mapping[str, Any], config: dict[str, Any], size_factor: int) -> None:
        super().__init__(config, size_factor)
        self.pos_embed = parts["pos_embed"]
        self.time_text_embed = parts["time_text_embed"]
        self.context_embedder = parts["context_embedder"]
        self.x_embedder = parts["x_embedder"]
        self.transformer_blocks = parts["transformer_blocks"]
        self.single_transformer_blocks = parts["single_transformer_blocks"]
        self.controlnet_blocks = zero_links(self.transformer_blocks, self.width)
        self.controlnet_single_blocks = zero_links(self.single_transformer_blocks, self.width)
        self.input_hint_block: Any = parts.get("input_hint_block")
        self.controlnet_x_embedder = zero_linear(config["in_channels"], self.width)

    @classmethod
    def check_base(cls, denoiser: Any) -> None:
        taken, given = denoiser.config.in_channels, denoiser.config.out_channels or denoiser.config.in_channels
        if taken != given:
            remedy = "use Flux.1 dev or schnell, not fill, canny or depth"
            what = f"{taken - given} channels per token beside the {given} noisy ones"
            raise BaseError(f"base takes {what}, which controls do not carry: {remedy}")

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
        """Copy as many of the first double blocks as of the first single ones."""
        check_options(hint_channels, hint_encoder, links)
        doubles, singles = denoiser.transformer_blocks, denoiser.single_transformer_blocks
        most = min(len(doubles), len(singles))
        count = min(LAYERS, most) if layers is None else layers
        parts: dict[str, Any] = {name: copy.deepcopy(getattr(denoiser, name)).requires_grad_(True) for name in COPIED}
        parts["transformer_blocks"] = copy_first(doubles, count, most)
        parts["single_transformer_blocks"] = copy_first(singles, count, most)
        return cls(parts, control_config(denoiser, count), size_factor).to(denoiser.device, denoiser.dtype)

    @classmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> Self:
        with warnings.catch_warnings():  # the class has its positions from a module that diffusers is to drop
            warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
            model: Any = FluxControlNetModel.from_config(config)
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        if settings["num_mode"] is not None:
            what = f"is a union of {settings['num_mode']} kinds (num_mode), which Bridle cannot use"
            raise FileError(f"this Flux control {what}: take a control of one kind")
        if not settings["num_layers"]:
            raise ValueError("num_layers is 0")
        names = (*COPIED, "transformer_blocks", "single_transformer_blocks", "input_hint_block")
        return cls({name: getattr(model, name) for name in names}, settings, facts.get("size_factor", 8))

    @property
    def zero_layers(self) -> list[nn.Module]:
        return [*self.controlnet_blocks, *self.controlnet_single_blocks]

    @property
    def idle(self) -> tuple[str, ...]:
        if self.single_transformer_blocks:
            return ()
        return tuple(f"transformer_blocks.{len(self.transformer_blocks) - 1}.{part}" for part in TEXT_OUTPUT)

    def check_fit(self, denoiser: Any, owner: str, device: torch.device | None = None) -> None:
        super().check_fit(denoiser, owner, device)
        if self.config["guidance_embeds"] and not denoiser.config.guidance_embeds:
            remedy = "use one that is, such as Flux.1 dev"
            raise ConfigError(f"{owner} is told of the guidance, which this base is not: {remedy}")

    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        """As `Control.call`; a base that is not told of the guidance does not take it: `join` leaves it out."""
        count, device, rows, columns = len(latents), latents.device, latents.shape[2] // 2, latents.shape[3] // 2
        return {
            "hidden_states": pack(latents),
            "timestep": torch.as_tensor(timesteps, device=device).expand(count) / TIMES,
            "encoder_hidden_states": text.states,
            "pooled_projections": text.pooled,
            "img_ids": picture_ids(rows, columns).to(latents),
            "txt_ids": torch.zeros(text.states.shape[1], 3).to(latents),
            "guidance": torch.full((count,), GUIDANCE, device=device),
        }

    @classmethod
    def prepare(cls, hint: Tensor, pipeline: Any) -> Tensor:
        return encode_hint(hint, pipeline, pipeline.vae.config.shift_factor, cls.PATCH)

    def fit_hint(self, hint: Tensor, pipeline: Any) -> Tensor:
        return self.prepare(hint, pipeline) if self.input_hint_block is None else 2 * hint - 1

    def check_hint(self, hint: Tensor, call: Call) -> None:
        rows, columns = grid_of(call)
        if self.input_hint_block is None:
            self.check_latents(hint, self.config["in_channels"] // 4, (2 * rows, 2 * columns))
        else:
            check_hint(hint, self.hint_channels)
            self.check_pixels(hint, (2 * rows, 2 * columns))

    def encode(self, hint: Tensor) -> Tensor:
        """Hint latents [B, C, h, w], or XLabs' hint in [-1, 1], to features [B, L, D]."""
        hint = hint.to(self.dtype)
        latents = hint if self.input_hint_block is None else self.input_hint_block(hint)
        features: Tensor = self.controlnet_x_embedder(pack(latents))
        return features

    def residuals(self, call: Call, features: Tensor) -> Residuals:
        tokens = self.x_embedder(call["hidden_states"]) + features
        time = self._embed_time(call, tokens.dtype)
        text = self.context_embedder(call["encoder_hidden_states"])
        places = self.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
        links = []
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        for block, link in zip(blocks, self.zero_layers, strict=True):
            text, tokens = self.through(block, tokens, text, time, places)
            links.append(link(tokens))
        return Residuals(tuple(links), grid=grid_of(call), first=len(self.transformer_blocks))

    def _embed_time(self, call: Call, dtype: torch.dtype) -> Tensor:
        told = ("timestep", "guidance") if self.config["guidance_embeds"] else ("timestep",)
        shares = (call[name].to(dtype) * TIMES for name in told)
        embedded: Tensor = self.time_text_embed(*shares, call["pooled_projections"])
        return embedded

    def timestep(self, call: Call) -> Any:
        return super().timestep(call) * TIMES

    def place(self, residuals: Residuals, denoiser: Any) -> Residuals:
        """As the base spreads links over its blocks; a zero of shape [1, 1, 1] where there are none of a kind."""
        doubles, singles = split(residuals)
        counts = len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)
        none = residuals.links[0].new_zeros(1, 1, 1)
        in_turns = self.input_hint_block is not None
        links = spread(doubles or (none,), counts[0], in_turns) + spread(singles or (none,), counts[1], False)
        return replace(residuals, links=links, first=counts[0])

    def keywords(self, residuals: Residuals) -> dict[str, Any]:
        doubles, singles = (links if any(link.numel() > 1 for link in links) else None for links in split(residuals))
        return dict(zip(KEYWORDS, (doubles, singles), strict=True))

    def given(self, call: Call) -> Residuals | None:
        doubles, singles = (call.get(name) or () for name in KEYWORDS)
        if not doubles and not singles:
            return None
        if call.get("controlnet_blocks_repeat"):
            remedy = "attach that one as well, to a pipeline without control"
            raise ConfigError(f"the pipeline brings an XLabs control of its own, which cannot be added to: {remedy}")
        return Residuals((*doubles, *singles), first=len(doubles))

    def join(self, denoiser: Any, call: Call, residuals: Residuals) -> Tensor:
        guidance = call["guidance"] if denoiser.config.guidance_embeds else None
        tokens = super().join(denoiser, {**call, "guidance": guidance}, residuals)
        return unpack(tokens, grid_of(call))


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, h/2 * w/2, 4 * C], each a square of four."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens back to latents. Args: grid: their rows and columns."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), 2)


def picture_ids(rows: int, columns: int) -> Tensor:
    """[rows * columns, 3]: 0, row and column of each token."""
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(down), down, across], dim=-1).flatten(0, 1)


def grid_of(call: Call) -> tuple[int, int]:
    """How many rows and columns of tokens a call's picture has."""
    _, rows, columns = (int(last) + 1 for last in call["img_ids"].amax(0))
    return rows, columns


def split(residuals: Residuals) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The links of the double blocks, and those of the single ones."""
    return residuals.links[: residuals.first], residuals.links[residuals.first :]


def spread(links: tuple[Tensor, ...], count: int, in_turns: bool) -> tuple[Tensor, ...]:
    """The link for each of `count` blocks: each as many times in a row, rounded up, or one after the other."""
    run = math.ceil(count / len(links))
    return tuple(links[at % len(links) if in_turns else at // run] for at in range(count))


def control_config(transformer: Any, count: int) -> dict[str, Any]:
    """diffusers' `FluxControlNetModel` settings for a base."""
    settings = inspect.signature(FluxControlNetModel.__init__).parameters
    own = {name: setting.default for name, setting in settings.items() if name != "self"}
    shared = {name: transformer.config[name] for name in own.keys() & transformer.config.keys()}
    return own | shared | {"num_layers": count, "num_single_layers": count}
