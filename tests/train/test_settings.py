"""Settings out of range are refused, each by its name."""

from typing import Any

import pytest

from bridle.errors import ConfigError
from bridle.train.settings import MachineSettings, ProbeSettings, TrainSettings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "train.steps is 0; expected 1 or more"),
        ({"keep": 0}, "train.keep is 0; expected 1 or more"),
        ({"lr": 0.0}, "train.lr is 0.0; expected 'auto', or a number above 0"),
        ({"lr": float("inf")}, "train.lr is inf; expected 'auto', or a number above 0"),
        ({"lr": float("nan")}, "train.lr is nan"),
        ({"weight_decay": -0.1}, "train.weight_decay is -0.1; expected 0 or more"),
        ({"prompt_dropout": 1.5}, "train.prompt_dropout is 1.5; expected a share from 0 to 1"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0; expected from 0 to below 1"),
        ({"decay": 1.5}, "train.decay is 1.5; expected a share from 0 to 1"),
        ({"weighting": "snr"}, "train.weighting is 'snr'; expected 'uniform' or 'balanced'"),
        ({"precision": "fp8"}, "train.precision is 'fp8'; expected 'auto', 'bf16', 'fp16' or 'fp32'"),
        ({"optimizer": "sgd"}, "train.optimizer is 'sgd'; expected 'adamw' or 'adamw8bit'"),
        ({"regime": "tiny"}, "train.regime is 'tiny'; expected 'standard', 'small', 'large' or 'auto'"),
        ({"reconnect": 0}, "train.reconnect is 0; expected 'auto', or 1 or more"),
        ({"unlock_after": -1, "regime": "large"}, "train.unlock_after is -1; expected 'auto', or 1 or more"),
        ({"unlock": "decoder"}, "train.unlock is 'decoder', but train.regime 'standard': set train.regime to 'large'"),
        ({"unlock": "encoder", "regime": "large"}, "train.unlock is 'encoder'; expected 'decoder' or 'all'"),
        ({"unlock_lr": 0.0}, "train.unlock_lr is 0.0; expected a number above 0"),
        ({"unlock_lr": float("inf")}, "train.unlock_lr is inf; expected a number above 0"),
        ({"skips": 0}, "train.skips is 0; expected 1 or more"),
        ({"patience": -1}, "train.patience is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainSettings(**values)


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        (ProbeSettings, {"every": 0}, "probe.every is 0; expected 'auto', or 1 or more"),
        (ProbeSettings, {"pairs": 1}, "probe.pairs is 1; expected 2 or more"),
        (ProbeSettings, {"samples": 1}, "probe.samples is 1; expected 0, or 2 or more"),
        (ProbeSettings, {"steps": 0}, "probe.steps is 0; expected 1 or more"),
        (MachineSettings, {"workers": -1}, "machine.workers is -1; expected 0 or more"),
        (
            MachineSettings,
            {"base_weights": "fp8"},
            "machine.base_weights is 'fp8'; expected 'auto', 'fp32', 'bf16' or 'fp16'",
        ),
        (MachineSettings, {"parallel": "tp"}, "machine.parallel is 'tp'; expected 'ddp' or 'fsdp'"),
    ],
)
def test_those_of_probe_and_machine_as_well(settings: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**values)
