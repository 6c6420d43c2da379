"""The control of a U-Net on pixels, without text: diffusers' `UNet2DModel`.

The same copy as of Stable Diffusion's U-Net, under the same names. But this one's `forward` takes no residuals, so they
are added inside it, by hooks: to the skip connections where its decoder takes them, and to the middle block's output.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

from diffusers import UNet2DModel
from torch import Tensor, nn

from bridle.control.control import Call, Links, Pull
from bridle.control.hint import HintEncoder
from bridle.control.residuals import Residuals
from bridle.control.taps import Taps, call_steered
from bridle.control.text import Text
from bridle.control.unet import UNetControl, parts_of
from bridle.errors import BaseError, ConfigError

PICTURE_CHANNELS = 3


class PixelControl(UNetControl):
    """The trainable copy of a `UNet2DModel`'s encoder. diffusers has no class for such controls: Bridle alone loads it.

    Args:
        parts: the copied modules, under the names of diffusers' `ControlNetModel`.
        config: the base's, and `conditioning_channels`.
    """

    CLASS = "BridlePixelControl"
    SHARED = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "center_input_sample")
    SIZE_FACTOR = 1

    @classmethod
    def check_base(cls, denoiser: Any) -> None:
        config = denoiser.config
        asked = {
            "picks a class of picture": denoiser.class_embedding is not None,
            "has no middle block": denoiser.mid_block is None,
            "draws beside its skip connections": any("Skip" in kind for kind in config.down_block_types),
            f"works on {config.in_channels} channels": config.in_channels != PICTURE_CHANNELS,
            f"predicts {config.out_channels} channels": config.out_channels != config.in_channels,
            f"is made for {config.sample_size} px": not isinstance(config.sample_size, int),
        }
        found = [what for what, so in asked.items() if so]
        if found:
            remedy = "expected an unconditional one for square RGB pictures: make its control with Control.for_module"
            raise BaseError(f"base is a UNet2DModel that {', '.join(found)}; {remedy}")

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
        if layers is not None:
            raise ConfigError(f"layers is {layers}, but of a U-Net the whole encoder is copied; leave it out")
        parts = {name: copy.deepcopy(part).requires_grad_(True) for name, part in parts_of(denoiser).items()}
        config = {name: denoiser.config[name] for name in settings_of(denoiser.config)}
        control = cls(parts, config | {"conditioning_channels": hint_channels}, hint_encoder, links, size_factor)
        return control.to(denoiser.device, denoiser.dtype)

    @classmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> Self:
        settings = {name: config[name] for name in settings_of(config)}
        model: Any = UNet2DModel(**settings)
        channels = {"conditioning_channels": int(config.get("conditioning_channels", PICTURE_CHANNELS))}
        hint_encoder, links = facts.get("hint_encoder", "official"), facts.get("links", "all")
        return cls(parts_of(model), settings | channels, hint_encoder, links, facts.get("size_factor", cls.SIZE_FACTOR))

    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        return {"sample": latents, "timestep": timesteps}

    def residuals(self, call: Call, features: Tensor) -> Residuals:
        if self.config.get("center_input_sample"):  # the base does so to what it is called with
            call = {**call, "sample": 2 * call["sample"] - 1}
        return super().residuals(call, features)

    def join(self, denoiser: Any, call: Call, residuals: Residuals) -> Tensor:
        output: Tensor = call_steered(self, denoiser, call, residuals).sample
        return output

    def steer(self, denoiser: nn.Module, pull: Pull) -> Callable[[], None]:
        unet: Any = denoiser
        taps = Taps(unet, pull)
        taps.add_to_output(unet.mid_block, link=-1)
        stop = len(self.zero_layers) - 1
        for block in unet.up_blocks:  # each takes the last of the skip connections that are left
            start = stop - len(block.resnets)
            taps.add_to_tensors(block, "res_hidden_states_tuple", slice(start, stop))
            stop = start
        return taps.remove


def settings_of(config: Mapping[str, Any]) -> list[str]:
    """The names of a `UNet2DModel`'s own settings among others."""
    return sorted(inspect.signature(UNet2DModel.__init__).parameters.keys() & config.keys())
