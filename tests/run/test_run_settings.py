"""Settings that depend on one another, and the copy that the run's folder keeps."""

from pathlib import Path

import pytest

from bridle.data.settings import DataSettings
from bridle.errors import ConfigError
from bridle.run.settings import RunSettings, open_run, read_run
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


def test_a_learning_rate_that_was_chosen_stays() -> None:
    assert RunSettings(data=DATA, train=TrainSettings(lr=1e-5)).train.lr == 1e-5


def test_without_a_base_the_learning_rate_is_the_papers() -> None:
    assert TrainSettings().peak_lr == 1e-5


def test_a_base_in_bfloat16_is_not_computed_with_in_float32() -> None:
    halved = MachineSettings(base_weights="bf16")
    assert RunSettings(data=DATA, sample=SampleSettings(precision="auto"), machine=halved)
    with pytest.raises(ConfigError, match="something computes in 'fp32'"):
        RunSettings(data=DATA, sample=SampleSettings(precision="fp32"), machine=halved)
