"""What attached controls compute in one call: one pass for all that are the same control.

Requests with a hint and a strength each are then a batch of their control, whatever their number.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bridle.control.control import Call
from bridle.control.residuals import Residuals
from bridle.control.rows import Rows, Some

if TYPE_CHECKING:
    from bridle.control.rein import Rein


@dataclass(frozen=True)
class Pull:
    """One rein in one call.

    Attributes:
        rows: those of the call.
        acting: of these, the rows that it acts in.
        factor: by the strength's schedule.
    """

    rein: "Rein"
    rows: Rows
    acting: Some
    factor: float


def compute(pulls: Sequence[Pull], call: Call, pipeline: Any) -> list[Residuals]:
    """The residuals of each one's acting rows at full strength; a rein's last ones where it holds them."""
    found = [pull.rein.held for pull in pulls]
    alike: dict[int, list[int]] = defaultdict(list)
    for place, pull in enumerate(pulls):
        if found[place] is None:
            alike[id(pull.rein.control)].append(place)
    for places in alike.values():
        for place, residuals in zip(places, together([pulls[at] for at in places], call, pipeline), strict=True):
            found[place] = residuals
    if not torch.is_grad_enabled():  # or gradients would be remembered as well
        for pull, residuals in zip(pulls, found, strict=True):
            pull.rein.held = residuals
    return [residuals for residuals in found if residuals is not None]


def together(pulls: Sequence[Pull], call: Call, pipeline: Any) -> list[Residuals]:
    """One pass of the control that all have, over their acting rows."""
    control = pulls[0].rein.control
    features = [pull.rows.spread(pull.rein.features(call, pipeline), pull.acting) for pull in pulls]
    if len(pulls) == 1:
        return [control.residuals(pulls[0].rows.take(call, pulls[0].acting), features[0])]
    asked = [(row, number) for number, pull in enumerate(pulls) for row in pull.acting.rows]
    # Rising rows are often evenly spaced, so that every step sees the same memory again: see `Some.index`.
    order = sorted(range(len(asked)), key=lambda place: asked[place][0])
    rows = Some(tuple(asked[place][0] for place in order), 1)
    found = control.residuals(pulls[0].rows.take(call, rows), torch.cat(features)[order])
    return [
        pick(found, Some(tuple(at for at, place in enumerate(order) if asked[place][1] == number), 1), len(order))
        for number in range(len(pulls))
    ]


def pick(residuals: Residuals, some: Some, count: int) -> Residuals:
    """Of some of the rows that were computed."""

    def cut(link: Tensor) -> Tensor:
        return link[some.index] if len(link) == count else link  # the zero of a link that is not connected

    return replace(residuals, links=tuple(map(cut, residuals.links)))
