"""Control and base as one model to train, and which of its parameters a phase of the regime trains."""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from bridle.control.unet import Control
from bridle.errors import TrainError
from bridle.train.regime import Phase
from bridle.train.settings import Unlock

PARTS: dict[Phase, tuple[str, ...]] = {
    "middle": ("copy",),
    "connected": ("copy", "skips"),
    "unlocked": ("copy", "skips", "base"),
}
SKIPS = "control.controlnet_down_blocks."
DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")  # what the official code unlocks


class Denoiser(nn.Module):
    """Control and base as the one module that several processes wrap."""

    def __init__(self, control: Control, unet: Any) -> None:
        super().__init__()
        self.control, self.unet = control, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        """[B, C, h, w] noisy latents to the base's prediction of the same shape, steered."""
        residuals = self.control(noisy, timesteps, text, hint)
        output: Tensor = self.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=residuals.down,
            mid_block_additional_residual=residuals.mid,
        ).sample
        return output


def trained_parts(denoiser: Denoiser, phase: Phase, unlock: Unlock | None) -> dict[str, dict[str, nn.Parameter]]:
    """What each part of training trains, by name: the copy with its middle link, the skip links, the base."""
    control = {f"control.{name}": parameter for name, parameter in denoiser.control.named_parameters()}
    parts = {"copy": {}, "skips": {}, "base": {}}
    for name, parameter in control.items():
        parts["skips" if name.startswith(SKIPS) else "copy"][name] = parameter
    for name, parameter in denoiser.unet.named_parameters():
        if unlock == "all" or name.startswith(DECODER):
            parts["base"][f"base.{name}"] = parameter
    return {part: parts[part] for part in PARTS[phase]}


def check_width(control: Control, width: int) -> None:
    """Raises: TrainError: a strided convolution would see a width of 1.

    There PyTorch 2.13 on CPU leaves parts of the bfloat16 weight gradient as they were in memory: NaN, or worse, not.
    """
    least = 2 ** (len(control.config["block_out_channels"]) - 1)
    if width < least:
        size_px, least_px = width * control.size_factor, least * control.size_factor
        remedy = f'set size_px to {least_px} or more, or train.precision to "fp32"'
        raise TrainError(f"pictures are {size_px} px wide, too small for train.precision 'bf16' on a CPU: {remedy}")


def set_plain_attention(control: Control, unet: Any) -> None:
    """Use plain products for attention in both; changes nothing but rounding."""
    unet.set_attn_processor(AttnProcessor())
    for module in control.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
