"""Settings that depend on one another, and the copy that the run's folder keeps."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.data.settings import DataSettings
from bridle.errors import ConfigError
from bridle.run.settings import RunSettings, base_weights, check_run, open_run, read_run
from bridle.sample.settings import SampleSettings
from bridle.train.settings import MachineSettings, TrainSettings

DATA = DataSettings(folder=Path("pictures"))


@pytest.mark.parametrize(("base", "lr"), [("embedded", 1e-3), ("models/sd15", 1e-5)])
def test_the_learning_rate_is_the_bases_own(tmp_path: Path, base: str, lr: float) -> None:
    settings = RunSettings(base=base, data=DATA)
    assert settings.train.lr == settings.train.peak_lr == lr

    open_run(tmp_path, settings)
    assert f"lr = {lr!r}\n" in (tmp_path / "settings.toml").read_text()
    assert read_run(tmp_path) == settings


@pytest.mark.parametrize(("out", "data", "named"), [("caf\udce9", "a", "--out"), ("a", "caf\udce9", "data.folder")])
def test_folders_whose_names_are_no_unicode_are_refused_before_anything_is_encoded(
    out: str, data: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{named} is .*, which is not valid Unicode and cannot be saved; rename it"):
        check_run(Path(out), RunSettings(data=DataSettings(folder=Path(data))))


def test_a_learning_rate_that_was_chosen_stays() -> None:
    assert RunSettings(data=DATA, train=TrainSettings(lr=1e-5)).train.lr == 1e-5


def test_without_a_base_the_learning_rate_is_the_papers() -> None:
    assert TrainSettings().peak_lr == 1e-5


@pytest.mark.parametrize(
    ("train", "sample", "machine", "on_gpu", "on_old_gpu"),
    [
        ({}, {}, {}, "bf16", "fp16"),
        ({}, {"precision": "fp16"}, {}, "fp32", "fp16"),
        ({"precision": "bf16"}, {"precision": "bf16"}, {}, "bf16", "bf16"),
        ({"precision": "fp32"}, {}, {}, "fp32", "fp32"),
        ({}, {"precision": "fp32"}, {}, "fp32", "fp32"),
        ({"regime": "large"}, {}, {}, "fp32", "fp32"),
        ({}, {}, {"base_weights": "fp32"}, "fp32", "fp32"),
        ({}, {}, {"base_weights": "bf16"}, "bf16", "bf16"),
        ({}, {}, {"base_weights": "fp16"}, "fp16", "fp16"),
    ],
)
def test_a_base_is_kept_in_16_bits_where_all_is_computed_in_it_and_nothing_of_it_is_trained(
    train: Any, sample: Any, machine: Any, on_gpu: str, on_old_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(
        data=DATA,
        train=TrainSettings(**train),
        sample=SampleSettings(**sample),
        machine=MachineSettings(**machine),
    )
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert base_weights(settings, gpu) == on_gpu
    monkeypatch.setattr("bridle.kernels.precision.pick", lambda *_: "bf16")
    assert base_weights(settings, cpu) == on_gpu
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert base_weights(settings, gpu) == on_old_gpu


@pytest.mark.parametrize(("kept", "others"), [("bf16", ("fp32", "fp16")), ("fp16", ("fp32", "bf16"))])
def test_a_base_of_16_bits_is_computed_with_in_nothing_else(kept: Any, others: Any) -> None:
    halved = MachineSettings(base_weights=kept)
    assert RunSettings(data=DATA, sample=SampleSettings(precision="auto"), machine=halved)
    for other in others:
        with pytest.raises(ConfigError, match=f"something computes in '{other}'"):
            RunSettings(data=DATA, sample=SampleSettings(precision=other), machine=halved)


@pytest.mark.parametrize(
    ("out", "data", "refused"),
    [
        ("x", "x", True),
        ("x/run", "x", True),
        ("x", "x/previews", True),
        ("x", "x/../x/cache", True),
        ("x", "x/data", False),
        ("x", "x/scenes", False),
        ("x", "xy", False),
    ],
)
def test_a_run_and_its_data_lie_apart(tmp_path: Path, out: str, data: str, refused: bool) -> None:
    settings = RunSettings(data=DataSettings(folder=tmp_path / data))
    with pytest.raises(ConfigError, match="--out") if refused else nullcontext():
        check_run(tmp_path / out, settings, force=True)
