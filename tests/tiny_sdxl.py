"""The smallest SDXL: three levels, two text encoders of different widths, and conditions on the size of the picture."""

import tiny
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

SECOND_WIDTH = 48  # of the second text encoder's states
POOLED = 40  # of its one vector per caption
SIZES_WIDTH = 8  # of each of the six numbers that say how the picture was cut


def make_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """Ten links: one level less than the older families, and no attention at the first."""
    settings: dict[str, object] = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": tiny.WIDTH + SECOND_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZES_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZES_WIDTH,
    }
    return tiny.make_unet(seed, **(settings | changes))


def make_second_encoder(tokenizer: CLIPTokenizer, seed: int = 6) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=SECOND_WIDTH,
        intermediate_size=SECOND_WIDTH,
        num_hidden_layers=10,  # the tenth is what tells diffusers a checkpoint of SDXL
        num_attention_heads=4,
        max_position_embeddings=tiny.TOKENS,
        projection_dim=POOLED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def make_pipeline() -> StableDiffusionXLPipeline:
    """A stock pipeline of them, silent."""
    tokenizer = tiny.make_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        vae=tiny.make_vae(),
        text_encoder=tiny.make_text_encoder(tokenizer),
        text_encoder_2=make_second_encoder(tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tiny.make_tokenizer(),
        unet=make_unet(),
        scheduler=tiny.make_scheduler(),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
