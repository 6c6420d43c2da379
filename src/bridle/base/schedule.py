"""How a base was taught to denoise: a table of noise levels, and what it predicts.

In: a diffusers scheduler. Out: a `Schedule`. One form for both kinds of models: at timestep t a noisy latent is
signal[t] * latents + spread[t] * noise; signal^2 + spread^2 = 1 where it is diffused, signal + spread = 1 in a flow.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bridle.errors import BaseError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Schedule:
    """T noise levels, the least noisy first.

    Attributes:
        signal, spread: [T] float32, of latents and noise.
        times: [T], what the denoiser is told at each.
        prediction: what it predicts: the noise, the velocity of arXiv:2202.00512, the clean latents, or the flow from
            latents to noise (rectified flow, arXiv:2209.03003).
    """

    signal: Tensor
    spread: Tensor
    times: Tensor
    prediction: Prediction

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(self.signal.to(device), self.spread.to(device), self.times.to(device), self.prediction)


def read_schedule(scheduler: Any) -> Schedule:
    """The levels that a base was trained with, whatever scheduler it samples with.

    Of a flow those of its own scheduler, spaced as that spaces them for training; a shift that depends on the size of
    the picture is left out, as in the published training scripts.

    Raises: BaseError: it predicts something else, or has other levels than a table of betas or a flow.
    """
    config = scheduler.config
    if type(scheduler).__name__.startswith("FlowMatch"):
        # Where the shift depends on the size, the fixed one in the same configuration is not in use.
        unshifted = {"use_dynamic_shifting": False, "shift": 1.0} if config.get("use_dynamic_shifting") else {}
        plain: Any = FlowMatchEulerDiscreteScheduler.from_config(config, **unshifted)
        spread = plain.sigmas[: config.num_train_timesteps].flip(0)
        return Schedule(1 - spread, spread, spread * config.num_train_timesteps, "flow")
    if "prediction_type" not in config or not {"beta_start", "trained_betas"} & config.keys():
        expected = "expected prediction_type and beta_start in its configuration, or a FlowMatch scheduler"
        remedy = "bases of EDM's kind and consistency models are of no family that is supported"
        raise BaseError(f"base has the scheduler {type(scheduler).__name__}; {expected}: {remedy}")
    prediction = config["prediction_type"]
    if prediction not in get_args(Prediction):
        expected = ", ".join(map(repr, get_args(Prediction)))
        raise BaseError(f"base predicts {prediction!r}; expected one of {expected}")
    plain: Any = DDPMScheduler.from_config(config)
    power = plain.alphas_cumprod
    return Schedule(power.sqrt(), (1 - power).sqrt(), torch.arange(len(power)), prediction)
