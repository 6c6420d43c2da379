"""Residuals on their way into a denoiser whose `forward` has no arguments for them: by hooks on the blocks inside it.

They are asked for when the denoiser is called, added while it runs, and forgotten when it is done, also where it fails.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bridle.control.control import Call, Control, Pull, read_call
from bridle.control.residuals import Residuals
from bridle.errors import BaseError

Change = Callable[[Tensor], Tensor]


class Taps:
    """The hooks of one attachment, reversible.

    Args:
        denoiser: every call of it asks `pull` for residuals.
        pull: gives them; None leaves that call as it is.
    """

    def __init__(self, denoiser: nn.Module, pull: Pull) -> None:
        self.pull = pull
        self.residuals: Residuals | None = None  # of the call that is running
        self._handles: list[RemovableHandle] = [
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True),
            denoiser.register_forward_hook(self._end, always_call=True),
        ]

    def add_to_output(self, block: nn.Module, link: int) -> None:
        """Add a link to what a block returns; of several things it returns, to the first tensor."""

        def after(block: nn.Module, args: Any, output: Any) -> Any:
            if self.residuals is None:
                return output
            residual = self.residuals.links[link]
            return change_first(output, lambda tensor: tensor + residual.to(tensor.dtype))

        self._handles.append(block.register_forward_hook(after))

    def add_to_tensors(self, block: nn.Module, name: str, links: slice) -> None:
        """Add links, one each, to the tuple of tensors that is the block's argument of this name."""

        def before(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.residuals is None:
                return None
            call = read_call(block, args, kwargs)
            pairs = zip(call[name], self.residuals.links[links], strict=True)
            return (), call | {name: tuple(tensor + residual.to(tensor.dtype) for tensor, residual in pairs)}

        # First of all hooks, so that others see what the block sees.
        self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        """Leave the denoiser as it was. A second call does no harm."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, denoiser: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.residuals = self.pull(read_call(denoiser, args, kwargs))

    def _end(self, denoiser: nn.Module, args: Any, output: Any) -> None:
        self.residuals = None


def call_steered(control: Control, denoiser: nn.Module, call: Call, residuals: Residuals) -> Any:
    """What a denoiser returns for a call, with residuals added on the way."""
    remove = control.steer(denoiser, lambda call: residuals)
    try:
        return denoiser(**call)
    finally:
        remove()


def change_first(output: Any, change: Change) -> Any:
    """What a block returns, with the first tensor in it changed.

    Raises: BaseError: it is neither a tensor nor a tuple or list that holds one.
    """
    if isinstance(output, Tensor):
        return change(output)
    parts = output if isinstance(output, list | tuple) else ()
    at = next((index for index, part in enumerate(parts) if isinstance(part, Tensor)), None)
    if at is None:
        kind = type(output).__name__
        raise BaseError(f"a tap returns a {kind}; expected a tensor, or a tuple with one: tap a block inside it")
    changed = [*parts[:at], change(parts[at]), *parts[at + 1 :]]
    make = getattr(type(output), "_make", type(output))  # named tuples have a maker of their own
    return make(changed)


def change_input(args: tuple[Any, ...], kwargs: dict[str, Any], change: Change) -> tuple[Any, dict[str, Any]]:
    """A block's arguments, with the first tensor among them changed. Raises: BaseError: there is none."""
    for at, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:at], change(value), *args[at + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, kwargs | {name: change(value)}
    raise BaseError("the block that the hint goes to takes no tensor; name another one as hint_at")
