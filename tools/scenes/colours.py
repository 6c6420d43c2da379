"""Colour words: what to paint with, and what to call the colour that a picture shows.

Colours are linear RGB in [0, 1] unless they are called sRGB, which is what a screen takes.
"""

import numpy as np

# sRGB in 0..255. Clear, everyday colours, none so dark or so light that the light on it would change its name.
PALETTE = {
    "red": (196, 38, 38), "orange": (232, 122, 30), "yellow": (240, 200, 50), "green": (60, 145, 65),
    "blue": (40, 90, 190), "purple": (118, 62, 160), "pink": (236, 140, 180), "brown": (112, 68, 40),
    "beige": (222, 202, 168), "white": (238, 238, 236), "grey": (142, 142, 144), "black": (36, 36, 40),
    "turquoise": (50, 175, 170), "light blue": (140, 190, 232), "dark blue": (28, 42, 100),
    "light green": (160, 210, 130), "dark green": (28, 78, 44),
}  # fmt: skip
# Hue bins in degrees; brown is dark orange, beige pale orange.
HUES = (
    (14, "red"), (40, "orange"), (66, "yellow"), (160, "green"), (192, "turquoise"), (255, "blue"), (290, "purple"),
    (345, "pink"), (361, "red"),
)  # fmt: skip

DARK_WARM = {"red": 0.4, "orange": 0.72, "yellow": 0.55}  # warm colours darker than this are brown


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Decode sRGB in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Encode as sRGB in [0, 1]; what lies outside is clipped."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def paint(word: str, rng: np.random.Generator) -> np.ndarray:
    """One shade of a palette colour, [3]: never quite the same, always the same word."""
    srgb = np.array(PALETTE[word]) / 255
    return to_linear(np.clip(srgb * rng.uniform(0.92, 1.06) + rng.uniform(-0.02, 0.02, 3), 0.02, 0.96))


def family(word: str) -> str:
    """The colour without its shade: "dark blue" is blue."""
    return word.split()[-1]


def name_pixels(linear: np.ndarray, share: float = 0.6) -> str | None:
    """The one word for most of the pixels, or None where no colour has that share of them. linear: [N, 3]."""
    words, counts = np.unique([_name(pixel) for pixel in to_srgb(linear)], return_counts=True)
    best = counts.argmax()
    return str(words[best]) if counts[best] >= share * counts.sum() else None


def _name(srgb: np.ndarray) -> str:
    high, low = srgb.max(), srgb.min()
    chroma = high - low
    saturation = chroma / max(high, 1e-6)
    if high < 0.2:
        return "black"
    if saturation < 0.13 or chroma < 0.06:
        return "white" if high > 0.72 else "grey" if high > 0.28 else "black"
    hue = _hue_deg(srgb, high, chroma)
    if 14 <= hue < 60 and saturation < 0.4:
        return "beige" if high > 0.65 else "brown" if saturation > 0.2 else "grey"
    if 14 <= hue < 48 and saturation < 0.6 and high < 0.92:
        return "brown"  # light wood, fur, straw
    word = next(name for upper, name in HUES if hue < upper)
    return "brown" if high < DARK_WARM.get(word, 0) else word


def _hue_deg(srgb: np.ndarray, high: float, chroma: float) -> float:
    red, green, blue = srgb
    if high == red:
        return (60 * (green - blue) / chroma) % 360
    return 60 * (blue - red) / chroma + 120 if high == green else 60 * (red - green) / chroma + 240
