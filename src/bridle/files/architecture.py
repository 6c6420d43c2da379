"""What decides the parameters of a control of the U-Net kind; to and from a diffusers configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridle.errors import FileError
from bridle.files.official import official_name
from bridle.files.tensors import CONFIG

OFFICIAL_HINT = (16, 32, 96, 256)
# Settings that change parameters in a way which neither the official format nor this module knows.
PLAIN = {
    "encoder_hid_dim": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
}
LARGEST = 64  # levels, layers and depths; a file may claim any number
FAMILIES = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}  # by the width of the text


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that decides a control's parameters.

    Args:
        widths: channels of each level.
        layers: residual blocks per level.
        depths: transformer blocks in each attention of each level; 0 where a level does not attend.
        middle_depth: the same for the middle block; 0 gives it one residual block and no attention.
        text_width: of the text's states.
        linear: whether attention projects with linear layers (Stable Diffusion 2 and later) or convolutions.
        added: "add_embedding" (SDXL's sizes and pooled text), "class_embedding", or "" for none.
        added_width: of what goes into it; 0 for none.
        hint_widths: of the hint encoder; empty where it is not diffusers'.
    """

    widths: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]
    middle_depth: int
    text_width: int
    linear: bool
    in_channels: int
    added: str
    added_width: int
    hint_channels: int
    hint_widths: tuple[int, ...]

    @property
    def family(self) -> str:
        """sd1, sd2, sdxl, or other."""
        return FAMILIES.get(self.text_width, "other")

    @property
    def links(self) -> int:
        """The connections to the base, the middle one included."""
        return len(self.widths) * (self.layers + 1) + 1

    def official(self, name: str) -> str:
        """The official name of one of this control's parameters, or of its base's. Raises: KeyError: it is none."""
        attends = [depth > 0 for depth in reversed(self.depths)]
        return official_name(name, self.layers, hint_convs=2 * len(self.hint_widths), up_attends=attends)


def from_config(config: Mapping[str, Any], path: Path) -> Architecture:
    """Args: config: of diffusers' `ControlNetModel`; what it leaves out has diffusers' default.

    Raises: FileError: a setting is of the wrong type, or of a kind that is not known here.
    """
    for name, plain in PLAIN.items():
        if config.get(name, plain) != plain:
            raise FileError(f"{path} has {name} = {config[name]!r}, which Bridle does not know; expected {plain!r}")
    try:
        return read_config(config)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"the configuration of {path} is damaged ({error}); copy it again") from None


def read_config(config: Mapping[str, Any]) -> Architecture:
    widths = tuple(int(width) for width in config.get("block_out_channels", (320, 640, 1280, 1280)))
    types = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    depth = config.get("transformer_layers_per_block", 1)
    depths = [int(one) for one in ([depth] * len(widths) if isinstance(depth, int) else depth)]
    layers = int(config.get("layers_per_block", 2))
    if not len(widths) == len(types) == len(depths) > 0:
        raise ValueError(f"{len(widths)} widths for {len(types)} levels and {len(depths)} depths")
    if min(*widths, *depths, layers) < 1 or max(*depths, layers, len(widths)) > LARGEST:
        raise ValueError(f"{layers} layers, depths {depths}, widths {list(widths)}")
    added = {"text_time": "add_embedding"}.get(config.get("addition_embed_type") or "", "")
    added = added or {"projection": "class_embedding"}.get(config.get("class_embed_type") or "", "")
    if not added and (config.get("addition_embed_type") or config.get("class_embed_type")):
        raise ValueError("an added condition of a kind that Bridle does not know")
    return Architecture(
        widths=widths,
        layers=layers,
        depths=tuple(one if "CrossAttn" in kind else 0 for one, kind in zip(depths, types, strict=True)),
        middle_depth=depths[-1] if "CrossAttn" in config.get("mid_block_type", "UNetMidBlock2DCrossAttn") else 0,
        text_width=int(config.get("cross_attention_dim", 1280)),
        linear=bool(config.get("use_linear_projection", False)),
        in_channels=int(config.get("in_channels", 4)),
        added=added,
        added_width=int(config["projection_class_embeddings_input_dim"]) if added else 0,
        hint_channels=int(config.get("conditioning_channels", 3)),
        hint_widths=tuple(int(width) for width in config.get("conditioning_embedding_out_channels", OFFICIAL_HINT)),
    )


def to_config(shape: Architecture, path: Path) -> dict[str, Any]:
    """diffusers' configuration. How many heads attend cannot be seen in weights; every model so far keeps to one rule.

    Raises: FileError: the rule does not fit, or diffusers has no setting for it.
    """
    if shape.depths[-1] not in (0, shape.middle_depth):
        raise FileError(
            f"{path} attends {shape.depths[-1]} deep before its middle block and {shape.middle_depth} in it"
        )
    if shape.linear and any(width % 64 for width in shape.widths):
        raise FileError(f"{path} does not say how many heads attend; put it in a folder with its {CONFIG}")
    depths = [depth or 1 for depth in shape.depths[:-1]] + [shape.middle_depth or 1]
    added: dict[str, Any] = {}
    if shape.added == "add_embedding":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    elif shape.added:
        added = {"class_embed_type": "projection"}
    if shape.added:
        added["projection_class_embeddings_input_dim"] = shape.added_width
    return {
        "_class_name": "ControlNetModel",
        "in_channels": shape.in_channels,
        "conditioning_channels": shape.hint_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in shape.depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if shape.middle_depth else "UNetMidBlock2D",
        "block_out_channels": list(shape.widths),
        "layers_per_block": shape.layers,
        "cross_attention_dim": shape.text_width,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        # Eight heads in Stable Diffusion 1, heads of 64 channels from 2 on; diffusers' name for either is this one.
        "attention_head_dim": [width // 64 for width in shape.widths] if shape.linear else 8,
        "use_linear_projection": shape.linear,
        "conditioning_embedding_out_channels": list(shape.hint_widths),
        **added,
    }
