"""What the trainings of these tools share: optimisers, device, learning-rate curve, averaged weights, safe state."""

import math
import os
import signal
from pathlib import Path

import torch
from torch import nn


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warmup_cosine(step: int, *, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Factor on the learning rate: a linear rise, then a cosine fall to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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
        lr: until `step` is told another.
        fused: AdamW's own kernel.
    """

    def __init__(self, model: nn.Module, inner: set[str], *, lr: float, weight_decay: float, fused: bool) -> None:
        named = dict(model.named_parameters())
        # Muon takes matrices only; a convolution's weights are seen as one through a view on the same memory.
        self.pairs = [(w, nn.Parameter(w.data.view(len(w), -1))) for name, w in named.items() if name in inner]
        matrices = [matrix for _, matrix in self.pairs]
        rest = [weight for name, weight in named.items() if name not in inner]
        self.all = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused),
        )

    def step(self, lr: float) -> None:
        for weight, matrix in self.pairs:
            matrix.grad = weight.grad.view(matrix.shape)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state_of_it in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state_of_it)


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
