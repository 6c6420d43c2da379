"""What a weight file is, told by the names in it. Out: a `Kind`, with what to do where Bridle does not read it."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from bridle.files.official import CONTROL, UNET

Names = Collection[str]


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        name: short, for machines.
        title: what to call it in a sentence, with its article.
        remedy: what to do in place of reading it; empty where Bridle reads it.
    """

    name: str
    title: str
    remedy: str = ""


OFFICIAL_FULL = Kind("official with base", "an official checkpoint, the control beside its base")
OFFICIAL = Kind("official", "a control under official names")
BARE = Kind("official without prefix", "a control under official names without prefix")
DIFFERENCE = Kind("difference", "a control as a difference to its base")
DIFFUSERS = Kind("diffusers", "a control under diffusers' names")
SD3 = Kind("sd3 diffusers", "a control for Stable Diffusion 3 under diffusers' names")
FLUX = Kind("flux diffusers", "a control for Flux under diffusers' names")
PIXEL = Kind("pixel", "a control for a U-Net that works on pixels")
MODULE = Kind("module", "a control of a model of your own", "load it with load_module_control(folder, model)")
UNKNOWN = Kind("unknown", "nothing that Bridle knows", "give a control; see docs/files.md for what can be read")

USE_THERE = "use it in ComfyUI or diffusers, or train a control of your own"
NO_CONTROL = "give a control; this one goes beside it, loaded into the pipeline"
UNION = Kind("ControlNet-Union", "a ControlNet-Union, one control for several kinds of hints", USE_THERE)
T2I = Kind("T2I-Adapter", "a T2I-Adapter, which is no copy of the base's encoder", USE_THERE)
LLLITE = Kind("ControlNet-LLLite", "a ControlNet-LLLite, small layers inside the base's attention", USE_THERE)
CONTROL_LORA = Kind("Control-LoRA", "a Control-LoRA, a control as low-rank changes of its base", USE_THERE)
XS = Kind("ControlNet-XS", "a ControlNet-XS, a control wired both ways with its base", USE_THERE)
SPARSE = Kind("SparseCtrl", "a SparseCtrl, a control for video", USE_THERE)
OTHER_FLUX = Kind("flux, not diffusers", "a control for Flux in a layout of XLabs or MistoLine", USE_THERE)
STABILITY_SD3 = Kind("sd3.5, Stability", "a control for Stable Diffusion 3.5 in Stability's own layout", USE_THERE)
OTHER_CONTROL = Kind("other control", "a control for a family that Bridle does not know", USE_THERE)
IP_ADAPTER = Kind("IP-Adapter", "an IP-Adapter", NO_CONTROL)
LORA = Kind("LoRA", "a LoRA", NO_CONTROL)
EMBEDDING = Kind("textual inversion", "a textual inversion", NO_CONTROL)
DELTA = Kind("base delta", "what training changed in a base", "give the control folder that it lies in")
BASE_REMEDY = "give it as the base, and a control beside it"
BASE = Kind("base", "a base checkpoint without a control", BASE_REMEDY)
BASE_UNET = Kind("base U-Net", "a base's U-Net without a control", BASE_REMEDY)
BASE_TRANSFORMER = Kind("base transformer", "a base's transformer without a control", BASE_REMEDY)
PART = Kind("part of a base", "an autoencoder or text encoder", BASE_REMEDY)


def any_like(pattern: str) -> Callable[[Names], bool]:
    compiled = re.compile(pattern)
    return lambda names: any(compiled.search(name) for name in names)


def all_of(*wanted: str) -> Callable[[Names], bool]:
    return lambda names: all(name in names for name in wanted)


def any_of(*wanted: str) -> Callable[[Names], bool]:
    return lambda names: any(name in names for name in wanted)


