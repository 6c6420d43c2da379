"""What chance decides depends on the key alone, and epochs follow each other without a gap."""

import pytest
import torch

from bridle.train.draws import Draws, draw, ids_of_step

SHAPE = (4, 8, 8)
PARTS = ("posterior", "noise", "timesteps", "drop_prompt")
IDS = [f"{number}.png#0" for number in range(10)]


def at(step: int, ids: list[str] = IDS, seed: int = 0, dropout: float = 0.5) -> Draws:
    return draw(ids, step, seed=seed, shape=SHAPE, timesteps=1000, prompt_dropout=dropout)


def test_the_same_key_gives_the_same_draws_whatever_the_order_or_the_split() -> None:
    whole = at(7)
    order = [3, 0, 9]
    some = at(7, [IDS[row] for row in order])
    for part in PARTS:
        assert torch.equal(getattr(at(7), part), getattr(whole, part))
        assert torch.equal(getattr(some, part), getattr(whole, part)[order])
        assert torch.equal(getattr(whole[2:5], part), getattr(whole, part)[2:5])


@pytest.mark.parametrize("other", [at(8), at(7, seed=1), at(7, [id + "!" for id in IDS])], ids=["step", "seed", "id"])
def test_another_key_gives_other_draws(other: Draws) -> None:
    first = at(7)
    for part in ("posterior", "noise"):
        assert not any(torch.equal(a, b) for a, b in zip(getattr(first, part), getattr(other, part), strict=True))
    assert (first.timesteps != other.timesteps).sum() >= 8


def test_noise_and_posterior_are_drawn_apart() -> None:
    assert not torch.equal(at(7).noise, at(7).posterior)


def test_a_sample_that_comes_twice_in_a_step_comes_with_other_noise() -> None:
    twice = at(7, [IDS[0], IDS[1], IDS[0]])
    assert not torch.equal(twice.noise[0], twice.noise[2])
    assert torch.equal(twice.noise[0], at(7).noise[0])


def test_draws_are_unit_gaussian_and_timesteps_uniform() -> None:
    many = at(0, [str(number) for number in range(2000)])
    assert many.noise.mean().abs() < 0.01
    assert (many.noise.std() - 1).abs() < 0.01
    counts = torch.histc(many.timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 150
    assert counts.max() < 250
    assert int(many.timesteps.min()) >= 0
    assert int(many.timesteps.max()) <= 999


def test_about_half_of_the_prompts_are_dropped_and_another_half_each_time() -> None:
    ids = [str(number) for number in range(400)]
    first, second = at(0, ids).drop_prompt, at(1, ids).drop_prompt
    assert 150 < int(first.sum()) < 250
    assert 150 < int((first != second).sum()) < 250
    assert not at(0, ids, dropout=0.0).drop_prompt.any()
    assert at(0, ids, dropout=1.0).drop_prompt.all()


def test_every_epoch_is_a_permutation_without_a_gap() -> None:
    shown = [id for step in range(10) for id in ids_of_step(IDS, step, 4, seed=0)]
    epochs = [shown[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(IDS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert shown[:4] == ids_of_step(IDS, 0, 4, seed=0)
    assert [id for step in range(20) for id in ids_of_step(IDS, step, 2, seed=0)] == shown


def test_another_seed_is_another_order() -> None:
    assert ids_of_step(IDS, 0, 10, seed=0) != ids_of_step(IDS, 0, 10, seed=1)


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    assert sorted(ids_of_step(IDS[:2], 0, 4, seed=0)) == sorted(IDS[:2] * 2)
