"""Controls and bases as other tools know them: diffusers' own classes, tiny, with random weights everywhere."""

import json
import math
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridle.files.architecture import from_config
from bridle.files.tensors import CONFIG, WEIGHTS

SD15: dict[str, Any] = {"cross_attention_dim": 768}
SD21: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The smaller controls that diffusers trained for SDXL: fewer levels attend, or none.
SDXL_MID = SDXL | {
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": 1,
}
SDXL_SMALL = SDXL | {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
SD15_F4 = SD15 | {"conditioning_embedding_out_channels": (16, 32, 96)}  # four pixels per latent
FULL_SIZE = {
    "sd15": SD15,
    "sd15 f4": SD15_F4,
    "sd21": SD21,
    "sdxl": SDXL,
    "sdxl mid": SDXL_MID,
    "sdxl small": SDXL_SMALL,
}

FACTS = {"base": "embedded", "hint": "canny", "steps": 400, "lr": 6e-4, "license": "CC0-1.0", "links": "all"}


def make_meta(**config: Any) -> ControlNetModel:
    """Of any size, without weights."""
    with torch.device("meta"):
        return ControlNetModel(**config)


def make_net(seed: int = 1, **changes: Any) -> ControlNetModel:
    """The control of `tiny.make_unet`, no weight of it zero."""
    net = ControlNetModel.from_unet(tiny.make_unet(**changes), conditioning_channels=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return net


def weights_of(net: ControlNetModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def official_of(net: ControlNetModel) -> dict[str, Tensor]:
    """Its weights under official names, without prefix."""
    shape = from_config(net.config, Path("net"))
    return {shape.official(name): value for name, value in weights_of(net).items()}


def write_folder(folder: Path, net: ControlNetModel, facts: dict[str, Any] | None = None, **header: str) -> Path:
    """As Bridle saves a control; without facts, as diffusers does."""
    net.save_config(folder)
    own = {"bridle": json.dumps(facts)} if facts else {}
    save_file(weights_of(net), folder / WEIGHTS, {"format": "pt", **own, **header})
    return folder


def write_base(path: Path, unet: UNet2DConditionModel) -> Path:
    """A single-file checkpoint, as far as the U-Net goes, and one tensor of each of its other parts."""
    shape = from_config(ControlNetModel.from_unet(unet).config, path)
    tensors = {f"model.diffusion_model.{shape.official(name)}": value for name, value in unet.state_dict().items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 4, 3, 3)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """A file of any size whose weights are all zero: a hole, which takes no room on the disk."""
    header: dict[str, Any] = {}
    offset, itemsize = 0, {"F32": 4, "F16": 2}[dtype]
    for name, shape in shapes.items():
        end = offset + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names, types and values, bit for bit."""
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) and value.dtype == right[name].dtype for name, value in left.items()
    )


def load(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS if path.is_dir() else path)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
