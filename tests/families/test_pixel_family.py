"""U-Nets on pixels: no text, no autoencoder, no residual arguments; all the same they train, draw and travel."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import promises
import pytest
import tiny_pixel
import torch
from diffusers import DDIMPipeline
from PIL import Image

from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.data.settings import DataSettings
from bridle.errors import BridleError, HintError, SampleError
from bridle.files.weights import load_control, save_control
from bridle.run import RunSettings, train_run
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.sample.steering import Init
from bridle.train import checkpoint
from bridle.train.settings import ProbeSettings, TrainSettings

# diffusers' DPM solver hands torch tensors to numpy in a way that numpy 2 asks to be changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZE_PX = tiny_pixel.SIZE_PX
HINTS = [np.random.default_rng(seed).integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture
def base() -> Base:
    return tiny_pixel.make_base()


def draw(base: Base, control: Control | None, rows: slice = slice(3), **settings: Any) -> list[np.ndarray]:
    how = SampleSettings(**{"steps": 3, "batch": 3, **settings})
    return generate(base, control, HINTS[rows], ["", "", ""][rows], [1, 2, 3][rows], how)


def test_it_trains_through_the_cache_goes_on_after_a_stop_and_leaves_the_base_alone(base: Base, tmp_path: Path) -> None:
    control = promises.trains_goes_on_and_leaves_the_base_alone(base, tmp_path)
    assert type(control).__name__ == "PixelControl"


def test_pictures_pass_unchanged_and_captions_count_for_nothing(base: Base) -> None:
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = base.encode_images(pixels)
    assert torch.equal(mean, pixels)
    assert not std.any()
    assert torch.equal(base.decode(mean), pixels)
    text = base.encode_captions(["a red apple", ""])
    assert text.states.shape == (2, 1, 1)
    assert not text.states.any()
    assert (base.size_factor, base.latent_channels, base.size_px) == (1, 3, SIZE_PX)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_a_picture_is_the_same_alone_and_in_a_batch(base: Base, scheduler: str) -> None:
    control = tiny_pixel.wake(Control.from_base(base.pipeline))
    how = {"scheduler": scheduler, "precision": "fp32"}  # bfloat16 rounds otherwise in a batch
    together = draw(base, control, **how)
    alone = [draw(base, control, slice(row, row + 1), **how)[0] for row in range(3)]
    assert all(picture.shape == (SIZE_PX, SIZE_PX, 3) and picture.dtype == np.uint8 for picture in together)
    assert max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(together, alone, strict=True)) <= 1
    assert not np.array_equal(together[0], draw(base, None, **how)[0])


def test_each_step_is_told_and_what_that_raises_ends_the_drawing(base: Base) -> None:
    told: list[int] = []
    generate(base, None, [], [""], [0], SampleSettings(steps=4), on_step=lambda: told.append(0))
    assert len(told) == 4

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(base, None, [], [""], [0], SampleSettings(steps=4), on_step=stop)
    assert not base.denoiser._forward_hooks


def test_either_stock_pipeline_is_steered_and_let_go(base: Base) -> None:
    pipeline = DDIMPipeline(unet=base.denoiser, scheduler=base.pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def draw_one() -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        pictures: np.ndarray = pipeline(num_inference_steps=3, generator=noise, output_type="np").images
        return pictures

    before = draw_one()
    with attach(pipeline, edge=tiny_pixel.wake(Control.from_base(pipeline))) as rig:
        rig["edge"].set(hint=HINTS[0])
        steered = draw_one()
        rig["edge"].set(hint=HINTS[1])
        assert not np.array_equal(draw_one(), steered)
    assert not np.array_equal(steered, before)
    assert np.array_equal(draw_one(), before)


def test_a_control_travels(base: Base, tmp_path: Path) -> None:
    control: Any = tiny_pixel.wake(Control.from_base(base.pipeline, hint_channels=1, hint_encoder="official"))
    save_control(control, tmp_path, {"base": "tiny"})
    loaded: Any = load_control(tmp_path)
    latents, timesteps, hint = tiny_pixel.make_inputs()
    text = Text(torch.zeros(2, 1, 1))
    with torch.no_grad():
        ours = control.eval()(latents, timesteps, text, hint[:, :1]).links
        theirs = loaded(latents, timesteps, text, hint[:, :1]).links
    assert all(map(torch.equal, ours, theirs))
    assert (type(loaded), loaded.hint_channels, loaded.size_factor) == (type(control), 1, 1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Discs to train on, and the base as a folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pictures").mkdir()
    for index in range(8):
        image = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
        cv2.circle(image, (10 + index, 16), 4 + index // 2, (30 * index, 60, 200), -1)
        Image.fromarray(image).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text("")
    tiny_pixel.make_pipeline().save_pretrained(folder / "base")
    return RunSettings(
        base=str(folder / "base"),
        device="cpu",
        data=DataSettings(folder=folder / "pictures", size_px=SIZE_PX, held_out=2),
        train=TrainSettings(steps=4, batch=3, lr=1e-2, warmup=0, log_every=1),
        probe=ProbeSettings(every=2, pairs=2, samples=2, steps=1),
        sample=SampleSettings(steps=1),
    )


@pytest.mark.parametrize(
    "how",
    [
        {"regime": "standard", "precision": "fp32"},
        {"regime": "small", "reconnect": 2},
        {"regime": "auto"},
        {"regime": "large", "unlock_after": 2, "unlock_lr": 1e-3},
    ],
    ids=lambda how: how["regime"],
)
def test_a_run_trains_in_every_regime_and_what_it_saves_draws(
    settings: RunSettings, tmp_path: Path, how: dict[str, Any]
) -> None:
    run = train_run(replace(settings, train=replace(settings.train, **how)), tmp_path)
    assert run.outcome.finished
    phases = {"standard": "connected", "small": "connected", "auto": "connected", "large": "unlocked"}
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert checkpoint.read_facts(newest)["phase"] in (phases[how["regime"]], "middle")
    if how["regime"] != "auto":
        assert checkpoint.read_facts(newest)["phase"] == phases[how["regime"]]
    control = load_control(tmp_path / "control")
    assert bool(control.base_delta) == (how["regime"] == "large")
    assert all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in control.base_delta)
    base = load_base(settings.base)
    free = draw(base, None)
    assert not np.array_equal(draw(base, control)[0], free[0])
    assert np.array_equal(draw(base, None)[0], free[0])


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        ({"size_px": (64, 64)}, SampleError, "picture is 64x64 px; this base draws 32x32 px alone"),
        ({"settings": SampleSettings(scheduler="euler")}, SampleError, "'euler' is not for pixel U-Net; .*ddim, ddpm"),
        ({"init": Init(image=HINTS[0])}, SampleError, "pixel U-Net has no pipeline for image-to-image"),
        ({"init": Init(image=HINTS[0], mask=HINTS[0][..., 0])}, SampleError, "has no pipeline for inpainting"),
        ({"control": True, "hints": [HINTS[0][..., :1]]}, HintError, "1 channels; this control was made for 3"),
    ],
)
def test_what_such_bases_cannot_draw_is_refused(base: Base, request_: Any, error: type, said: str) -> None:
    given = {"control": None, "hints": [], "prompts": [""], "seeds": [0], **request_}
    given["control"] = Control.from_base(base.pipeline) if given["control"] else None
    with pytest.raises(BridleError, match=said) as raised:
        generate(base, **given)
    assert raised.type is error
