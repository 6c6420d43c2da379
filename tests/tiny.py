"""The smallest Stable Diffusion that still has 13 links: random weights, made on the spot, always the same."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bridle.base.base import Base
from bridle.control.control import Control

SIZE_PX = 64
TOKENS = 16
WIDTH = 32  # of the text states


def make_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """Four levels of two layers, 8x8 latents, 4 channels."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "sample_size": SIZE_PX // 8,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    unet: UNet2DConditionModel = UNet2DConditionModel(**(settings | changes))
    return unet.requires_grad_(False).eval()


def make_vae(seed: int = 1) -> AutoencoderKL:
    """Eight pixels per latent."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE_PX,
    ).eval()


def make_tokenizer() -> CLIPTokenizer:
    """Every byte is a token."""
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: row for row, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int = 2) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def make_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def make_pipeline(
    unet: UNet2DConditionModel | None = None, scheduler: DDIMScheduler | None = None
) -> StableDiffusionPipeline:
    """A stock pipeline of them, silent, with DDIM."""
    tokenizer = make_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet or make_unet(),
        scheduler=scheduler or make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sd2_pipeline() -> StableDiffusionPipeline:
    """What Stable Diffusion 2.1 differs in: linear projections, a number of heads per level, predicted velocity."""
    unet = make_unet(use_linear_projection=True, attention_head_dim=(2, 2, 4, 4))
    return make_pipeline(unet, make_scheduler("v_prediction"))


def make_base() -> Base:
    return Base(make_pipeline())


def wake(control: Control, seed: int = 3) -> Control:
    """Give the zero convolutions random weights, and the hint encoder strong ones, in place, so that hints count."""
    torch.manual_seed(seed)
    for module in control.controlnet_cond_embedding.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for module in zero_layers(control):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    return control


def zero_layers(control: Control) -> list[nn.Module]:
    """The 13 that lead out, and the last of the hint encoder."""
    encoder = control.controlnet_cond_embedding
    last = encoder[-1] if isinstance(encoder, nn.Sequential) else encoder.conv_out
    return [*control.controlnet_down_blocks, control.controlnet_mid_block, last]


def make_inputs(batch: int = 2, hint_channels: int = 3, seed: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text and hint."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, SIZE_PX // 8, SIZE_PX // 8, generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    text = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    hint = torch.rand(batch, hint_channels, SIZE_PX, SIZE_PX, generator=generator)
    return latents, timesteps, text, hint


def make_hint(seed: int = 5, channels: int = 3, size_px: int = SIZE_PX) -> np.ndarray:
    """[H, W, K] uint8: a random pattern of large squares."""
    cells = np.random.default_rng(seed).integers(0, 256, (size_px // 8, size_px // 8, channels), dtype=np.uint8)
    return cells.repeat(8, 0).repeat(8, 1)
