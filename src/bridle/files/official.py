"""The names that the official ControlNet code gives to what diffusers calls otherwise.

The official U-Net counts its blocks through (`input_blocks.7`) where diffusers counts levels and layers
(`down_blocks.2.resnets.0`), so the number of layers per level is all that has to be known. Checked against the official
list, and against diffusers' own conversion, in the tests.
"""

from collections.abc import Sequence

CONTROL = "control_model."
UNET = "model.diffusion_model."

ALONE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def official_name(name: str, layers: int, *, hint_convs: int = 8, up_attends: Sequence[bool] = ()) -> str:
    """The official name of a parameter of diffusers' `ControlNetModel` or `UNet2DConditionModel`, without prefix.

    Args:
        layers: residual blocks per level of the encoder.
        hint_convs: of the hint encoder, counted from its first to its last.
        up_attends: for each level of the decoder, first to last, whether it attends; only a decoder's names need it.

    Raises: KeyError: the models have no such parameter.
    """
    module, _, kind = name.rpartition(".")
    try:
        return f"{ALONE.get(module) or official_module(module.split('.'), layers, hint_convs, up_attends)}.{kind}"
    except (KeyError, ValueError, IndexError):  # ValueError: a number is none
        raise KeyError(name) from None


def official_module(parts: list[str], layers: int, hint_convs: int, up_attends: Sequence[bool]) -> str:
    match parts:
        case ["controlnet_down_blocks", link]:
            return f"zero_convs.{int(link)}.0"
        case ["controlnet_cond_embedding", "blocks", block]:
            return f"input_hint_block.{2 * int(block) + 2}"  # an activation between each two convolutions
        case ["controlnet_cond_embedding", "conv_out"]:
            return f"input_hint_block.{2 * hint_convs - 2}"
        case ["down_blocks", level, "downsamplers", "0", "conv"]:
            return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op"
        case ["down_blocks", level, kind, layer, *inner]:
            return f"input_blocks.{1 + int(level) * (layers + 1) + int(layer)}.{official_inner(kind, inner)}"
        case ["mid_block", "resnets", block, inner]:
            return f"middle_block.{2 * int(block)}.{RESNET[inner]}"
        case ["mid_block", "attentions", block, *inner]:
            return f"middle_block.{2 * int(block) + 1}.{'.'.join(inner)}"
        case ["up_blocks", level, "upsamplers", "0", "conv"]:
            last = int(level) * (layers + 1) + layers
            return f"output_blocks.{last}.{2 if up_attends[int(level)] else 1}.conv"
        case ["up_blocks", level, kind, layer, *inner]:
            return f"output_blocks.{int(level) * (layers + 1) + int(layer)}.{official_inner(kind, inner)}"
    raise KeyError(".".join(parts))


def official_inner(kind: str, inner: list[str]) -> str:
    """Within a block, the residual part comes first and the attention second; attention has the same names in both."""
    if kind == "resnets":
        return f"0.{RESNET['.'.join(inner)]}"
    if kind == "attentions":
        return f"1.{'.'.join(inner)}"
    raise KeyError(kind)
