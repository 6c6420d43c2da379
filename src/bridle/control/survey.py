"""One run of a model that nobody described, to see what a control of it has to know.

In: the names of its blocks and an example of what it is called with. Out: a `Survey`, which holds no tensors. The model
is left as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bridle.control.taps import change_first, change_input
from bridle.errors import BaseError, ConfigError

Channels = Literal["first", "last"]
MOST_AXES = 3


@dataclass(frozen=True)
class Place:
    """Features of a block.

    Attributes:
        name: of the block, dotted.
        width: the number of their channels.
        axes: of their grid, where channels come first: [B, width, ...]; 0 where they come last: [B, ..., width].
    """

    name: str
    width: int
    axes: int


@dataclass(frozen=True)
class Survey:
    """What a run has shown.

    Attributes:
        entry: what the hint is added to.
        positions: the sizes of its axes.
        taps: what takes residuals, in the order of the run.
        dropped: names of modules that the run up to the last tap has no use for.
    """

    entry: Place
    positions: tuple[int, ...]
    taps: tuple[Place, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """A block begins ("in", with what it is given) or ends ("out", with what it returns).

    Attributes:
        shape: of the first tensor.
        used: how many modules and parameters had been used by then.
    """

    kind: Literal["in", "out"]
    name: str
    shape: tuple[int, ...]
    used: int


class Watch(TorchFunctionMode):
    """Notes which parameters take part in anything; some models use a layer's weights without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[int, None] = {}  # ids, in the order of their first use
        self.events: list[Event] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in [*args, *(kwargs or {}).values()]:
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, nn.Parameter):
                    self.used[id(part)] = None
        return func(*args, **(kwargs or {}))

    def called(self, module: nn.Module, args: Any) -> None:
        self.used[id(module)] = None

    def begun(self, name: str, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        change_input(args, kwargs, partial(self._note, "in", name))

    def ended(self, name: str, block: nn.Module, args: Any, output: Any) -> None:
        change_first(output, partial(self._note, "out", name))

    def _note(self, kind: Literal["in", "out"], name: str, tensor: Tensor) -> Tensor:
        self.events.append(Event(kind, name, tuple(tensor.shape), len(self.used)))
        return tensor


def survey(
    model: nn.Module,
    call: Mapping[str, Any],
    taps: Sequence[str],
    hint_at: str | None,
    hint_axes: int,
    channels: Channels | None,
) -> Survey:
    """Run the model once, in evaluation mode. See `Control.for_module`.

    Raises: BaseError: a block is unknown, or cannot be tapped. ConfigError: there are no taps, or one is named twice.
    """
    if not taps or len(set(taps)) < len(taps):
        raise ConfigError(f"taps are {list(taps)}; expected one or more names of blocks, each once")
    watch = run_watched(model, call, [*taps, *([hint_at] if hint_at else [])])
    outs = [event for event in watch.events if event.kind == "out" and event.name in taps]
    for name in taps:
        count = sum(event.name == name for event in outs)
        if count != 1:
            raise BaseError(f"block {name!r} ran {count} times in the example; expected once: tap another block")
    before = watch.events[: watch.events.index(outs[0])]
    entry = next((event for event in before if event.kind == "in" and event.name == (hint_at or outs[0].name)), None)
    if entry is None:
        raise BaseError(
            f"hint_at {hint_at!r} does not run before the tap {outs[0].name!r} ends, which would not see it"
        )
    place = place_of(entry, hint_axes, channels)
    return Survey(
        entry=place,
        positions=entry.shape[2:] if place.axes else entry.shape[1:-1],
        taps=tuple(place_of(event, hint_axes, channels) for event in outs),
        dropped=tuple(list_unused(model, set(list(watch.used)[: outs[-1].used]))),
    )


def run_watched(model: nn.Module, call: Mapping[str, Any], names: Sequence[str]) -> Watch:
    """What happens in a run without gradients."""
    watch, modes = Watch(), {module: module.training for module in model.modules()}
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(watch.called).remove)
        for name in dict.fromkeys(names):
            block = find_block(model, name)
            undo.callback(block.register_forward_pre_hook(partial(watch.begun, name), with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(partial(watch.ended, name)).remove)
        undo.callback(restore_modes, modes)
        model.eval()
        with torch.no_grad(), watch:
            model(**call)
    return watch


def restore_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def find_block(model: nn.Module, name: str) -> nn.Module:
    """Raises: BaseError: there is none of that name."""
    blocks = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in blocks:
        near = get_close_matches(name, blocks, n=3, cutoff=0.0)
        raise BaseError(f"{type(model).__name__} has no block {name!r}; expected one such as {', '.join(near)}")
    return blocks[name]


def place_of(event: Event, hint_axes: int, channels: Channels | None) -> Place:
    """Raises: BaseError: such features take no convolution and no linear layer."""
    axes = len(event.shape) - 2
    if not 0 <= axes <= MOST_AXES:
        raise BaseError(f"block {event.name!r} has features of shape {list(event.shape)}; expected [B, C, ...]")
    tokens = axes == 1 and hint_axes != 1
    last = axes == 0 or (tokens if channels is None else channels == "last")
    return Place(event.name, event.shape[-1 if last else 1], 0 if last else axes)


def list_unused(module: nn.Module, used: set[int], prefix: str = "") -> list[str]:
    """The largest modules with parameters of which nothing was used."""
    names: list[str] = []
    for name, child in module.named_children():
        parts = [*child.modules(), *child.parameters()]
        if any(id(part) in used for part in parts):
            names += list_unused(child, used, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            names.append(prefix + name)
    return names
