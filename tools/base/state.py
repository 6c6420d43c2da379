"""What the trainings of these tools share: optimisers, device, learning-rate curve, averaged weights, safe state."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Pace:
    """When a training ends, and its learning rate until then: a linear rise, then a cosine fall to a fiftieth.

    Args:
        steps: after how many it ends.
        minutes: after how many it leaves, to go on another time.
        finish: the minutes are all there will be: the learning rate falls towards their end.
    """

    FLOOR = 0.02

    def __init__(self, *, steps: int, minutes: float, finish: bool, warmup: int) -> None:
        self.steps, self.finish, self.warmup = steps, finish, warmup
        self.began_s, self.end_s = time.monotonic(), time.monotonic() + minutes * 60
        self.stop, self.first = Stop(), True

    def goes_on(self, step: int) -> bool:
        return step < self.steps and not self.stop and time.monotonic() < self.end_s

    def lr(self, step: int) -> float:
        """Factor on the learning rate."""
        now_s = time.monotonic()
        if self.first:  # what comes before it, starting loaders and libraries, is not training
            self.began_s, self.first = now_s, False
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        if self.finish:
            done = max(done, (now_s - self.began_s) / (self.end_s - self.began_s))
        fall = self.FLOOR + (1 - self.FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return fall * min(1.0, (step + 1) / self.warmup)


class Keyed:
    """What is made from each of some keys, for a `DataLoader` to make ahead."""

    def __init__(self, make: Callable[[Any], Any], keys: Sequence[Any]) -> None:
        self.make, self.keys = make, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> Any:
        return self.make(self.keys[place])


def ahead(make: Callable[[Any], Any], keys: Sequence[Any]) -> Iterator[Any]:
    """`make(key)` in the order of the keys; beside a GPU made by the processor's other cores, meanwhile."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2)) if torch.cuda.is_available() else 0
    return iter(DataLoader(Keyed(make, keys), batch_size=None, num_workers=workers, pin_memory=workers > 0))


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the trained ones; the average is shorter while training is young."""
    weight = 1 - min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def save(path: Path, state: dict) -> None:
    """Write a training state so that a kill at any moment leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict | None:
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Optimizers:
    """Muon for the matrices inside, convolutions seen as such; AdamW for the rest.

    Args:
        model: trained in place; it must not be moved or loaded into other memory afterwards.
        inner: names of the parameters that Muon takes.
        fused: AdamW's own kernel.
    """

    def __init__(self, model: nn.Module, inner: set[str], *, weight_decay: float, fused: bool) -> None:
        named = dict(model.named_parameters())
        # Muon takes matrices only; a convolution's weights are seen as one through a view on the same memory.
        self.pairs = [(w, nn.Parameter(w.data.view(len(w), -1))) for name, w in named.items() if name in inner]
        matrices = [matrix for _, matrix in self.pairs]
        rest = [weight for name, weight in named.items() if name not in inner]
        how = {"weight_decay": weight_decay, "lr": 1.0}  # `take` sees to the rate
        recorded = bool(rest) and rest[0].is_cuda  # maybe, and then AdamW has to count on the GPU
        self.all = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **how),
            torch.optim.AdamW(rest, betas=(0.9, 0.99), fused=fused, capturable=recorded, **how),
        )
        self.weights = list(named.values())
        self.before = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def step(self) -> None:
        """Move as far as at a rate of 1: `take` is to follow. Neither looks at a value, so this can be recorded."""
        torch._foreach_copy_(self.before, self.weights)
        for weight, matrix in self.pairs:
            matrix.grad = weight.grad.view(matrix.shape)
        for optimizer in self.all:
            optimizer.step()

    @torch.no_grad()
    def take(self, lr: float) -> None:
        """Go back to this share of the move: both optimisers' are linear in the rate."""
        torch._foreach_lerp_(self.weights, self.before, 1 - lr)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        """Go on with what the optimisers remember; how they move stays as it is here, by full moves on this device."""
        for optimizer, saved in zip(self.all, states, strict=True):
            optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})


class Stop:
    """True once SIGTERM or SIGINT has arrived: the loop saves and leaves."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked
