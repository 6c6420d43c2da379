"""A pipeline's weights as one checkpoint under the original code's names; the way back is diffusers'."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridle.files.architecture import from_config

VAE = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"(down|up)_blocks\.(\d)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d)\.\1samplers\.0", r"\1.\2.\1sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
)
OPEN_CLIP = (
    (r"(text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"(text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"(text_model\.)?final_layer_norm", "ln_final"),
    (r"(text_model\.)?encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"text_projection\.weight", "text_projection"),
)


def checkpoint_of(pipeline: Any) -> dict[str, Tensor]:
    """Of Stable Diffusion 1 and 2, and SDXL."""
    tensors = unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:
        tensors |= open_clip_tensors(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= clip_tensors(pipeline.text_encoder, "cond_stage_model.transformer.text_model.")
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    shape = from_config(unet.config, Path("unet"))
    return {f"model.diffusion_model.{shape.official(name)}": tensor for name, tensor in unet.state_dict().items()}


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    tensors, last = {}, len(vae.config.block_out_channels) - 1
    for name, tensor in vae.state_dict().items():
        old = substitute(name, VAE)
        old = re.sub(r"\bup\.(\d)", lambda found: f"up.{last - int(found[1])}", old)
        square = "attn_1" in old and tensor.ndim == 2  # attention was made of 1x1 convolutions
        tensors[f"first_stage_model.{old}"] = tensor[..., None, None] if square else tensor
    return tensors


def clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in encoder.state_dict().items()}


def open_clip_tensors(encoder: Any, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        if ".q_proj." in name:
            rows = [encoder.state_dict()[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            joined = re.sub(r"self_attn\.q_proj\.(\w+)", r"attn.in_proj_\1", name)
            tensors[prefix + substitute(joined, OPEN_CLIP)] = torch.cat(rows)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[prefix + substitute(name, OPEN_CLIP)] = tensor.T if "text_projection" in name else tensor
    return tensors


def substitute(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name
