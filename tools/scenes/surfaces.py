"""What things are made of: colour, gloss, and patterns drawn by number, with the words for them."""

from dataclasses import dataclass, replace

import colours
import numpy as np

PATTERN_PX = 256
# The materials that a thing of each kind may be given, and how often; "" is paint, which needs no word.
MATERIALS = {
    "seat": {"leather": 3, "wooden": 3, "plastic": 3, "fabric": 2, "metal": 1},
    "bed": {"": 4, "wooden": 1, "metal": 1},
    "wood": {"wooden": 4, "plastic": 1, "metal": 1, "": 3},
    "ceramic": {"ceramic": 3, "": 2, "metal": 1, "wooden": 1},
    "soft": {"": 4, "leather": 1},
    "thing": {"": 4, "plastic": 2, "metal": 2, "wooden": 1},
}
GLOSS = {"leather": 0.4, "fabric": 0.95, "plastic": 0.3, "ceramic": 0.18, "wooden": 0.5, "": 0.45}  # roughness
METALS = {"golden": (0.95, 0.66, 0.27), "silver": (0.85, 0.86, 0.88), "copper": (0.88, 0.47, 0.33)}
WOODS = ((206, 164, 112), (168, 108, 62), (104, 64, 40))  # sRGB: light, middle, dark
PALER = ("orange", "yellow", "green", "blue", "purple", "pink", "turquoise", "grey")
FLOORS = {"plain": 6, "planks": 2, "checks": 1, "tiles": 1}
WALLS = {"plain": 8, "stripes": 1}

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A surface, its colours linear RGB. `second` is the pattern's other colour; the words are a caption's."""

    colour: RGB
    colour_word: str = ""
    material_word: str = ""
    pattern: str = "plain"
    second: RGB = (1.0, 1.0, 1.0)
    second_word: str = ""
    roughness: float = 0.5
    metallic: bool = False


def _rgb(colour: np.ndarray) -> RGB:
    red, green, blue = (float(value) for value in colour)
    return red, green, blue


def _choose(weights: dict[str, int], rng: np.random.Generator) -> str:
    return str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))


def draw_word(avoid: set[str], rng: np.random.Generator) -> str:
    """A palette colour of none of the families in `avoid`, shades like "dark blue" half as often as plain colours."""
    return _choose({w: 1 if " " in w else 2 for w in colours.PALETTE if colours.family(w) not in avoid}, rng)


def draw_wood(pattern: str, rng: np.random.Generator) -> Surface:
    """Wood of some tree; its colour is left to the word "wooden"."""
    colour = colours.to_linear(np.array(WOODS[rng.integers(len(WOODS))]) / 255 * rng.uniform(0.9, 1.08))
    return Surface(colour=_rgb(colour), material_word="wooden", pattern=pattern, roughness=GLOSS["wooden"])


def draw_object(kind: str, avoid: set[str], rng: np.random.Generator) -> Surface:
    """A new surface for a thing of this kind, in none of the colour families of its surroundings."""
    material = _choose(MATERIALS[kind], rng)
    if material == "wooden":
        return draw_wood("wood", rng)
    if material == "metal":
        word = str(rng.choice(list(METALS)))
        colour = METALS[word]
        return Surface(
            colour=colour, colour_word=word, material_word="metal", roughness=rng.uniform(0.25, 0.4), metallic=True
        )
    word = draw_word(avoid, rng)
    pattern = material if material in ("leather", "fabric") else "plain"
    painted = Surface(colour=_rgb(colours.paint(word, rng)), colour_word=word, pattern=pattern)
    return replace(painted, material_word=material, roughness=GLOSS[material])


def backdrop(word: str, rng: np.random.Generator) -> np.ndarray:
    """A palette colour as floors and walls have it: paler than things, but for those that paleness would rename."""
    colour = colours.paint(word, rng)
    white = rng.uniform(0.0, 0.45) if colours.family(word) in PALER and " " not in word else 0.0
    return colours.to_linear(colours.to_srgb(colour) * (1 - white) + white * 0.95)


def draw_floor(rng: np.random.Generator) -> Surface:
    """A floor: plain, planks, checks of two colours, or tiles."""
    pattern = _choose(FLOORS, rng)
    if pattern == "planks":
        return draw_wood(pattern, rng)
    word = draw_word({"black"}, rng)
    floor = Surface(colour=_rgb(backdrop(word, rng)), colour_word=word, pattern=pattern, roughness=0.7)
    if pattern == "checks":
        second = draw_word({colours.family(word)}, rng)
        return replace(floor, second=_rgb(backdrop(second, rng)), second_word=second, material_word="checkered")
    return replace(floor, material_word="tiled" if pattern == "tiles" else "")


def draw_wall(avoid: set[str], rng: np.random.Generator) -> Surface:
    """A wall, plain or striped."""
    word = draw_word(avoid | {"black"}, rng)
    colour = backdrop(word, rng)
    stripes = _choose(WALLS, rng) == "stripes"
    return Surface(
        colour=_rgb(colour), colour_word=word, pattern="stripes" if stripes else "plain",
        second=_rgb(colour + (1 - colour) * 0.45), material_word="striped" if stripes else "", roughness=0.9,
    )  # fmt: skip


def texture(surface: Surface, rng: np.random.Generator) -> np.ndarray | None:
    """The pattern as one tile, [S, S, 3] linear float32; None where the surface is plain."""
    if surface.pattern == "plain":
        return None
    colour, second = np.array(surface.colour), np.array(surface.second)
    v, u = (np.mgrid[:PATTERN_PX, :PATTERN_PX] + 0.5) / PATTERN_PX
    if surface.pattern in ("checks", "stripes"):
        first = ((u < 0.5) ^ ((v < 0.5) & (surface.pattern == "checks")))[..., None]
        return np.where(first, colour, second).astype(np.float32)
    if surface.pattern == "tiles":
        joint = (np.minimum(np.abs(u % 0.25 - 0.125), 9) > 0.12) | (np.abs(v % 0.25 - 0.125) > 0.12)
        return (colour * np.where(joint, 0.6, 1.0)[..., None]).astype(np.float32)
    if surface.pattern in ("wood", "planks"):
        shade = _grain(u, v, rng) if surface.pattern == "wood" else _planks(u, v, rng)
    else:
        shade = 1 + (0.10 if surface.pattern == "fabric" else 0.07) * _noise(24, rng)
    return np.clip(colour * shade[..., None], 0, 1).astype(np.float32)


def _grain(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fibres along u: rings bent by slow noise, and fine streaks."""
    bend = _noise(2, rng) * 0.22
    rings = np.sin(2 * np.pi * (rng.integers(7, 12) * v + bend))
    streaks = np.repeat(rng.normal(size=(PATTERN_PX, 8)), PATTERN_PX // 8, axis=1)
    return 1 + 0.13 * rings + 0.07 * streaks


def _planks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = 8
    plank = np.minimum((v * count).astype(int), count - 1)
    tone = 1 + 0.12 * rng.normal(size=count)
    joint = (v * count) % 1 < 0.06
    ends = np.abs((u + rng.random(count)[plank]) % 1 - 0.5) < 0.006
    return np.where(joint | ends, 0.55, tone[plank] * (0.75 + 0.25 * _grain(u, v, rng)))


def _noise(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise that tiles, [S, S], about unit deviation."""
    spectrum = np.fft.rfft2(rng.normal(size=(PATTERN_PX, PATTERN_PX)))
    y, x = np.fft.fftfreq(PATTERN_PX)[:, None], np.fft.rfftfreq(PATTERN_PX)[None]
    smooth = np.fft.irfft2(spectrum * np.exp(-((x**2 + y**2) * (PATTERN_PX / cells) ** 2)), (PATTERN_PX, PATTERN_PX))
    return smooth / smooth.std()
