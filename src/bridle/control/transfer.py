"""A control of one base made into one of another base of the same family: control + target - source.

In: a control, the base it was trained on, and a fine-tuned variant. Out: a control of that variant. What training
taught the copied weights is kept, and what they are now added to is the variant's own encoder.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bridle.control.control import Control, denoiser_of
from bridle.control.delta import parameters_of
from bridle.errors import ConfigError


def transfer(control: Control, source: nn.Module, target: nn.Module) -> Control:
    """Move a control to another base.

    Zero convolutions and hint encoder stay as they are, and so does the base delta, which is a difference already. From
    a base to itself a control comes back bit for bit; an untrained one becomes an untrained one of the target.

    Args:
        control: trained on the source; it is left as it is.
        source, target: pipelines, or their U-Nets or transformers, of one family and size.

    Raises: ConfigError: the control does not fit one of them, or copies nothing by its base's names.
    """
    before, after = (denoiser_of(base) for base in (source, target))
    for base, name in ((before, "source"), (after, "target")):
        control.check_fit(base, f"the control, for its {name},")
    moved = copy.deepcopy(control)
    copied = list(copied_weights(moved, parameters_of(before), parameters_of(after)))
    if not copied:
        remedy = "train one on the target"
        raise ConfigError(f"{control.CLASS} shares no weight with the base by name, so none can be moved: {remedy}")
    with torch.no_grad():
        for weight, old, new in copied:
            if not torch.equal(old, new):
                weight.copy_((weight.double() - old) + new)  # in float64, which forgets nothing that float32 holds
    return moved


def copied_weights(
    control: Control, source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The control's weights that are copies of the base's, each with the source's and the target's."""
    for name, weight in control.named_parameters():
        if name in source and name in target and source[name].shape == target[name].shape == weight.shape:
            yield weight, source[name], target[name]
