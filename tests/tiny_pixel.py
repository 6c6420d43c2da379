"""The smallest U-Net on pixels that still has attention and three levels: random weights, always the same."""

from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from bridle.base.base import Base
from bridle.control.control import Control

SIZE_PX = 32


def make_unet(seed: int = 0, **changes: object) -> UNet2DModel:
    """Three levels of one layer, 32x32 px: seven links."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": SIZE_PX,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    unet: UNet2DModel = UNet2DModel(**(settings | changes))
    return unet.requires_grad_(False).eval()


def make_pipeline(unet: UNet2DModel | None = None) -> DDPMPipeline:
    pipeline = DDPMPipeline(unet=unet or make_unet(), scheduler=DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_base() -> Base:
    return Base(make_pipeline())


def wake(control: Any, seed: int = 3) -> Control:
    """Fill what is zero, in place."""
    torch.manual_seed(seed)
    for layer in (control.controlnet_cond_embedding.conv_out, *control.zero_layers):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.2)
    return control


def make_inputs(seed: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy pictures, timesteps and hints."""
    source = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, 3, SIZE_PX, SIZE_PX, generator=source)
    return noisy, torch.randint(1000, (2,), generator=source), torch.rand(2, 3, SIZE_PX, SIZE_PX, generator=source)
