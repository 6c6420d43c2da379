"""Official names: the list as the official network is built, at full size, and diffusers' own conversion of it."""

from pathlib import Path
from typing import Any

import made
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint

from bridle.errors import FileError
from bridle.files.architecture import Architecture, from_config, to_config
from bridle.files.infer import infer, infer_diffusers
from bridle.files.layout import layout
from bridle.files.tensors import Spec

NOWHERE = Path("control")
Shape = tuple[int, ...]


class OfficialNetwork:
    """The official ControlNet written down as its constructor runs: one block after another, counted through.

    Args: those of the official configuration: `channel_mult`, the depth of the transformers of each level and of the
        middle block, the width of the text, `use_linear_in_transformer`, `adm_in_channels`.
    """

    def __init__(
        self, mult: tuple[int, ...], depths: tuple[int, ...], middle: int, text: int, linear: bool, added: int = 0
    ) -> None:
        self.mult, self.depths, self.middle, self.text, self.linear, self.added = (
            mult,
            depths,
            middle,
            text,
            linear,
            added,
        )
        self.parameters: dict[str, Shape] = {}
        self.build()

    def build(self, channels: int = 320, blocks: int = 2) -> None:
        self.affine("time_embed.0", (1280, 320))
        self.affine("time_embed.2", (1280, 1280))
        if self.added:
            self.affine("label_emb.0.0", (1280, self.added))
            self.affine("label_emb.0.2", (1280, 1280))
        self.affine("input_blocks.0.0", (channels, 4, 3, 3))
        self.affine("zero_convs.0.0", (channels, channels, 1, 1))
        self.hint()
        number, before = 1, channels
        for level, mult in enumerate(self.mult):
            width = channels * mult
            for _ in range(blocks):
                self.residual(f"input_blocks.{number}.0", before, width)
                self.attention(f"input_blocks.{number}.1", width, self.depths[level])
                self.affine(f"zero_convs.{number}.0", (width, width, 1, 1))
                number, before = number + 1, width
            if level < len(self.mult) - 1:
                self.affine(f"input_blocks.{number}.0.op", (width, width, 3, 3))
                self.affine(f"zero_convs.{number}.0", (width, width, 1, 1))
                number += 1
        self.residual("middle_block.0", before, before)
        self.attention("middle_block.1", before, self.middle)
        self.residual("middle_block.2", before, before)
        self.affine("middle_block_out.0", (before, before, 1, 1))

    def affine(self, name: str, shape: Shape) -> None:
        self.parameters |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def hint(self) -> None:
        steps = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320)]
        for number, (before, after) in zip(range(0, 15, 2), steps, strict=True):
            self.affine(f"input_hint_block.{number}", (after, before, 3, 3))

    def residual(self, name: str, before: int, after: int) -> None:
        self.affine(f"{name}.in_layers.0", (before,))
        self.affine(f"{name}.in_layers.2", (after, before, 3, 3))
        self.affine(f"{name}.emb_layers.1", (after, 1280))
        self.affine(f"{name}.out_layers.0", (after,))
        self.affine(f"{name}.out_layers.3", (after, after, 3, 3))
        if before != after:
            self.affine(f"{name}.skip_connection", (after, before, 1, 1))

    def attention(self, name: str, width: int, depth: int) -> None:
        project = (width, width) if self.linear else (width, width, 1, 1)
        if depth:
            self.affine(f"{name}.norm", (width,))
            self.affine(f"{name}.proj_in", project)
            self.affine(f"{name}.proj_out", project)
        for number in range(depth):
            block = f"{name}.transformer_blocks.{number}"
            for attention, source in (("attn1", width), ("attn2", self.text)):
                sizes = {"to_q": width, "to_k": source, "to_v": source}
                self.parameters |= {f"{block}.{attention}.{part}.weight": (width, size) for part, size in sizes.items()}
                self.affine(f"{block}.{attention}.to_out.0", (width, width))
            self.affine(f"{block}.ff.net.0.proj", (8 * width, width))
            self.affine(f"{block}.ff.net.2", (width, 4 * width))
            for norm in ("norm1", "norm2", "norm3"):
                self.affine(f"{block}.{norm}", (width,))


OFFICIAL = {
    "sd15": OfficialNetwork((1, 2, 4, 4), (1, 1, 1, 0), 1, 768, linear=False).parameters,
    "sd21": OfficialNetwork((1, 2, 4, 4), (1, 1, 1, 0), 1, 1024, linear=True).parameters,
    "sdxl": OfficialNetwork((1, 2, 4), (0, 2, 10), 10, 2048, linear=True, added=2816).parameters,
}


