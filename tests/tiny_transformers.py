"""The smallest Stable Diffusion 3 and Flux.1: random weights, made on the spot, always the same."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import TOKENS, make_text_encoder, make_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from bridle.control.control import Control
from bridle.control.text import Text

SIZE_PX = 64
CHANNELS = 16  # of the latents
WIDTH = 32  # of the text states, and of the vector per caption
SD3 = {
    "sample_size": SIZE_PX // 8,
    "patch_size": 2,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 5,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 16,
}
SD35 = SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}
FLUX = {
    "patch_size": 1,
    "in_channels": 4 * CHANNELS,
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}


def make_sd3(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """Five blocks of width 16, 8x8 latents."""
    torch.manual_seed(seed)
    model: SD3Transformer2DModel = SD3Transformer2DModel(**(SD3 | changes))
    return model.requires_grad_(False).eval()


def make_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """Three double and five single blocks of width 16."""
    torch.manual_seed(seed)
    model: FluxTransformer2DModel = FluxTransformer2DModel(**(FLUX | changes))
    return model.requires_grad_(False).eval()


def make_vae(seed: int = 1) -> AutoencoderKL:
    """Sixteen channels, eight pixels per latent, latents shifted as well as scaled."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=CHANNELS,
        sample_size=SIZE_PX,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def make_t5(seed: int = 3) -> tuple[T5Tokenizer, T5EncoderModel]:
    """Every letter is a token."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "▁")]
    tokenizer = T5Tokenizer(vocab=special + [(letter, -2.0) for letter in string.printable.strip()], extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def make_clip(seed: int = 2) -> CLIPTextModelWithProjection:
    """Half of the text's width: Stable Diffusion 3 has two, side by side."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH // 2,
        projection_dim=WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def sd3_pipeline(transformer: SD3Transformer2DModel | None = None) -> StableDiffusion3Pipeline:
    """A stock pipeline, silent."""
    tokenizer_3, text_encoder_3 = make_t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer or make_sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(),
        text_encoder=make_clip(2),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_clip(4),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_pipeline(transformer: FluxTransformer2DModel | None = None) -> FluxPipeline:
    """A stock pipeline, silent."""
    tokenizer, (tokenizer_2, text_encoder_2) = make_tokenizer(), make_t5()
    pipeline = FluxPipeline(
        transformer=transformer or make_flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wake(control: Control, seed: int = 5) -> Control:
    """Give all that starts as zero random weights, in place, so that hints count."""
    torch.manual_seed(seed)
    entry: Any = getattr(control, "pos_embed_input", None) or getattr(control, "controlnet_x_embedder", None)
    for layer in (*control.zero_layers, entry):
        assert isinstance(layer, nn.Module)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return control


def make_inputs(batch: int = 2, seed: int = 6) -> tuple[Tensor, Tensor, Text, Tensor]:
    """Latents of 8x6, timesteps, text, and the latents of a hint."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, CHANNELS, 8, 6, generator=generator)
    timesteps = 1000 * torch.rand(batch, generator=generator)
    text = Text(
        torch.randn(batch, TOKENS, WIDTH, generator=generator),
        torch.randn(batch, WIDTH, generator=generator),
    )
    return latents, timesteps, text, torch.randn(latents.shape, generator=generator)
