"""A run whose base is kept in 16 bits, as on a GPU: all that a run does, and its control in other hands."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from small_run import STEPS

from bridle.base.load import load_base
from bridle.errors import BaseError, ConfigError, TrainError
from bridle.files.weights import load_control
from bridle.kernels.precision import TYPES
from bridle.run import RunSettings, evaluate_run, train_run
from bridle.run.recipes import read_recipe
from bridle.run.sampling import sample_to_files
from bridle.run.training import TrainedRun
from bridle.sample import sampler
from bridle.sample.picture import read_settings
from bridle.sample.settings import SampleSettings
from bridle.train.checkpoint import newest_precision
from bridle.train.settings import MachineSettings, ProbeSettings


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 16 bits no autocast is needed."""
    monkeypatch.setattr(sampler, "casts", lambda base, precision: base.denoiser.dtype is torch.float32)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bases that are loaded to be measured or drawn with."""
    bases: list[Any] = []

    def load(*args: Any, **more: Any) -> Any:
        bases.append(load_base(*args, **more))
        return bases[-1]

    monkeypatch.setattr("bridle.run.evaluating.load_base", load)
    monkeypatch.setattr("bridle.run.sampling.load_base", load)
    return bases


def in_bits(settings: RunSettings, precision: Any = "bf16", **train: Any) -> RunSettings:
    how = replace(settings.train, precision=precision, **train)
    return replace(settings, train=how, sample=replace(settings.sample, precision=precision))


def draw(run: TrainedRun, settings: RunSettings, folder: Path) -> Path:
    Image.fromarray(tiny.make_hint()).save(folder / "hint.png")
    flags = {"prompt": "a red disc", "steps": 2, "base": settings.base, "precision": settings.sample.precision}
    flags |= {"control": run.folder / "control", "hint": folder / "hint.png"}
    (path,) = sample_to_files(read_recipe(None, None, flags), folder / "picture.png")
    return path


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_draws_is_measured_and_its_control_is_float32(
    precision: Any, settings: RunSettings, as_on_a_gpu: None, loaded: list[Any], tmp_path: Path
) -> None:
    kind = TYPES[precision]
    settings = replace(in_bits(settings, precision), probe=ProbeSettings(every=2, samples=2, steps=1))
    run = train_run(settings, tmp_path / "run")
    assert {model.dtype for model in (run.base.denoiser, run.base.vae)} == {kind}
    assert load_control(tmp_path / "run" / "control").dtype is run.outcome.control.dtype is torch.float32
    assert run.control.dtype is kind
    wanted = {name: weight.to(kind) for name, weight in run.outcome.control.named_parameters()}
    assert all(torch.equal(weight, wanted[name]) for name, weight in run.control.named_parameters())
    here = evaluate_run(tmp_path / "run", base=run.base, data=run.data)
    again = evaluate_run(tmp_path / "run")
    assert here.evaluation.headline == again.evaluation.headline
    path = draw(run, settings, tmp_path)
    assert [base.denoiser.dtype for base in loaded] == [kind] * 2
    assert read_settings(path)["recipe"]["precision"] == precision
    assert np.asarray(Image.open(path)).std() > 0
    with pytest.raises(ConfigError, match=f"'fp32', but the base's weights are {str(kind)[6:]}"):
        evaluate_run(tmp_path / "run", base=run.base, data=run.data, sample=SampleSettings(precision="fp32"))


def test_with_what_an_unlocked_base_has_learned_it_stays_float32(
    settings: RunSettings, as_on_a_gpu: None, loaded: list[Any], tmp_path: Path
) -> None:
    settings = in_bits(settings, regime="large", unlock_after=1, batch=2)
    run = train_run(settings, tmp_path / "run")
    evaluate_run(tmp_path / "run")
    draw(run, settings, tmp_path)
    assert [base.denoiser.dtype for base in (run.base, *loaded)] == [torch.float32] * 3


def test_weights_that_were_asked_for_in_float32_are_measured_so(
    settings: RunSettings, as_on_a_gpu: None, loaded: list[Any], tmp_path: Path
) -> None:
    settings = replace(in_bits(settings), machine=MachineSettings(base_weights="fp32"))
    run = train_run(settings, tmp_path / "run")
    evaluate_run(tmp_path / "run")
    assert [base.denoiser.dtype for base in (run.base, *loaded)] == [torch.float32] * 2


def test_a_run_that_began_in_float32_goes_on_so_where_bfloat16_is_faster(
    settings: RunSettings, as_on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = ["fp32"]
    for module in ("run.settings", "train.loop", "sample.sampler"):
        decide: Any = lambda wanted, *_: fastest[0] if wanted == "auto" else wanted  # noqa: E731
        monkeypatch.setattr(f"bridle.{module}.choose_precision", decide)
    auto = replace(settings, train=replace(settings.train, precision="auto"))
    train_run(auto, tmp_path / "run")
    fastest[:] = ["bf16"]
    run = train_run(replace(auto, train=replace(auto.train, steps=STEPS + 2)), tmp_path / "run")
    assert newest_precision(tmp_path / "run" / "checkpoints") == "fp32"
    assert run.base.denoiser.dtype is torch.float32
    written = (tmp_path / "run" / "settings.toml").read_text()
    with pytest.raises(TrainError, match="this run began computing in 'fp32'"):
        train_run(replace(auto, machine=MachineSettings(base_weights="bf16")), tmp_path / "run")
    assert (tmp_path / "run" / "settings.toml").read_text() == written


def test_without_its_fingerprint_a_halved_base_has_none(base_folder: Path) -> None:
    base = load_base(base_folder)
    base.halve()
    with pytest.raises(BaseError, match="load it again"):
        _ = base.fingerprint
