"""What the controls of transformers share: copies of the first blocks, a zero linear layer per block, links of tokens.

A hint reaches them as a picture reaches the base: through the base's autoencoder, then cut into patches. The
autoencoder gives a distribution, of which stock pipelines draw a sample; here it is the mean, so that equal hints give
equal pictures and can be encoded once.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bridle.control.block import zero_linear
from bridle.control.control import Call, Control, Links
from bridle.control.hint import HintEncoder
from bridle.errors import ConfigError, HintError

PICTURE_CHANNELS = 3
# Of the last double block: what only its text output depends on, which nobody reads where no block follows.
TEXT_OUTPUT = ("attn.to_add_out.", "ff_context.")


class TransformerControl(Control):
    """A control of a denoiser of tokens: `transformer_blocks`, and `controlnet_blocks`, which lead out of them.

    Args:
        parts: the copied modules, under diffusers' names.
        config: what diffusers' class for such controls would be configured with.
    """

    INPUT = "hidden_states"
    PREPARES = True
    PATCH = 2

    transformer_blocks: nn.ModuleList
    controlnet_blocks: nn.ModuleList

    def __init__(self, config: dict[str, Any], size_factor: int) -> None:
        super().__init__(config, "official", "all", size_factor)
        # Set from outside, as on a model of diffusers.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    @property
    def width(self) -> int:
        """D of the links."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def hint_channels(self) -> int:
        return PICTURE_CHANNELS

    @property
    def zero_layers(self) -> list[nn.Module]:
        return list(self.controlnet_blocks)

    @property
    def device(self) -> torch.device:
        return self._entry.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._entry.weight.dtype

    @property
    def _entry(self) -> Any:
        return self.controlnet_blocks[0]

    def timestep(self, call: Call) -> Any:
        return call["timestep"].flatten()[0]

    def check_latents(self, hint: Tensor, channels: int, size: tuple[int, int]) -> None:
        """Whether a hint has been through the autoencoder, and is of the size of the latents. Raises: HintError."""
        if hint.ndim != 4 or hint.shape[1] != channels:
            remedy = "prepare it first: control.fit_hint(hint, pipeline)"
            raise HintError(f"hint has shape {list(hint.shape)}; expected [batch, {channels}, h, w] latents: {remedy}")
        self.check_pixels(hint, size, self.size_factor)

    def check_pixels(self, hint: Tensor, size: tuple[int, int], step_px: int = 1) -> None:
        """Args: size: of the latents. step_px: pixels per row of the hint. Raises: HintError."""
        height, width = (step_px * side for side in hint.shape[-2:])
        expected_h, expected_w = (self.size_factor * side for side in size)
        if (height, width) != (expected_h, expected_w):
            remedy = "resize the hint, or ask for a picture of its size"
            raise HintError(f"hint is {width}x{height} px; the picture asks for {expected_w}x{expected_h} px: {remedy}")

    def through(self, block: nn.Module, tokens: Tensor, text: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """One block: tokens [B, L, D] and text [B, M, D] to text and tokens, as diffusers' blocks order them."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, tokens, text, *rest)
        return block(tokens, text, *rest)


def check_options(hint_channels: int, hint_encoder: HintEncoder, links: Links) -> None:
    """Raises: ConfigError: transformers have no such option."""
    if hint_channels != PICTURE_CHANNELS:
        remedy = "its autoencoder sees the hint, which has to be a picture of 3; repeat a mask three times"
        raise ConfigError(f"hint_channels is {hint_channels}, but of this base {remedy}")
    if hint_encoder != "official":
        raise ConfigError(f"hint_encoder is {hint_encoder!r}, but of this base the autoencoder encodes hints: leave it")
    if links != "all":
        raise ConfigError(f"links is {links!r}, but this base has no middle block: leave it at 'all'")


def copy_first(blocks: nn.ModuleList, count: int, most: int) -> nn.ModuleList:
    """Trainable copies. Raises: ConfigError: the count is not from 1 to `most`."""
    if not 1 <= count <= most:
        raise ConfigError(f"layers is {count}; of this base 1 to {most} can be copied")
    return nn.ModuleList(copy.deepcopy(block) for block in blocks[:count]).requires_grad_(True)


def zero_links(blocks: nn.ModuleList, width: int) -> nn.ModuleList:
    return nn.ModuleList(zero_linear(width, width) for _ in blocks)


@torch.no_grad()
def encode_hint(hint: Tensor, pipeline: Any, shift: float, patch: int) -> Tensor:
    """A hint [B, 3, H, W] in [0, 1] as the base's autoencoder sees it: [B, C, h, w], (mean - shift) * scale.

    Raises: HintError: it is no picture, or its sides are no multiples of what a token covers.
    """
    vae = pipeline.vae
    step_px = pipeline.vae_scale_factor * patch
    if hint.ndim != 4 or hint.shape[1] != PICTURE_CHANNELS:
        raise HintError(f"hint has shape {list(hint.shape)}; expected [batch, {PICTURE_CHANNELS}, height, width]")
    if hint.shape[-2] % step_px or hint.shape[-1] % step_px:
        size = f"{hint.shape[-1]}x{hint.shape[-2]}"
        raise HintError(f"hint is {size} px; this base takes multiples of {step_px}: resize or crop it")
    pixels = (2 * hint - 1).to(pipeline._execution_device, vae.dtype)
    mean = vae.encode(pixels).latent_dist.mean
    return ((mean - shift) * vae.config.scaling_factor).to(hint.device)
