"""What training changed in the base, as a value that can be added to a U-Net and taken off again.

A delta maps names of a U-Net's parameters to (trained - original), float32; it names only what changed. It travels with
the control that was trained beside it (`Control.base_delta`), and `bridle.attach` applies and removes it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bridle.errors import ConfigError

REMEDY = "attach it to the base it was trained on"

# Beside the U-Net, not in it: a copy of a changed U-Net starts afresh, and a dropped one takes its ledger along.
LEDGERS: "WeakKeyDictionary[nn.Module, Ledger]" = WeakKeyDictionary()


def take_delta(original: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has to be added to the original weights to get the trained ones.

    original + delta is the trained weight exactly where that is half to twice the original. Elsewhere rounding takes it
    off by at most 2^-23 of the larger of the two: of weights of about 0.04 that moved by a tenth of that, 3% are off,
    by 2e-9 at most.

    Args:
        original: parameters by name, in the precision that the base is loaded with later on.
        trained: all of them or some, under the same names.

    Returns: float32 on the CPU, only for parameters that differ anywhere.
    Raises: ConfigError: a trained name is not among the originals, or has another shape.
    """
    check_delta(original, trained, "training", "take the delta against the base that training started from")
    delta = {}
    for name, tensor in trained.items():
        change = to_float32(tensor) - to_float32(original[name])
        if change.any():
            delta[name] = change
    return delta


def apply_delta(unet: nn.Module, delta: Mapping[str, Tensor]) -> Callable[[], None]:
    """Add a delta to a U-Net's weights, in place, whatever their device and type.

    Several deltas add up and come off in any order; one that is there already, as that of a control that is attached
    for two regions, counts once. When the last one that touches a weight is off, the weight is what it was before the
    first, bit for bit; what else changed it in between is undone as well.

    Returns: what takes this delta off again; calling it twice does no harm.
    Raises: ConfigError: a name is unknown or a shape differs; nothing is changed then.
    """
    parameters = parameters_of(unet)
    check_delta(parameters, delta)
    ledger = LEDGERS.setdefault(unet, Ledger())
    key = object()
    try:
        ledger.add(key, delta, parameters)
    except BaseException:  # out of memory, or the user's Ctrl-C: half a change would stay
        ledger.remove(key)
        raise
    return partial(ledger.remove, key)


def parameters_of(unet: nn.Module) -> dict[str, Tensor]:
    """A base's own parameters by name, the same with and without a LoRA: peft puts its layers around the base's."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in unet.named_parameters()}


def check_delta(
    parameters: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    owner: str = "the base delta",
    remedy: str = REMEDY,
) -> None:
    """Raises: ConfigError: a name is unknown, a shape differs, or the weights are out of reach."""
    unknown = sorted(delta.keys() - parameters.keys())
    if unknown:
        named = f"{', '.join(unknown[:3])} ({len(unknown)} in all), which this U-Net does not have"
        raise ConfigError(f"{owner} changes {named}: {remedy}")
    for name, change in delta.items():
        ours, theirs = list(change.shape), list(parameters[name].shape)
        if ours != theirs:
            raise ConfigError(f"{owner} changes {name} of shape {ours}, this U-Net's has {theirs}: {remedy}")
        if parameters[name].is_meta:  # adding to it would do nothing, and say nothing
            closer = "leave out enable_sequential_cpu_offload; enable_model_cpu_offload works"
            raise ConfigError(f"{owner} changes {name}, whose weights are offloaded one by one: {closer}")


class Ledger:
    """What is added to one U-Net at present, and the weights from before."""

    def __init__(self) -> None:
        self.originals: dict[str, tuple[Tensor, Tensor]] = {}  # the parameter itself, and what it held
        self.deltas: dict[object, dict[str, Tensor]] = {}

    def add(self, key: object, delta: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        alike = [known for known in self.deltas.values() if same(known, delta)]
        self.deltas[key] = alike[0] if alike else dict(delta)
        for name in delta:
            if name not in self.originals:
                self.originals[name] = parameters[name], parameters[name].detach().clone()
            self._renew(name)
        torch.clear_autocast_cache()  # or an autocast around all this goes on with the weights it has cast

    def remove(self, key: object) -> None:
        for name in self.deltas.pop(key, {}):
            if name in self.originals:
                self._renew(name)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _renew(self, name: str) -> None:
        """Set a parameter to its original plus all deltas; always from the original, so that no rounding adds up."""
        parameter, original = self.originals[name]
        different = {id(delta): delta for delta in self.deltas.values()}.values()
        changes = [delta[name] for delta in different if name in delta]
        if not changes:
            parameter.copy_(original)
            del self.originals[name]
            return
        total = original.to(parameter.device, torch.promote_types(original.dtype, torch.float32), copy=True)
        for change in changes:
            total += change.to(total)
        parameter.copy_(total)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two deltas are equal, on the same devices."""
    return one.keys() == other.keys() and all(
        mine is theirs or (mine.device == theirs.device and torch.equal(mine, theirs))
        for mine, theirs in ((one[name], other[name]) for name in one)
    )


def to_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
