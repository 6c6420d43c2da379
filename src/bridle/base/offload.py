"""Out of the way: what training does not need of a base, until something has to be drawn.

On a GPU the weights of autoencoder and text encoder wait in the machine's memory, on a CPU on its disk.
"""

import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.base.base import Base


class Drawing(Protocol):
    """Around whatever draws or encodes: brings the whole base back for as long."""

    def __call__(self) -> AbstractContextManager[None]: ...


@contextmanager
def offloaded(base: Base, wanted: bool = True) -> Generator[Drawing]:
    """Take autoencoder and text encoder off the device; they are back when this ends.

    Args:
        wanted: False leaves everything where it is.
    """
    if not wanted:
        yield nullcontext
        return
    with tempfile.TemporaryDirectory() as folder:
        parts = [Part(part, Path(folder) / f"{at}.safetensors") for at, part in enumerate(base.encoders)]

        @contextmanager
        def drawing() -> Generator[None]:
            for part in parts:
                part.bring()
            try:
                yield
            finally:
                for part in parts:
                    part.send()

        for part in parts:
            part.send()
        try:
            yield drawing
        finally:
            for part in parts:
                part.bring()


class Part:
    """A model whose weights come and go; it never changes, so they are written once."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model, self.path = model, path
        self.device = next(model.parameters()).device
        self.waiting: dict[str, Tensor] = {}

    def send(self) -> None:
        """Give the memory back; the parameters stay, empty."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        if self.device.type != "cpu":
            self.waiting = self.waiting or {name: weight.cpu() for name, weight in weights.items()}
        elif not self.path.exists():
            save_file({name: weight.contiguous() for name, weight in weights.items()}, self.path)
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)

    def bring(self) -> None:
        """Fill the parameters again."""
        weights = self.waiting or load_file(self.path)
        for name, parameter in self.model.named_parameters():
            parameter.data = weights[name].to(self.device)
