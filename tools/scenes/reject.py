"""When a picture is not good enough: what a look at the maps, the light and the picture can tell."""

import describe
import numpy as np
from draws import Plan
from maps import FIRST_THING, Maps

OBJECT_SHARE = (0.05, 0.6)  # of the picture
CLEAR = 0.10  # sRGB distance between things and what is around them, under which nobody would see them
PAINTED = 0.5  # share of a thing's pixels that must show the surface it was given


class RejectedError(Exception):
    """A picture is not good enough; the message says why."""


def check_layout(plan: Plan, labels: np.ndarray) -> None:
    """Every thing is seen, none is cut off. labels: [H, W]. Raises: RejectedError."""
    things = labels >= FIRST_THING
    if not OBJECT_SHARE[0] <= things.mean() <= OBJECT_SHARE[1]:
        raise RejectedError(f"the things take {things.mean():.0%} of the picture")
    if things[[0, -1]].any() or things[:, [0, -1]].any():
        raise RejectedError("a thing is cut off")
    for index in range(len(plan.things)):
        if (labels == FIRST_THING + index).mean() < OBJECT_SHARE[0] / 2:
            raise RejectedError(f"{plan.things[index].model.key} is hardly seen")


def check_paint(plan: Plan, maps: Maps) -> None:
    """What got a new surface shows it. Raises: RejectedError."""
    for index, thing in enumerate(plan.things):
        if describe.painted_share(thing, FIRST_THING + index, maps) < PAINTED:
            raise RejectedError(f"too little of {thing.model.key} shows its new surface")


def check_light(light: np.ndarray) -> None:
    """Broken geometry gives broken light. light: [H, W, 3]. Raises: RejectedError."""
    if not np.isfinite(light).all():
        raise RejectedError("the light is not finite")


def check_picture(picture: np.ndarray, labels: np.ndarray) -> None:
    """The things stand out, and nothing is black or blown. picture: [H, W, 3] uint8. Raises: RejectedError."""
    values = picture / 255
    things = labels >= FIRST_THING
    apart = np.abs(np.median(values[things], 0) - np.median(values[~things], 0)).max()
    if apart < CLEAR and np.abs(values[things].std(0) - values[~things].std(0)).max() < CLEAR:
        raise RejectedError("the things look like what is around them")
    if not 0.18 < values.mean() < 0.9 or (values.max(-1) > 0.995).mean() > 0.1:
        raise RejectedError(f"badly lit: mean {values.mean():.2f}")
