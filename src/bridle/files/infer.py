"""The architecture of a control whose file says nothing of it, read off its parameters' names and shapes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from bridle.errors import FileError
from bridle.files.architecture import Architecture
from bridle.files.official import official_name
from bridle.files.tensors import Spec

FROM_DIFFUSERS = re.compile(r"down_blocks\.0\.resnets\.\d+\.norm1\.weight")


def infer(specs: Mapping[str, Spec], path: Path) -> Architecture:
    """Args: specs: under official names, without prefix. Raises: FileError: no control looks like that."""
    try:
        return read_shapes({name: spec.shape for name, spec in specs.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise FileError(f"{path} lacks {error}, without which its size cannot be told; take another copy") from None


def infer_diffusers(specs: Mapping[str, Spec], path: Path) -> Architecture:
    """The same from diffusers' names."""
    layers = len([name for name in specs if FROM_DIFFUSERS.fullmatch(name)])
    blocks = len([name for name in specs if re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", name)])
    renamed = {}
    for name, spec in specs.items():
        try:
            renamed[official_name(name, layers, hint_convs=blocks + 2)] = spec
        except KeyError:  # named as unknown once the architecture says what there should be
            continue
    shape = infer(renamed, path)
    if shape.added and "class_embedding.linear_1.weight" in specs:
        return replace(shape, added="class_embedding")
    return shape


def read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    first = shapes["input_blocks.0.0.weight"]
    levels = list(read_levels(shapes))
    layers = {len(level) for level in levels}
    if len(layers) != 1 or 0 in layers or any(len(set(level)) != 1 for level in levels):
        raise KeyError("levels of equal blocks")
    text = [size[1] for name, size in sorted(shapes.items()) if name.endswith(".attn2.to_k.weight")]
    added = shapes.get("label_emb.0.0.weight", (0, 0))[1]
    linear = any(name.endswith(".1.proj_in.weight") and len(size) == 2 for name, size in shapes.items())
    # The smallest SDXL controls attend nowhere; what is added still tells them.
    text_width = text[0] if text else 2048 if added else 768
    hint = list(read_hint(shapes))
    return Architecture(
        widths=tuple(level[0][0] for level in levels),
        layers=layers.pop(),
        depths=tuple(level[0][1] for level in levels),
        middle_depth=count_depth(shapes, "middle_block.1"),
        text_width=text_width,
        linear=linear or (not text and bool(added)),
        in_channels=first[1],
        added=("class_embedding" if text_width == 1024 else "add_embedding") if added else "",
        added_width=added,
        hint_channels=hint[0][1],
        hint_widths=(hint[0][0], *(shape[0] for shape in hint[2:-1:2])),
    )


def read_levels(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[tuple[int, int]]]:
    """For each level the channels and the depth of attention of each of its blocks."""
    level: list[tuple[int, int]] = []
    for number in count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            yield level
            level = []
        elif f"{block}.0.out_layers.3.weight" in shapes:
            level.append((shapes[f"{block}.0.out_layers.3.weight"][0], count_depth(shapes, f"{block}.1")))
        else:
            yield level
            return


def read_hint(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Its convolutions one after another."""
    for number in count(0, 2):
        if f"input_hint_block.{number}.weight" not in shapes:
            return
        yield shapes[f"input_hint_block.{number}.weight"]


def count_depth(shapes: Mapping[str, tuple[int, ...]], block: str) -> int:
    return next(n for n in count() if f"{block}.transformer_blocks.{n}.norm1.weight" not in shapes)
