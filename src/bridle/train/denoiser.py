"""Control and base as one model to train, and which of its parameters a phase of the regime trains."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bridle.control.control import Control
from bridle.control.residuals import Residuals
from bridle.control.text import Text
from bridle.control.unet import UNetControl
from bridle.errors import ConfigError, TrainError
from bridle.train.regime import Phase
from bridle.train.settings import Unlock

PARTS: dict[Phase, tuple[str, ...]] = {
    "middle": ("copy",),
    "connected": ("copy", "skips"),
    "unlocked": ("copy", "skips", "base"),
}


class Denoiser(nn.Module):
    """Control and base as the one module that several processes wrap."""

    def __init__(self, control: Control, base: Any) -> None:
        super().__init__()
        self.control, self.base = control, base

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Text, hint: Tensor) -> Tensor:
        """Noisy latents [B, C, h, w] to the base's prediction of the same shape, steered.

        Args:
            timesteps: as the base is told them.
            hint: prepared.
        """
        residuals = self.control(noisy, timesteps, text, hint)
        if noisy.is_cuda and isinstance(self.control, UNetControl):
            return predict_plainly(self.control, self.base, noisy, timesteps, text, residuals)
        call = self.control.call(noisy, timesteps, text)
        return self.control.join(self.base, call, residuals)


def predict_plainly(
    control: UNetControl, base: Any, noisy: Tensor, timesteps: Tensor, text: Text, residuals: Residuals
) -> Any:
    """What a base in bfloat16 predicts, as stock pipelines compute it: in bfloat16 throughout.

    Autocast would have its normalisations in float32, there and back, which is a twelfth of a step on an H100.
    """
    dtype = base.conv_in.weight.dtype
    if dtype == torch.float32:
        return control.join(base, control.call(noisy, timesteps, text), residuals)
    with torch.autocast(noisy.device.type, enabled=False):
        call = control.call(noisy.to(dtype), timesteps, Text(text.states.to(dtype), text.pooled))
        links = tuple(link.to(dtype) for link in residuals.links)  # for those that are not connected
        return control.join(base, call, replace(residuals, links=links))


def trained_parts(denoiser: Denoiser, phase: Phase, unlock: Unlock | None) -> dict[str, dict[str, nn.Parameter]]:
    """What each part of training trains, by name: the copy with its middle link, the skip links, the base.

    Raises: ConfigError: the phase asks for a part that this family of bases does not have.
    """
    control = denoiser.control
    check_phase(control, phase, unlock)
    parts: dict[str, dict[str, nn.Parameter]] = {"copy": {}, "skips": {}, "base": {}}
    for name, parameter in control.named_parameters():
        if name.startswith(control.idle):
            continue
        parts["skips" if name.startswith(control.SKIPS) else "copy"][f"control.{name}"] = parameter
    for name, parameter in denoiser.base.named_parameters():
        if unlock == "all" or name.startswith(control.DECODER):
            parts["base"][f"base.{name}"] = parameter
    return {part: parts[part] for part in PARTS[phase]}


def check_phase(control: Control, phase: Phase, unlock: Unlock | None) -> None:
    """Raises: ConfigError: see `trained_parts`."""
    if phase == "middle" and not control.SKIPS:
        remedy = "set train.regime to 'standard' or 'large'"
        raise ConfigError(f"this base has no middle link, so training cannot begin with it alone: {remedy}")
    if unlock == "decoder" and not control.DECODER:
        raise ConfigError("setting train.unlock is 'decoder', but this base has none of its own: set it to 'all'")


def check_width(control: Control, width: int) -> None:
    """For U-Nets, whose levels halve the size. Raises: TrainError: a strided convolution would see a width of 1.

    There PyTorch 2.13 on CPU leaves parts of the bfloat16 weight gradient as they were in memory: NaN, or worse, not.
    """
    if not isinstance(control, UNetControl):
        return
    least = 2 ** (len(control.config["block_out_channels"]) - 1)
    if width < least:
        size_px, least_px = width * control.size_factor, least * control.size_factor
        remedy = f'set size_px to {least_px} or more, or train.precision to "fp32"'
        raise TrainError(f"pictures are {size_px} px wide, too small for train.precision 'bf16' on a CPU: {remedy}")
