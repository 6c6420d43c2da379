"""The diffusion objective as pure functions: tensors in, tensors out, all randomness handed in.

Legend: B batch, C latent channels, h x w latent size, T length of the schedule.
"""

from typing import Literal

import torch
from torch import Tensor

from bridle.base.schedule import Schedule
from bridle.errors import TrainError

Weighting = Literal["uniform", "balanced"]
MIN_SNR = 5.0
MOST_WEIGHT = 50.0


def sample_posterior(mean: Tensor, std: Tensor, unit: Tensor) -> Tensor:
    """A draw from the autoencoder's posterior; all [B, C, h, w], `unit` being unit Gaussian."""
    return mean + std * unit


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """Diffuse clean latents to the given timesteps.

    Args:
        latents: [B, C, h, w], scaled, float32.
        noise: [B, C, h, w], unit Gaussian.
        timesteps: [B], integers in [0, T).

    Returns: [B, C, h, w].
    Raises: TrainError: a timestep lies outside the schedule.
    Source: DDPM, arXiv:2006.11239, eq. 4; rectified flow, arXiv:2209.03003, eq. 1.
    """
    signal, spread = amplitudes(timesteps, schedule)
    return signal * latents + spread * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """What the base was taught to predict; shapes as in `add_noise`.

    Source: "epsilon": DDPM, arXiv:2006.11239, eq. 14. "v_prediction": arXiv:2202.00512, appendix D. "flow":
        arXiv:2209.03003, eq. 1, from the picture to the noise.
    """
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return latents
    if schedule.prediction == "flow":
        return noise - latents
    signal, spread = amplitudes(timesteps, schedule)
    return signal * noise - spread * latents


def amplitudes(timesteps: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Of signal and noise, each [B, 1, 1, 1]. Raises: TrainError: a timestep lies outside the schedule."""
    length = len(schedule)
    # Asking on a GPU would wait for all that is under way there, and indexing fails there too.
    if timesteps.device.type == "cpu" and (int(timesteps.min()) < 0 or int(timesteps.max()) >= length):
        outside = [t for t in timesteps.tolist() if not 0 <= t < length]
        raise TrainError(f"timesteps {outside} lie outside the schedule; expected 0 to {length - 1}")
    signal, spread = schedule.signal[timesteps], schedule.spread[timesteps]
    return signal.view(-1, 1, 1, 1), spread.view(-1, 1, 1, 1)


def loss_weights(timesteps: Tensor, schedule: Schedule, weighting: Weighting) -> Tensor:
    """How much each sample's error counts: [B] in, [B] out.

    "uniform" is the paper's: 1. "balanced" weighs as if velocity were predicted; less where there is little noise, as
    min-SNR does; and at most 50 times where there is much. There a small error in the noise is a large one in the
    picture, and it is there that shapes are decided. A flow is such a velocity already, and weighs 1.

    Source: v-prediction, arXiv:2202.00512; min-SNR with its bound of 5, arXiv:2303.09556.
    """
    if weighting == "uniform" or schedule.prediction == "flow":
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = (schedule.signal[timesteps] / schedule.spread[timesteps]).square()
    per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[schedule.prediction]
    return ((snr.clamp(max=MIN_SNR) + 1) / per_error).clamp(max=MOST_WEIGHT)


def loss_per_sample(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: [B, C, h, w] to [B]."""
    return (output.float() - wanted.float()).square().mean((1, 2, 3))