HINT = "input_hint_block.0.weight"
# The first row that fits says what it is, so what contains something else stands above it.
TABLE: tuple[tuple[Kind, Callable[[Names], bool]], ...] = (
    (CONTROL_LORA, any_of("lora_controlnet")),
    (DIFFERENCE, lambda names: "difference" in names and (HINT in names or CONTROL + HINT in names)),
    (OFFICIAL_FULL, all_of(CONTROL + HINT, f"{UNET}input_blocks.0.0.weight")),
    (OFFICIAL, all_of(CONTROL + HINT)),
    (UNION, any_of("task_embedding", "control_add_embedding.linear_1.weight")),
    (UNION, any_like(r"^controlnet_mode_embedder\.")),
    (XS, any_like(r"(base_to_ctrl|ctrl_to_base|enc_to_ctrl)")),
    (SPARSE, any_like(r"motion_modules\..*")),
    (BARE, all_of(HINT)),
    (DIFFUSERS, any_of("controlnet_cond_embedding.conv_in.weight", "controlnet_cond_embedding.0.weight")),
    (OTHER_FLUX, any_of("controlnet_blocks.0.linear.weight")),
    (OTHER_FLUX, all_of("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale")),
    (STABILITY_SD3, all_of("controlnet_blocks.0.weight", "transformer_blocks.0.adaLN_modulation.1.bias")),
    (SD3, all_of("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")),
    (FLUX, all_of("controlnet_blocks.0.weight", "controlnet_x_embedder.weight")),
    (
        OTHER_CONTROL,
        any_of("after_proj_list.18.bias", "control_all_x_embedder.2-1.weight", "controlnet_blocks.0.weight"),
    ),
    (LLLITE, any_like(r"^lllite_")),
    (T2I, any_of("body.0.in_conv.weight", "adapter.body.0.resnets.0.block1.weight", "adapter.body.0.in_conv.weight")),
    (T2I, any_of("body.0.block2.weight", "adapter.body.0.block2.weight")),
    (IP_ADAPTER, any_like(r"^(ip_adapter|image_proj)\.")),
    (LORA, any_like(r"(^lora_(unet|te)|\.lora_(A|B|down|up)\.|\.lora\.(down|up)\.|\.hada_w1_a$|\.lokr_w1)")),
    (EMBEDDING, any_of("emb_params", "string_to_param.*", "clip_l", "clip_g")),
    (BASE, any_like(r"^model\.diffusion_model\.")),
    (BASE_UNET, all_of("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight")),
    (BASE_UNET, all_of("input_blocks.0.0.weight", "out.2.weight")),
    (BASE_TRANSFORMER, any_like(r"^(transformer_blocks|double_blocks|joint_blocks)\.0\.")),
    (PART, any_like(r"^((first_stage|cond_stage)_model|conditioner|text_model|decoder|quant_conv)\.")),
)
# What diffusers calls the class of a folder's model.
CLASSES = {
    "ControlNetModel": DIFFUSERS,
    "SD3ControlNetModel": SD3,
    "FluxControlNetModel": FLUX,
    "BridlePixelControl": PIXEL,
    "BridleModuleControl": MODULE,
    "ControlNetUnionModel": UNION,
    "ControlNetXSAdapter": XS,
    "UNetControlNetXSModel": XS,
    "SparseControlNetModel": SPARSE,
    "T2IAdapter": T2I,
    "MultiAdapter": T2I,
    "UNet2DConditionModel": BASE_UNET,
    "SD3Transformer2DModel": BASE_TRANSFORMER,
    "FluxTransformer2DModel": BASE_TRANSFORMER,
    "AutoencoderKL": PART,
}


def recognise(names: Names, file_name: str = "") -> Kind:
    """Args: file_name: Bridle's base deltas hold any of a U-Net's parameters and are told by it."""
    if file_name.startswith("base_delta-"):
        return DELTA
    return next((kind for kind, fits in TABLE if fits(names)), UNKNOWN)


def recognise_class(name: object) -> Kind:
    """Args: name: `_class_name` in a diffusers configuration."""
    if not isinstance(name, str):
        return UNKNOWN
    return CLASSES.get(name, OTHER_CONTROL if "ControlNet" in name else UNKNOWN)
