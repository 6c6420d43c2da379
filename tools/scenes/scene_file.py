"""One finished scene as one file, `<number>.npz`: picture, exact maps, and what it shows as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from draws import Plan
from surfaces import Surface

from bridle import atomic


@dataclass(frozen=True, kw_only=True)
class Scene:
    """picture: [H, W, 3] uint8 sRGB. depth: [H, W] float32, along the camera's axis. normals: [H, W, 3] float32, x
    right, y up, z towards the camera. labels: [H, W] uint8: 0 wall, 1 floor, 2 and 3 things. about: JSON values."""

    picture: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    labels: np.ndarray
    about: dict[str, Any]


def path(folder: Path, number: int) -> Path:
    """Where scene `number` lies."""
    return folder / f"{number:06}.npz"


def about(plan: Plan, said: list[dict[str, str]], caption: str) -> dict[str, Any]:
    """What a pack keeps of a plan: caption, split, facts, and whose models they are."""
    things = [
        {
            **fact, "model": t.model.key, "title": t.model.title, "creator": t.model.creator,
            "licence": t.model.licence, "own_looks": t.surface is None,
        }
        for fact, t in zip(said, plan.things, strict=True)
    ]  # fmt: skip
    return {
        "number": plan.number, "seed": plan.seed, "attempt": plan.attempt, "caption": caption,
        "split": "held_out" if plan.held_out else "train", "things": things,
        "floor": _words(plan.floor), "wall": _words(plan.wall),
    }  # fmt: skip


def _words(surface: Surface) -> dict[str, str]:
    return {"colour": surface.colour_word, "second": surface.second_word, "material": surface.material_word}


def save(target: Path, scene: Scene) -> None:
    """Write a scene, whole or not at all. Normals are kept to 16 bits, and so is one over depth."""
    near, far = np.float32(scene.depth.min()), np.float32(scene.depth.max())
    share = (1 / scene.depth - 1 / far) / (1 / near - 1 / far)
    arrays = {
        "picture": scene.picture, "near": near, "far": far, "depth": np.round(share * 65535).astype(np.uint16),
        "normals": np.round(scene.normals * 32767).astype(np.int16), "labels": scene.labels,
        "about": np.array(json.dumps(scene.about)),
    }  # fmt: skip
    atomic.write_with(target, lambda temporary: np.savez_compressed(temporary, **arrays))


def load(source: Path) -> Scene:
    """Read what `save` wrote."""
    with np.load(source) as arrays:
        near, far = arrays["near"], arrays["far"]
        depth = 1 / (arrays["depth"] / 65535 * (1 / near - 1 / far) + 1 / far)
        return Scene(
            picture=arrays["picture"], depth=depth.astype(np.float32),
            normals=(arrays["normals"] / 32767).astype(np.float32), labels=arrays["labels"],
            about=json.loads(str(arrays["about"])),
        )  # fmt: skip
