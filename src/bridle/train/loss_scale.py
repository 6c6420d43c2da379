"""float16's short range: what the loss is multiplied by before the backward pass, and gradients divided by after it.

float16 knows nothing below 6e-8, and many gradients of a denoising error are smaller; it knows nothing above 65,504
either (mixed precision training, arXiv:1710.03740).
"""

from typing import Any

import torch

FIRST = 2.0**16
PATIENCE = 2000  # steps without an overflow after which it is doubled


class LossScale:
    """Halved where a gradient overflows, doubled again when none has for long; 1 where nothing is to be scaled.

    Attributes:
        factor: as a tensor on the device, so that recorded kernels see it change.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.on, self.factor = on, torch.empty((), device=device)
        self._become(FIRST if on else 1.0)

    def lower(self) -> bool:
        """After gradients that are not finite. Returns: whether they may be with what it is now."""
        if not self.on or self.value <= 1:
            return False
        self._become(self.value / 2)
        return True

    def settle(self, before: float, *, good: bool) -> None:
        """After a step. Args: before: what it was at its beginning. good: whether its gradients were finite at last."""
        if not self.on:
            return
        if not good:
            self._become(before)  # it was not to blame
        elif self.steps + 1 < PATIENCE:
            self.steps += 1
        else:
            self._become(min(2 * self.value, torch.finfo(torch.float32).max))

    def _become(self, value: float) -> None:
        self.value, self.steps = value, 0
        self.factor.fill_(value)

    @property
    def state(self) -> dict[str, Any]:
        return {"value": self.value, "steps": self.steps}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._become(float(state["value"]))
        self.steps = int(state["steps"])
