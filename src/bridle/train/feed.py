"""What a step trains on: the pairs of this process and the draws for them, read ahead by worker processes where asked.

A step's rows and draws depend on nothing but seed and step, so it is the same whoever reads them, and when.
"""

import signal
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from bridle.cache.store import Cache, CachedBatch
from bridle.train.draws import Draws, draw, ids_of_step
from bridle.train.settings import TrainSettings


@dataclass(frozen=True)
class Rows:
    """The samples of one step that fall to one process.

    Attributes:
        ids: of the samples.
        batch: the encoded pairs.
        draws: what chance decides for them.
    """

    ids: list[str]
    batch: CachedBatch
    draws: Draws


class Steps(Dataset[Rows]):
    """Rows by step.

    Args:
        timesteps: T, the length of the schedule.
        rank, ranks: which share of each step's rows this process takes: contiguous, in order of rank.
    """

    def __init__(self, cache: Cache, settings: TrainSettings, timesteps: int, rank: int = 0, ranks: int = 1) -> None:
        self.cache, self.settings, self.timesteps = cache, settings, timesteps
        share = settings.effective_batch // ranks
        self.mine = slice(rank * share, (rank + 1) * share)
        self.ids = cache.train_ids
        self.shape = cache.batch(self.ids[:1]).mean.shape[1:]

    def __getitem__(self, index: int) -> Rows:
        """The rows of step `index`."""
        step, settings = index, self.settings
        ids = ids_of_step(self.ids, step, settings.effective_batch, settings.seed)
        draws = draw(
            ids,
            step,
            seed=settings.seed,
            shape=self.shape,
            timesteps=self.timesteps,
            prompt_dropout=settings.prompt_dropout,
            rows=self.mine,
        )
        return Rows(ids[self.mine], self.cache.batch(ids[self.mine]), draws)


def feed(steps: Steps, first: int, last: int, workers: int = 0) -> Generator[Rows]:
    """The rows of steps `first` to `last - 1`, in order."""
    if workers == 0:
        yield from (steps[step] for step in range(first, last))
        return
    # One item is one step, so there is nothing to collate; what a worker reads arrives through shared memory. A
    # generator of its own, because the loader would draw from the global one, which is not ours to move.
    yield from DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )


def ignore_signals(worker: int) -> None:
    """A signal to the whole process group is the trainer's to answer; it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
