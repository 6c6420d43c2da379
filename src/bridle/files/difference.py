"""A control as its difference to the base it was copied from, without the loss of a bit.

control = base + difference + rest. The difference has the control's type, as in other tools' files, and rounds where
the two are not of a size; the rest, where there is any, is what rounding took. Other tools pass it over.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bridle.errors import FileError
from bridle.files.tensors import Spec, Weights

MARK = "difference"  # by which other tools know such a file
REST = "bridle_rest."
PIECE = 1 << 17  # values at a time that fit a processor's cache: 9 times as fast as a large tensor at once
REST_TYPES = (torch.int32, torch.float64)


def is_copied(name: str) -> bool:
    """Whether the base has a parameter of that name as well; the hint encoder and the links are the control's own."""
    return not name.startswith("controlnet_")


def check_base(names: Iterable[str], specs: Mapping[str, Spec], base: Mapping[str, Tensor], path: Path) -> None:
    """Args: names: of the parameters that base and control share. Raises: FileError: they differ in kind."""
    shapes = {name: spec.shape for name, spec in base.specs.items()} if isinstance(base, Weights) else {}
    for name in names:
        if name not in base:
            raise FileError(f"the base has no {name}, which {path} has; give the base it was trained on")
        ours, theirs = specs[name].shape, shapes.get(name) or tuple(base[name].shape)
        if ours != theirs:
            differing = f"{name} is {list(theirs)} in the base and {list(ours)} in {path}"
            raise FileError(f"{differing}; give the base it was trained on")


def add_base(difference: Weights, base: Mapping[str, Tensor]) -> Weights:
    """The control that a difference leads to.

    Args:
        difference: under diffusers' names, with the rests.
        base: the base's parameters under diffusers' names.

    Raises: FileError: the base has other parameters.
    """
    specs = {name: spec for name, spec in difference.specs.items() if not name.startswith(REST)}
    copied = {name for name in specs if is_copied(name)}
    check_base(copied, specs, base, difference.path)

    def read(name: str) -> Tensor:
        if name not in copied:
            return difference[name]
        left = read_rest(difference, f"{REST}{name}", specs[name].count)
        return join(difference[name], base[name], *left)

    return Weights(difference.path, specs, read, difference.metadata)


def take_base(control: Weights, base: Mapping[str, Tensor], progress: Callable[[int], None]) -> Weights:
    """The difference between a control and its base, both under diffusers' names, and the rests.

    Reads everything once, for a file's header says how long the rests are; `progress` hears of each tensor's bytes.

    Raises: FileError: the base has other parameters, or a difference is too large for the type.
    """
    specs = dict(control.specs)
    copied = {name for name in specs if is_copied(name)}
    check_base(copied, specs, base, control.path)
    for name in sorted(copied):
        _, at, by = split(control[name], base[name])
        if len(at):
            specs[f"{REST}{name}.at"] = Spec(at.dtype, tuple(at.shape))
            specs[f"{REST}{name}.by"] = Spec(by.dtype, tuple(by.shape))
        progress(control.specs[name].size_bytes)

    def read(name: str) -> Tensor:
        if name.startswith(REST):
            owner, _, part = name.removeprefix(REST).rpartition(".")
            return split(control[owner], base[owner])[1 if part == "at" else 2]
        return split(control[name], base[name])[0] if name in copied else control[name]

    return Weights(control.path, specs, read, control.metadata)


def split(control: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the base off. Weights smaller than 1e-16 of their difference are all that may not come back.

    Returns: the difference, in the control's type; where, counted through the flat tensor, it does not lead back; what
        is missing there.
    """
    pieces = zip(control.flatten().split(PIECE), base.flatten().split(PIECE), strict=True)
    parts = [split_piece(*piece) for piece in pieces]
    at = torch.cat([at + number * PIECE for number, (_, at, _) in enumerate(parts)])
    difference, by = (torch.cat([part[place] for part in parts]) for place in (0, 2))
    return difference.view(control.shape), at.to(torch.int32), by


def split_piece(control: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact, start = control.double(), base.double()
    difference = (exact - start).to(control.dtype)
    reached = start + difference.double()
    at = (reached.to(control.dtype) != control).nonzero().flatten()
    return difference, at, (exact - reached)[at]


def join(difference: Tensor, base: Tensor, at: Tensor, by: Tensor) -> Tensor:
    total = base.double() + difference.double()
    total.view(-1)[at.long()] += by
    return total.to(difference.dtype)


def read_rest(weights: Weights, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Raises: FileError: the rest does not fit its tensor."""
    if f"{name}.at" not in weights:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.float64)
    at, by = weights[f"{name}.at"], weights.get(f"{name}.by")
    fits = by is not None and at.ndim == 1 and at.shape == by.shape and (at.dtype, by.dtype) == REST_TYPES
    if not fits or (len(at) and not 0 <= int(at.min()) <= int(at.max()) < count):
        raise FileError(f"{name} in {weights.path} is damaged; copy it again")
    return at, by
