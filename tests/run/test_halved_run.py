"""A run whose base is kept in bfloat16, as on a GPU: all that a run does, and its control in other hands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from small_run import HELD_OUT

from bridle.base.load import load_base
from bridle.files.weights import load_control
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.run.recipes import read_recipe
from bridle.run.sampling import sample_to_files
from bridle.run.training import like_base
from bridle.sample import sampler
from bridle.sample.picture import read_settings
from bridle.train.settings import ProbeSettings


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the device is told that weights are to be bfloat16, and that no autocast is needed with them."""
    for module in ("settings", "evaluating", "sampling"):
        monkeypatch.setattr(f"bridle.run.{module}.weights_type", lambda precision, device: kinds[precision])
    monkeypatch.setattr(sampler, "casts", lambda base, precision: base.denoiser.dtype is torch.float32)


kinds: dict[str, Any] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def test_it_trains_draws_is_measured_and_its_control_is_float32(
    settings: RunSettings, as_on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, sample = replace(settings.train, precision="bf16"), replace(settings.sample, precision="bf16")
    settings = replace(settings, train=train, sample=sample, probe=ProbeSettings(every=2, samples=2, steps=1))
    run = train_run(settings, tmp_path / "run")
    assert {model.dtype for model in (run.base.denoiser, run.base.vae)} == {torch.bfloat16}
    control = load_control(tmp_path / "run" / "control")
    assert control.dtype is run.outcome.control.dtype is torch.float32
    assert like_base(control, run.base).dtype is torch.bfloat16
    here = evaluate_run(tmp_path / "run", base=run.base, data=run.data)
    loaded = []
    monkeypatch.setattr(
        "bridle.run.evaluating.load_base", lambda *args, **more: loaded.append(load_base(*args, **more)) or loaded[0]
    )
    again = evaluate_run(tmp_path / "run")
    assert loaded[0].denoiser.dtype is torch.bfloat16
    assert here.evaluation.headline == again.evaluation.headline
    assert len(run.data.held_out()) == HELD_OUT
    hint = tmp_path / "hint.png"
    Image.fromarray(tiny.make_hint()).save(hint)
    flags = {"prompt": "a red disc", "steps": 2, "base": settings.base, "precision": "bf16"}
    flags |= {"control": tmp_path / "run" / "control", "hint": hint}
    (path,) = sample_to_files(read_recipe(None, None, flags), tmp_path / "picture.png")
    assert read_settings(path)["recipe"]["precision"] == "bf16"
    assert np.asarray(Image.open(path)).std() > 0


def test_with_what_an_unlocked_base_has_learned_it_stays_float32(
    settings: RunSettings, as_on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = replace(settings.train, precision="bf16", regime="large", unlock_after=1, batch=2)
    run = train_run(replace(settings, train=train, sample=replace(settings.sample, precision="bf16")), tmp_path / "run")
    assert run.base.denoiser.dtype is torch.float32
    loaded = []
    monkeypatch.setattr(
        "bridle.run.evaluating.load_base", lambda *args, **more: loaded.append(load_base(*args, **more)) or loaded[0]
    )
    evaluate_run(tmp_path / "run")
    assert loaded[0].denoiser.dtype is torch.float32