@pytest.fixture(scope="module", params=made.FULL_SIZE)
def network(request: pytest.FixtureRequest) -> tuple[str, Any, Architecture]:
    """Its name, diffusers' model at full size, and its architecture."""
    net = made.make_meta(**made.FULL_SIZE[request.param])
    return request.param, net, from_config(net.config, NOWHERE)


def test_the_official_list_is_met_name_by_name_and_shape_by_shape() -> None:
    counts = {}
    for name, parameters in OFFICIAL.items():
        shape = from_config(made.FULL_SIZE[name], NOWHERE)
        ours = {shape.official(parameter): size for parameter, size in layout(shape).items()}
        assert ours == parameters
        counts[name] = len(parameters)
    assert counts == {"sd15": 340, "sd21": 340, "sdxl": 844}


def test_the_layout_is_diffusers_own(network: tuple[str, Any, Architecture]) -> None:
    _, net, shape = network
    assert layout(shape) == {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shape.links == len(net.controlnet_down_blocks) + 1


def test_the_architecture_is_told_from_either_names(network: tuple[str, Any, Architecture]) -> None:
    _, net, shape = network
    ours = {name: Spec(torch.float16, tuple(value.shape)) for name, value in net.state_dict().items()}
    official = {shape.official(name): spec for name, spec in ours.items()}
    assert len(official) == len(ours)
    assert infer(official, NOWHERE) == infer_diffusers(ours, NOWHERE) == shape


def test_the_configuration_told_from_weights_is_the_one_they_were_made_with(
    network: tuple[str, Any, Architecture],
) -> None:
    name, net, shape = network
    told = made.make_meta(**{key: value for key, value in to_config(shape, NOWHERE).items() if key[0] != "_"})
    differing = {key for key in net.config if key[0] != "_" and listed(net.config[key]) != listed(told.config[key])}
    # Where no level attends, how deep it would cannot be seen, and is of no matter.
    assert differing == ({"transformer_layers_per_block"} if name == "sdxl small" else set())


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_diffusers_converts_the_official_list_to_the_same_names(name: str) -> None:
    tensors = {key: torch.empty(size, device="meta") for key, size in OFFICIAL[name].items()}
    config = made.make_meta(**made.FULL_SIZE[name]).config
    shape = from_config(config, NOWHERE)
    theirs = convert_controlnet_checkpoint({f"control_model.{key}": value for key, value in tensors.items()}, config)
    assert theirs.keys() == layout(shape).keys()
    assert [key for key, value in theirs.items() if value is not tensors[shape.official(key)]] == []


UPS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
UNETS = {
    "sd15": made.SD15 | {"up_block_types": UPS, "attention_head_dim": 8},
    "sd21": made.SD21 | {"up_block_types": UPS},
    "sdxl": made.SDXL | {"up_block_types": (*UPS[:0:-1][:2], UPS[0])},
}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_converts_our_names_of_a_whole_unet_back(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    shape = from_config(made.FULL_SIZE[name], NOWHERE)
    tensors = unet.state_dict()
    official = {f"model.diffusion_model.{shape.official(key)}": value for key, value in tensors.items()}
    assert len(official) == len(tensors)
    theirs = convert_ldm_unet_checkpoint(official, unet.config)
    assert theirs.keys() == tensors.keys()
    assert [key for key, value in theirs.items() if value is not tensors[key]] == []


def test_upsampling_comes_after_the_attention_of_its_block() -> None:
    shape = from_config(made.SD15, NOWHERE)
    ours = [shape.official(f"up_blocks.{level}.upsamplers.0.conv.weight") for level in range(3)]
    assert ours == ["output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"]


def test_the_hint_encoder_ends_where_its_last_convolution_stands() -> None:
    names = [
        from_config(config, NOWHERE).official("controlnet_cond_embedding.conv_out.bias")
        for config in (made.SD15, made.SD15_F4)
    ]
    assert names == ["input_hint_block.14.bias", "input_hint_block.10.bias"]


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.0.norm9.weight",
        "down_blocks.x.resnets.0.norm1.weight",
        "up_blocks.9.upsamplers.0.conv.bias",
    ],
)
def test_a_name_that_no_control_has_has_no_official_one(name: str) -> None:
    with pytest.raises(KeyError):
        from_config(made.SD15, NOWHERE).official(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers_per_block": 10**9}, "is damaged"),
        ({"layers_per_block": "two"}, "is damaged"),
        ({"block_out_channels": [320]}, "1 widths for 4 levels"),
        ({"addition_embed_type": "text_image"}, "a kind that Bridle does not know"),
        ({"only_cross_attention": True}, "only_cross_attention = True"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(FileError, match=said):
        from_config(made.SD15 | change, NOWHERE)
