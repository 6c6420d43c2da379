"""Surfaces in Mitsuba's words: those that were drawn by number, and those that the modellers gave."""

from typing import Any

import colours
import mitsuba as mi
import numpy as np
from PIL import Image
from solids import Part
from surfaces import Surface

METAL_NAMES = ("chrome", "metal", "steel", "alumin", "gold", "silver", "brass", "inox")
GLASS = 0.3  # opacity of the clearest glass: less could not be seen
DARKEST, BRIGHTEST = 0.01, 0.93  # nothing real swallows all light, or returns all


def painted(surface: Surface, pattern: np.ndarray | None, repeats: float = 1.0) -> dict[str, Any]:
    """A drawn surface; its pattern, if it has one, comes so many times along each side."""
    if pattern is None:
        colour: dict[str, Any] = {"type": "rgb", "value": list(surface.colour)}
    else:
        to_uv = mi.ScalarTransform4f().scale([repeats, repeats, 1])
        colour = {"type": "bitmap", "bitmap": mi.Bitmap(pattern), "raw": True, "to_uv": to_uv}
    return _principled(colour, surface.roughness, surface.metallic, 0.15 if surface.roughness > 0.8 else 0.45)


def _principled(colour: dict[str, Any], roughness: float, metallic: bool, specular: float) -> dict[str, Any]:
    return {
        "type": "twosided",
        "inner": {
            "type": "principled", "base_color": colour, "roughness": roughness, "metallic": float(metallic),
            "specular": specular,
        },
    }  # fmt: skip


def own(part: Part) -> dict[str, Any]:
    """The looks that the modeller gave a part, as far as OBJ can say them."""
    material = part.material
    roughness = float(np.clip((2 / (material.shininess + 2)) ** 0.25, 0.2, 0.9))
    metallic = any(name in material.name.lower() for name in METAL_NAMES) and material.texture is None
    colour, opacity = _own_colour(part)
    look = _principled(colour, roughness, metallic, min(0.5, 0.15 + 0.5 * material.specular))
    return look if opacity == 1.0 else {"type": "mask", "opacity": opacity, "inner": look}


def _own_colour(part: Part) -> tuple[dict[str, Any], Any]:
    """Colour and opacity: single values, or the texture's."""
    opacity = max(part.material.opacity, GLASS)
    if part.material.texture is None:
        linear = colours.to_linear(np.clip(part.material.colour, DARKEST, BRIGHTEST))
        return {"type": "rgb", "value": [float(value) for value in linear]}, opacity
    image = np.asarray(Image.open(part.textures / part.material.texture)) / 255
    linear = colours.to_linear(image[..., :3]).clip(0, BRIGHTEST).astype(np.float32)
    colour = {"type": "bitmap", "bitmap": mi.Bitmap(linear), "raw": True}
    if image.shape[-1] == 3:
        return colour, opacity
    alpha = mi.Bitmap(image[..., 3:].astype(np.float32))
    return colour, {"type": "bitmap", "bitmap": alpha, "raw": True}
