"""What a scene shows, decided by (seed, number) alone: so any scene can be rendered again, by itself and anywhere."""

from dataclasses import dataclass

import colours
import numpy as np
import surfaces
from library import CC0, Model
from surfaces import Surface

SECOND_SHARE = 0.15  # of the scenes show two things
OWN_SHARE = 0.45  # of the things that could be repainted keep their looks
HELD_OUT_SHARE = 0.15
FLAT = 0.22  # height over the larger side, under which a thing is looked at from above
ROUND = ("own", "thing")  # kinds that are worth a look from behind: nobody knows a cupboard by its back
COMPANION = (0.45, 2.2)  # size of the second thing, relative to the first


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: its model, turned about the vertical, and its new surface if it gets one."""

    model: Model
    yaw_deg: float
    surface: Surface | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A scene. Lengths are in units of the things' radius; `fill` is the part of the frame that they take,
    and `lift` how high above the floor they hang."""

    seed: int
    number: int
    attempt: int
    held_out: bool
    things: tuple[Thing, ...]
    floor: Surface
    wall: Surface
    wall_gap: float
    wall_yaw_deg: float
    lift: float
    azimuth_deg: float
    elevation_deg: float
    view_deg: float
    fill: float
    shift: tuple[float, float]
    light_azimuth_deg: float
    light_elevation_deg: float
    light_sharpness: float
    light_power: float
    warmth: float


def generator(seed: int, number: int, attempt: int, purpose: int = 0) -> np.random.Generator:
    """Randomness of its own for every scene, attempt and purpose."""
    return np.random.default_rng([seed, number, attempt, purpose])


def draw_plan(models: list[Model], licence: str, seed: int, number: int, attempt: int) -> Plan:
    """Decide scene `number`. licence: "cc0", or "all" for every model. A rejected picture gets the next attempt."""
    held_out = generator(seed, number, 0, 1).random() < HELD_OUT_SHARE  # the same in every attempt
    rng = generator(seed, number, attempt)
    usable = [m for m in models if m.held_out == held_out and (licence == "all" or m.licence == CC0)]
    floor = surfaces.draw_floor(rng)
    wall = surfaces.draw_wall({colours.family(floor.colour_word)} if floor.colour_word else {"brown"}, rng)
    around = {colours.family(word) for word in (floor.colour_word, floor.second_word, wall.colour_word) if word}
    chosen = _choose_models(usable, rng)
    where = chosen[0].mount
    flat = max(m.size_m[1] / max(m.size_m[0], m.size_m[2]) for m in chosen) < FLAT
    return Plan(
        seed=seed, number=number, attempt=attempt, held_out=held_out,
        things=tuple(_draw_thing(model, around, rng) for model in chosen),
        floor=floor, wall=wall,
        wall_gap=0.0 if where == "wall" else rng.uniform(0.25, 1.6),
        wall_yaw_deg=0.0 if where == "wall" else rng.uniform(-25, 25),
        lift=0.0 if where == "floor" else rng.uniform(0.15, 0.5),
        azimuth_deg=rng.uniform(-35, 35) if where == "wall" else 0.0,
        elevation_deg=rng.uniform(35, 62) if flat and where == "floor" else rng.uniform(7, 30),
        view_deg=rng.uniform(22, 42),
        fill=rng.uniform(0.55, 0.78),
        shift=(rng.uniform(-0.08, 0.08), rng.uniform(-0.06, 0.06)),
        light_azimuth_deg=rng.uniform(20, 75) * rng.choice([-1, 1]),
        light_elevation_deg=rng.uniform(35, 65),
        light_sharpness=np.exp(rng.uniform(np.log(12), np.log(70))),
        light_power=rng.uniform(0.9, 2.2),
        warmth=rng.uniform(-0.05, 0.05),
    )  # fmt: skip


def _choose_models(usable: list[Model], rng: np.random.Generator) -> list[Model]:
    """One model or two. Names that many models share come more often, but not as often as they have models."""
    names = [m.name for m in usable]
    weights = np.array([names.count(name) ** -0.5 for name in names])
    first = usable[rng.choice(len(usable), p=weights / weights.sum())]
    if first.mount != "floor" or rng.random() > SECOND_SHARE:
        return [first]
    size = max(first.size_m)
    fits = [
        m for m in usable
        if m.mount == "floor" and m.name != first.name and COMPANION[0] < max(m.size_m) / size < COMPANION[1]
    ]  # fmt: skip
    return [first, fits[rng.integers(len(fits))]] if fits else [first]


def _draw_thing(model: Model, around: set[str], rng: np.random.Generator) -> Thing:
    """A thing turned mostly towards us, with its own looks or new ones."""
    if model.mount == "wall":
        turned = 0.0  # it hangs flat; the camera goes round instead
    elif model.kind in ROUND and rng.random() < 0.25:
        turned = rng.uniform(-180, 180)
    else:
        turned = rng.uniform(-62, 62)
    own = model.kind == "own" or rng.random() < OWN_SHARE
    return Thing(
        model=model, yaw_deg=float(turned), surface=None if own else surfaces.draw_object(model.kind, around, rng)
    )
