"""A scene in words: its facts, read off the plan and checked against the maps, and one caption."""

from pathlib import Path

import colours
import numpy as np
import surfaces
from draws import Plan, Thing, generator
from maps import FIRST_THING, FLOOR, WALL, Maps
from solids import load_mesh, own_material

SEEN = 0.06  # share of the picture from which floor and wall are mentioned
WOOD_COLOURS = ("brown", "beige", "orange", "yellow")
NEAR = 0.16  # of sRGB: a pixel shows the surface that was asked for


def painted_share(thing: Thing, label: int, maps: Maps) -> float:
    """How much of a thing's pixels show the surface it was given, in [0, 1]; 1 for its own looks."""
    if thing.surface is None:
        return 1.0
    seen = colours.to_srgb(maps.albedo[maps.labels == label])
    wanted = colours.to_srgb(np.array(thing.surface.colour))
    tolerance = NEAR if thing.surface.pattern == "plain" else 2 * NEAR
    return float((np.abs(seen - wanted).max(-1) < tolerance).mean()) if len(seen) else 0.0


def facts(plan: Plan, maps: Maps, folder: Path) -> list[dict[str, str]]:
    """Name, colour and material of each thing; "" where there is no word for it."""
    return [_fact(thing, FIRST_THING + index, maps, folder) for index, thing in enumerate(plan.things)]


def _fact(thing: Thing, label: int, maps: Maps, folder: Path) -> dict[str, str]:
    surface, said = thing.surface, thing.model.name.split()
    if surface is None:
        colour, material = _own_words(thing, maps.albedo[maps.labels == label], folder)
    else:
        colour, material = surface.colour_word, surface.material_word
    if material in said or (colour in surfaces.METALS and len(said) > 2):  # "a golden waste paper bin"
        material = ""
    if any(word in colours.PALETTE for word in said):
        colour = ""
    return {"name": thing.model.name, "colour": colour, "material": material}


def _own_words(thing: Thing, albedo: np.ndarray, folder: Path) -> tuple[str, str]:
    """Colour and material of a thing's own looks; wood in the colours of wood is only called wooden."""
    colour = colours.name_pixels(albedo) or ""
    material = own_material(thing.model, load_mesh(folder / thing.model.key.replace("/", "-")))
    return ("" if material == "wooden" and colour in WOOD_COLOURS else colour), material


def phrase(fact: dict[str, str]) -> str:
    """ "a blue plastic chair", "a pair of red scissors"."""
    head, _, rest = fact["name"].partition("pair of ")
    words = " ".join(word for word in (fact["colour"], fact["material"], rest or head) if word)
    return f"a pair of {words}" if rest else article(words)


def article(words: str) -> str:
    """With "a" or "an", by the first letter."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def surface_phrase(surface: surfaces.Surface, what: str) -> str:
    """ "a green floor", "a red and white checkered floor"."""
    colour = " and ".join(word for word in (surface.colour_word, surface.second_word) if word)
    return article(" ".join(word for word in (colour, surface.material_word, what) if word))


def caption(plan: Plan, said: list[dict[str, str]], maps: Maps) -> str:
    """One plain sentence part: what is there, and mostly also on and before what."""
    rng = generator(plan.seed, plan.number, plan.attempt, 9)
    things = phrase(said[0])
    if len(said) == 2:
        things += (" and ", " next to ")[rng.integers(2)] + phrase(said[1])
    mount = plan.things[0].model.mount
    floor, wall = ((maps.labels == label).mean() > SEEN for label in (FLOOR, WALL))
    on_floor = f" on {surface_phrase(plan.floor, 'floor')}" if floor and mount == "floor" else ""
    before = f" {'on' if mount == 'wall' else 'in front of'} {surface_phrase(plan.wall, 'wall')}" if wall else ""
    pick = rng.random()
    if pick < 0.1:
        return things
    if pick < 0.5 and on_floor:
        return things + on_floor
    return things + (before if pick > 0.9 else on_floor + before)
