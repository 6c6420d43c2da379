"""Every parameter of a control of the U-Net kind, with its shape, from the architecture alone."""

from collections.abc import Iterator
from itertools import pairwise

from bridle.files.architecture import Architecture

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def layout(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of diffusers' `ControlNetModel` with its shape."""
    return dict(encoder(shape)) | dict(hint_encoder(shape)) | dict(links(shape))


def encoder(shape: Architecture) -> Shapes:
    """What a control copies from its base, under the same names."""
    first, time = shape.widths[0], 4 * shape.widths[0]
    yield from conv("conv_in", shape.in_channels, first, 3)
    yield from perceptron("time_embedding", first, time)
    if shape.added:
        yield from perceptron(shape.added, shape.added_width, time)
    before = first
    for level, (width, depth) in enumerate(zip(shape.widths, shape.depths, strict=True)):
        name = f"down_blocks.{level}"
        for layer in range(shape.layers):
            yield from resnet(f"{name}.resnets.{layer}", before, width, time)
            if depth:
                yield from transformer(f"{name}.attentions.{layer}", width, depth, shape)
            before = width
        if level < len(shape.widths) - 1:
            yield from conv(f"{name}.downsamplers.0.conv", width, width, 3)
    yield from resnet("mid_block.resnets.0", before, before, time)
    if shape.middle_depth:
        yield from transformer("mid_block.attentions.0", before, shape.middle_depth, shape)
        yield from resnet("mid_block.resnets.1", before, before, time)


def hint_encoder(shape: Architecture) -> Shapes:
    if not shape.hint_widths:
        return
    name, widths = "controlnet_cond_embedding", shape.hint_widths
    yield from conv(f"{name}.conv_in", shape.hint_channels, widths[0], 3)
    for step, (before, after) in enumerate(pairwise(widths)):
        yield from conv(f"{name}.blocks.{2 * step}", before, before, 3)
        yield from conv(f"{name}.blocks.{2 * step + 1}", before, after, 3)
    yield from conv(f"{name}.conv_out", widths[-1], shape.widths[0], 3)


def links(shape: Architecture) -> Shapes:
    widths = [shape.widths[0]]
    for level, width in enumerate(shape.widths):
        widths += [width] * (shape.layers + (level < len(shape.widths) - 1))
    for link, width in enumerate(widths):
        yield from conv(f"controlnet_down_blocks.{link}", width, width, 1)
    yield from conv("controlnet_mid_block", widths[-1], widths[-1], 1)


def resnet(name: str, before: int, after: int, time: int) -> Shapes:
    yield from norm(f"{name}.norm1", before)
    yield from conv(f"{name}.conv1", before, after, 3)
    yield from linear(f"{name}.time_emb_proj", time, after)
    yield from norm(f"{name}.norm2", after)
    yield from conv(f"{name}.conv2", after, after, 3)
    if before != after:
        yield from conv(f"{name}.conv_shortcut", before, after, 1)


def transformer(name: str, width: int, depth: int, shape: Architecture) -> Shapes:
    yield from norm(f"{name}.norm", width)
    for part in ("proj_in", "proj_out"):
        yield from linear(f"{name}.{part}", width, width) if shape.linear else conv(f"{name}.{part}", width, width, 1)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for part in ("norm1", "norm2", "norm3"):
            yield from norm(f"{block}.{part}", width)
        for part, source in (("attn1", width), ("attn2", shape.text_width)):
            yield f"{block}.{part}.to_q.weight", (width, width)
            yield f"{block}.{part}.to_k.weight", (width, source)
            yield f"{block}.{part}.to_v.weight", (width, source)
            yield from linear(f"{block}.{part}.to_out.0", width, width)
        yield from linear(f"{block}.ff.net.0.proj", width, 8 * width)  # gated: half of it scales the other half
        yield from linear(f"{block}.ff.net.2", 4 * width, width)


def perceptron(name: str, before: int, after: int) -> Shapes:
    yield from linear(f"{name}.linear_1", before, after)
    yield from linear(f"{name}.linear_2", after, after)


def conv(name: str, before: int, after: int, kernel: int) -> Shapes:
    yield f"{name}.weight", (after, before, kernel, kernel)
    yield f"{name}.bias", (after,)


def linear(name: str, before: int, after: int) -> Shapes:
    yield f"{name}.weight", (after, before)
    yield f"{name}.bias", (after,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
