"""A held step takes over what the last whole one computed, and nothing else changes."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.sample.recall import recalled

STEPS = 6


class Counts:
    """How often each was computed."""

    def __init__(self, pipeline: Any, control: Control) -> None:
        self.of = dict.fromkeys(("control", "encoder", "deep", "decoder", "output"), 0)
        unet = pipeline.unet
        watched = {
            "control": control.mid_block,
            "encoder": unet.down_blocks[0].resnets[0],
            "deep": unet.up_blocks[0].resnets[0],
            "decoder": unet.up_blocks[-1].resnets[0],
            "output": unet.conv_out,
        }
        for name, module in watched.items():
            module.register_forward_hook(lambda *args, name=name: self.of.__setitem__(name, self.of[name] + 1))


def draw(pipeline: Any, control: Control | None, every: int | None, drawings: int = 1) -> Tensor:
    images = torch.zeros(0)
    with torch.no_grad():
        rig = attach(pipeline, it=control) if control is not None else None
        if rig is not None:
            rig["it"].set(hint=tiny.make_hint())
        for _ in range(drawings):
            told = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
            if every is None:
                images = pipeline("a red apple", num_inference_steps=STEPS, **told).images
            else:
                with recalled(pipeline, rig, every):
                    images = pipeline("a red apple", num_inference_steps=STEPS, **told).images
        if rig is not None:
            rig.detach()
    return images


def test_only_the_outermost_blocks_are_computed_in_every_step(pipeline: Any, control: Control) -> None:
    counts = Counts(pipeline, control)
    draw(pipeline, control, 2)
    assert counts.of == {"control": 3, "encoder": 6, "deep": 3, "decoder": 6, "output": 6}


def test_each_drawing_begins_anew(pipeline: Any, control: Control) -> None:
    every = 2
    assert torch.equal(draw(pipeline, control, every, drawings=2), draw(pipeline, control, every))


def test_a_step_that_holds_nothing_is_the_plain_one(pipeline: Any, control: Control) -> None:
    plain = draw(pipeline, control, None)
    assert torch.equal(draw(pipeline, control, 1), plain)
    assert not torch.equal(draw(pipeline, control, 2), plain)
    assert torch.equal(draw(pipeline, control, None), plain)  # and it is undone
    assert not pipeline.unet._forward_pre_hooks


def test_it_holds_without_a_control_too(pipeline: Any, control: Control) -> None:
    counts = Counts(pipeline, control)
    draw(pipeline, None, 2)
    assert (counts.of["deep"], counts.of["output"]) == (3, 6)


def test_strength_is_that_of_the_step_also_where_residuals_are_held(pipeline: Any, control: Control) -> None:
    """Held residuals at scale 0 are none: a step without control adds nothing at the outermost blocks."""
    factors: list[float] = []
    with torch.no_grad(), attach(pipeline, it=control) as rig:
        rein = rig["it"].set(hint=tiny.make_hint(), keyframes=[(0.0, 1.0), (1.0, 0.0)])
        steer = pipeline.unet.register_forward_pre_hook(
            lambda unet, args, given: factors.append(float(given["down_block_additional_residuals"][0].norm())),
            with_kwargs=True,
        )
        with recalled(pipeline, rig, STEPS):
            pipeline("a red apple", num_inference_steps=STEPS, output_type="latent")
        steer.remove()
    assert rein.hold is False
    assert factors == pytest.approx([factors[0] * (1 - step / STEPS) for step in range(STEPS)], rel=1e-4)
