"""What every family keeps, as functions for its tests: it trains and goes on, draws, travels, and comes off."""

import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bridle.base.base import Base
from bridle.cache.build import build_cache
from bridle.cache.store import Cache
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.data.annotate.canny import Canny
from bridle.data.settings import DataSettings
from bridle.data.sources import open_source
from bridle.files.weights import load_control, save_control
from bridle.train.loop import Hands, Outcome, train
from bridle.train.settings import ProbeSettings, TrainSettings

PICTURE = "text_to_image"
WAYS = (PICTURE, "image_to_image", "inpaint")  # names of a family's stock pipelines


def make_cache(base: Base, folder: Path) -> Cache:
    """Four pairs to train on and two held out, encoded by the base."""
    for number in range(6):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[4 * number + 4 : 4 * number + 24, 16:48] = 30 * number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"bar {number}")
    settings = DataSettings(folder=folder, size_px=64, held_out=2)
    return build_cache(open_source(folder), settings, Canny(), base, folder / "cache")


def train_three_steps(base: Base, cache: Cache, folder: Path, stop_at: int | None = None) -> Outcome:
    """With a probe at the second; `stop_at`: the step at which a SIGTERM arrives. A second call goes on."""

    def progress(step: int, row: dict[str, float] | None) -> None:
        if row and step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    torch.manual_seed(0)
    control = Control.from_base(base.pipeline)
    settings = TrainSettings(steps=3, batch=2, lr=1e-2, warmup=0, precision="fp32", log_every=1, ema_decay=0.5)
    hands = Hands(save=lambda average, step: None, progress=progress)
    probing = ProbeSettings(every=2, pairs=2)
    return train(control, base.denoiser, base.schedule, cache, settings, folder, hands, probing=probing)


def trains_goes_on_and_leaves_the_base_alone(base: Base, folder: Path) -> Control:
    """Three steps through the real cache; stopped after the second, they end with the same weights, bit for bit."""
    before = copy_of(base.denoiser)
    (folder / "pairs").mkdir()
    cache = make_cache(base, folder / "pairs")
    whole = train_three_steps(base, cache, folder / "whole")
    assert (whole.step, whole.finished) == (3, True)
    assert not train_three_steps(base, cache, folder / "parts", stop_at=2).finished
    resumed = train_three_steps(base, cache, folder / "parts")
    assert (resumed.step, resumed.finished) == (3, True)
    assert same(resumed.control.state_dict(), copy_of(whole.control))
    assert same(base.denoiser.state_dict(), before)
    torch.manual_seed(0)
    moved = Control.from_base(base.pipeline).state_dict()
    left = [name for name, value in whole.control.state_dict().items() if torch.equal(value, moved[name])]
    assert left == []  # three steps reach every weight
    return whole.control


def travels(control: Control, folder: Path, reader: Any, inputs: tuple[Any, ...]) -> Control:
    """Saved and loaded it computes the same; diffusers' class of such controls reads the folder with equal weights."""
    save_control(control, folder, {"base": "tiny"})
    loaded = load_control(folder)
    assert same(loaded.state_dict(), control.state_dict())
    with torch.no_grad():
        ours, theirs = control.eval()(*inputs), loaded(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours.links, theirs.links, strict=True))
    assert any(link.any() for link in ours.links)
    assert same(reader.from_pretrained(folder, low_cpu_mem_usage=False).state_dict(), control.state_dict())
    return loaded


def steers_and_comes_off(pipeline: Any, way: str, control: Control, hint: Any, **more: Any) -> None:
    """In a stock pipeline it changes the picture, its hint counts, and without it the picture is what it was."""
    before = draw(pipeline, way, **more)
    weights = copy_of(pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer)
    with attach(pipeline, edge=control) as rig:
        rig["edge"].set(hint=hint)
        steered = draw(pipeline, way, **more)
        rig["edge"].set(hint=255 - hint)
        turned = draw(pipeline, way, **more)
    assert not np.array_equal(steered, before)
    assert not np.array_equal(steered, turned)
    assert np.array_equal(draw(pipeline, way, **more), before)
    assert same((pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).state_dict(), weights)


def stock(base: Base, way: str) -> Any:
    """The family's own pipeline of diffusers for it, with the base's parts."""
    pipeline = getattr(diffusers, getattr(base.family, way)).from_pipe(base.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments(way: str, size_px: int = 64) -> dict[str, Any]:
    """What a pipeline asks for beside prompt and seed."""
    if way == PICTURE:
        return {"height": size_px, "width": size_px}
    pixels = np.random.default_rng(8).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(size_px // 8, 0)
    given: dict[str, Any] = {"image": Image.fromarray(pixels.repeat(size_px // 8, 1)), "strength": 0.8}
    if way == "inpaint":
        mask = np.zeros((size_px, size_px), np.uint8)
        mask[:, size_px // 2 :] = 255
        given |= {"mask_image": Image.fromarray(mask), "height": size_px, "width": size_px}
    return given


def draw(pipeline: Any, way: str, prompt: Any = "a red apple", steps: int = 4, **more: Any) -> np.ndarray:
    """[B, H, W, 3] float32 in [0, 1], always with the same noise."""
    noise = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "np"} | arguments(way) | more
    pictures: np.ndarray = pipeline(prompt, generator=noise, **settings).images
    return pictures


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
