"""All randomness of training, keyed: any step can be drawn again, in any process, without replaying those before it.

The key of a sample's draws is (seed, step, sample id, occurrence); that of an epoch's order is (seed, epoch). No
generator lives from one step to the next, so there is none to save, and a stopped run goes on bit for bit.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What chance decides for a batch.

    Attributes:
        posterior, noise: [B, C, h, w], unit Gaussian.
        timesteps: [B], integers, uniform in [0, T).
        drop_prompt: [B], True where the caption is replaced by the empty one.
    """

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    drop_prompt: Tensor

    def __getitem__(self, rows: slice) -> "Draws":
        return Draws(
            posterior=self.posterior[rows],
            noise=self.noise[rows],
            timesteps=self.timesteps[rows],
            drop_prompt=self.drop_prompt[rows],
        )


def generator(*key: object) -> torch.Generator:
    """A generator that depends on nothing but the key."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def ids_of_step(ids: Sequence[str], step: int, count: int, seed: int) -> list[str]:
    """The samples of an optimiser step. Epochs follow each other without a gap, each in an order of its own."""
    positions = range(step * count, (step + 1) * count)
    return [ids[_order(len(ids), position // len(ids), seed)[position % len(ids)]] for position in positions]


@lru_cache(2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()
    return order


def draw(
    ids: Sequence[str],
    step: int,
    *,
    seed: int,
    shape: Sequence[int],
    timesteps: int,
    prompt_dropout: float,
    rows: slice = ALL,
) -> Draws:
    """Draw for samples of a step.

    Args:
        ids: all samples of the step.
        shape: [C, h, w] of the latents.
        timesteps: T, the length of the schedule.
        rows: those to draw for; of several processes each draws for its own.
    """
    seen: Counter[str] = Counter()
    keys = []
    for id in ids:
        keys.append((seed, step, id, seen[id]))
        seen[id] += 1  # a small data set may show a pair twice in one step: not with the same noise
    drawn = []
    for key in keys[rows]:
        source = generator(*key)
        gaussian = torch.randn((2, *shape), generator=source)
        timestep = torch.randint(timesteps, (), generator=source)
        drawn.append((gaussian[0], gaussian[1], timestep, torch.rand((), generator=source) < prompt_dropout))
    posterior, noise, steps, drop = (torch.stack(column) for column in zip(*drawn, strict=True))
    return Draws(posterior=posterior, noise=noise, timesteps=steps, drop_prompt=drop)
