"""The objective is DDPM's, value by value that of diffusers' scheduler."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bridle.base.schedule import read_schedule
from bridle.errors import BaseError, TrainError
from bridle.train.objective import (
    MIN_SNR,
    MOST_WEIGHT,
    add_noise,
    loss_per_sample,
    loss_weights,
    sample_posterior,
    target,
)

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCHEDULE = read_schedule(SCHEDULER)
VELOCITY = replace(SCHEDULE, prediction="v_prediction")
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def normal(seed: int) -> Tensor:
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_noise_is_added_as_diffusers_adds_it() -> None:
    ours = add_noise(normal(0), normal(1), TIMESTEPS, SCHEDULE)
    theirs = SCHEDULER.add_noise(normal(0), normal(1), TIMESTEPS)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_targets_are_those_of_diffusers() -> None:
    given = (normal(0), normal(1), TIMESTEPS)
    velocity = SCHEDULER.get_velocity(normal(0), normal(1), TIMESTEPS)
    assert torch.allclose(target(*given, VELOCITY), velocity, rtol=0, atol=1e-6)
    assert torch.equal(target(*given, SCHEDULE), normal(1))
    assert torch.equal(target(*given, replace(SCHEDULE, prediction="sample")), normal(0))


def test_another_prediction_type_is_refused() -> None:
    other = SimpleNamespace(config={"prediction_type": "score", "beta_start": 0.1})
    with pytest.raises(BaseError, match="base predicts 'score'; expected one of 'epsilon', 'v_prediction'"):
        read_schedule(other)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler"])
def test_levels_that_are_neither_betas_nor_a_flow_are_refused(kind: str) -> None:
    with pytest.raises(BaseError, match=f"base has the scheduler {kind}; expected prediction_type and beta_start"):
        read_schedule(getattr(diffusers, kind)())


def test_a_flow_is_noised_told_and_aimed_as_diffusers_does_it() -> None:
    """Its own scheduler counts levels from the noisiest; that of Stable Diffusion 3 spaces them with a shift of 3."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = read_schedule(scheduler)
    told = schedule.times[TIMESTEPS]
    assert torch.equal(schedule.times.flip(0), scheduler.timesteps)
    theirs = scheduler.scale_noise(normal(0), told, normal(1))
    assert torch.allclose(add_noise(normal(0), normal(1), TIMESTEPS, schedule), theirs, rtol=0, atol=1e-6)
    wanted = target(normal(0), normal(1), TIMESTEPS, schedule)
    # One step of Euler along what is aimed at, from any level down to none, leads to the picture itself.
    there = theirs - schedule.spread[TIMESTEPS].view(-1, 1, 1, 1) * wanted
    assert torch.allclose(there, normal(0), rtol=0, atol=1e-5)
    assert torch.equal(loss_weights(TIMESTEPS, schedule, "balanced"), torch.ones(5))


@pytest.mark.parametrize("outside", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(outside: int) -> None:
    timesteps = torch.tensor([0, 1, outside, 3, 4])
    for call in (add_noise, lambda *given: target(*given[:3], VELOCITY)):
        with pytest.raises(TrainError, match=rf"timesteps \[{outside}\] lie outside the schedule; expected 0 to 999"):
            call(normal(0), normal(1), timesteps, SCHEDULE)


def test_the_posterior_is_drawn_around_its_mean_with_its_deviation() -> None:
    mean, std, unit = normal(0), normal(1).abs(), normal(2)
    assert torch.allclose((sample_posterior(mean, std, unit) - mean) / std, unit, atol=1e-3)


def test_the_loss_is_one_float32_number_per_sample_whatever_comes_in() -> None:
    output, wanted = normal(0).bfloat16(), normal(1)
    loss = loss_per_sample(output, wanted)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss[3], torch.nn.functional.mse_loss(output[3].float(), wanted[3]))


def test_balanced_weights_are_those_of_velocity_within_their_bounds():
    scheduler = DDPMScheduler(beta_schedule="linear", beta_end=0.02)
    alphas_cumprod, schedule = scheduler.alphas_cumprod, read_schedule(scheduler)
    timesteps = torch.arange(0, 1000, 7)
    power = alphas_cumprod[timesteps]
    snr = power / (1 - power)
    weights = loss_weights(timesteps, schedule, "balanced")
    inside = (snr < MIN_SNR) & ((snr + 1) / snr < MOST_WEIGHT)
    # There, weighing the error of the noise so is the same as predicting velocity: its error is (SNR + 1) / SNR of it.
    torch.testing.assert_close(weights[inside], ((snr + 1) / snr)[inside])
    assert weights.max() == MOST_WEIGHT
    assert (weights[snr > MIN_SNR] < ((snr + 1) / snr)[snr > MIN_SNR]).all()
    velocity = loss_weights(timesteps, replace(schedule, prediction="v_prediction"), "balanced")
    torch.testing.assert_close(velocity[snr < MIN_SNR], torch.ones(int((snr < MIN_SNR).sum())))


def test_uniform_weights_are_the_papers():
    assert loss_weights(torch.tensor([0, 999]), SCHEDULE, "uniform").tolist() == [1.0, 1.0]
