"""What a picture is called: names, tags, and the colours that are really in it.

Colour words are computed from the pixels, and the same shapes are also shown in shifted hues under the new colour's
name. So the base learns that "blue" and "car" are two things, which makes one hint with four prompts worth looking at.
"""

import re
from typing import Any

import cv2
import numpy as np
from pictures import Concept

# Hue bins in degrees; brown is dark orange.
HUES = (
    (14, "red"),
    (37, "orange"),
    (68, "yellow"),
    (165, "green"),
    (255, "blue"),
    (290, "purple"),
    (345, "pink"),
    (361, "red"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
GROUNDS = {
    "red": (235, 87, 87), "orange": (245, 166, 80), "yellow": (250, 222, 100), "green": (120, 200, 130),
    "blue": (110, 170, 240), "purple": (170, 130, 220), "pink": (248, 175, 200), "grey": (190, 190, 195),
    "black": (35, 35, 40),
}  # fmt: skip
RECOLOURED = {"symbols", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
# How often a concept of each group is drawn, relative to one another; groups not named are left out of the base.
GROUP_WEIGHTS = {
    "smileys-emotion": 1.0, "animals-nature": 1.5, "food-drink": 1.5, "travel-places": 0.9, "activities": 0.9,
    "objects": 1.0, "people-body": 0.15, "symbols": 0.5,
}  # fmt: skip
# Everyday words for names that only a standards body would choose.
ALIASES = {
    "automobile": "car", "oncoming automobile": "car", "sport utility vehicle": "car", "racing car": "race car",
    "grinning cat": "smiling cat face", "grinning cat with smiling eyes": "smiling cat face",
    "hot beverage": "cup of coffee",
    "deciduous tree": "tree", "evergreen tree": "fir tree", "baby chick": "chick", "lady beetle": "ladybug",
    "house with garden": "house", "sailboat": "boat", "airplane": "plane", "beer mug": "beer", "tennis": "tennis ball",
    "couch and lamp": "couch", "closed book": "book", "locked": "padlock", "t-shirt": "shirt", "blossom": "flower",
    "wrapped gift": "gift", "headphone": "headphones", "shortcake": "cake", "honeybee": "bee", "sun": "sun",
}  # fmt: skip


def is_drawn(concept: Concept) -> bool:
    """Whether a concept belongs to the base's first set: clear things, no clocks, no signs, no skin-tone copies."""
    if concept.skin_tone or concept.group not in GROUP_WEIGHTS:
        return False
    if concept.group == "symbols":
        return bool(re.search(r"circle|square|diamond|triangle|star", concept.label))
    return not re.search(r"o’clock|-thirty|family:|kiss:|couple with heart:", concept.label)


def name_colour(rgba: np.ndarray) -> str | None:
    """The one word for a picture's colour, or None where no colour dominates. rgba: [H, W, 4] uint8."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgba[..., :3]).astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    solid = rgba[..., 3] > 128
    coloured = solid & (saturation > 0.35) & (value > 0.2)
    if coloured.sum() < 0.3 * solid.sum():
        grey = solid & ~coloured
        tone = float(np.median(value[grey])) if grey.sum() > 0.7 * solid.sum() else -1
        return None if tone < 0 else "black" if tone < 0.35 else "white" if tone > 0.82 else "grey"
    share: dict[str, float] = {}
    lower = 0
    for upper, name in HUES:
        inside = coloured & (hue >= lower) & (hue < upper)
        if name == "orange":
            share["brown"] = float((inside & (value < 0.74)).sum())
            inside &= value >= 0.74
        share[name] = share.get(name, 0) + float(inside.sum())
        lower = upper
    best = max(share, key=share.__getitem__)
    return best if share[best] > 0.55 * coloured.sum() else None


def shift_hue(rgba: np.ndarray, degrees: float) -> np.ndarray:
    """Turn every hue by so many degrees; greys stay as they are. [H, W, 4] uint8 in and out."""
    hsv = cv2.cvtColor(np.ascontiguousarray(rgba[..., :3]).astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + degrees) % 360
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return np.concatenate([np.round(rgb * 255).astype(np.uint8), rgba[..., 3:]], -1)


STYLES = {
    "fluent": (("{}", 0.7), ("{}, 3d emoji", 0.3)),
    "noto": (("a flat drawing of {}", 0.6), ("{}, flat emoji", 0.4)),
}


def in_style(said: str, style: str, rng: np.random.Generator) -> str:
    """A caption with its style named: always for flat drawings, sometimes for the 3-D ones."""
    forms, odds = zip(*STYLES[style], strict=True)
    return str(rng.choice(forms, p=odds)).format(said)


def scene_caption(about: dict[str, Any], rng: np.random.Generator) -> str:
    """What a rendered scene shows, as `tools/scenes` says it or in fewer words; its facts are in `about`."""
    said = about["caption"]
    if rng.random() < 0.4:  # without floor and wall; two things stay two
        said = re.split(r" on an? | in front of ", said)[0]
    if rng.random() < 0.1 and len(about["things"]) == 1:  # without material
        said = " ".join(word for word in said.split() if word != about["things"][0]["material"])
        said = re.sub(r"^an? (?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", said)
    return said


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption(
    concept: Concept, colour: str | None, ground: str | None, recoloured: bool, rng: np.random.Generator
) -> str:
    """One of the many ways to say what is to be seen. `ground` is the backdrop's colour, None for white."""
    label = concept.label.lower().replace("’", "'").replace(": ", " ")
    if label in ALIASES and rng.random() < 0.6:
        label = ALIASES[label]
    elif concept.tags and rng.random() < 0.12:
        label = str(rng.choice(concept.tags)).lower()
    if recoloured:
        label = " ".join(word for word in label.split() if word not in COLOURS) or label
    if colour and not any(word in COLOURS for word in label.split()) and (recoloured or rng.random() < 0.5):
        label = f"{colour} {label}"
    if rng.random() < 0.75 and not re.search(r"[^su]s$", label):  # no article before most plurals
        label = article(label)
    if rng.random() < 0.12 and concept.tags:
        label = f"{label}, {rng.choice(concept.tags)}"
    if ground is not None:
        return f"{label} on {article(ground)} background"
    return f"{label} on a white background" if rng.random() < 0.1 else label
