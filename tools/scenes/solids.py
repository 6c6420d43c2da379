"""The things of a plan as triangles in one world, ready to be framed and rendered.

World units are the things' common radius; they stand around the origin on y = 0, and their wall is behind them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from draws import Plan, Thing
from library import Model
from obj import Material, Mesh, areas
from surfaces import Surface

BODY_SHARE = 0.6  # of the surface takes the new colour: the largest parts, until this much is covered
BODY_ALIKE = 0.08  # parts whose colour is this near to the body's largest part belong to it
GAP = 0.12  # between two things, in units of the smaller one's width
TILES = 1.2  # pattern tiles over a thing's largest side


@dataclass(frozen=True, kw_only=True)
class Part:
    """Triangles of one surface. positions, normals: [F, 3, 3]; uv: [F, 3, 2]. Either `surface` or `material` is set."""

    thing: int
    positions: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    surface: Surface | None
    material: Material
    textures: Path


def load_mesh(folder: Path) -> Mesh:
    """Read what `catalogue.save_model` wrote."""
    with np.load(folder / "mesh.npz") as arrays:
        rows = json.loads(str(arrays["materials"]))
        return Mesh(
            positions=arrays["positions"], normals=arrays["normals"].astype(np.float32), uv=arrays["uv"],
            material=arrays["material"],
            materials=[Material(**{**row, "colour": tuple(row["colour"])}) for row in rows],
        )  # fmt: skip


def body_of(mesh: Mesh) -> np.ndarray:
    """Which materials make up the thing's body, [M] bool: what a new colour is painted on."""
    area = np.bincount(mesh.material, areas(mesh.positions), len(mesh.materials))
    solid = np.array([material.opacity > 0.9 for material in mesh.materials])
    body = np.zeros(len(area), bool)
    for index in np.argsort(-area * solid):
        if area[body].sum() < BODY_SHARE * area.sum() and solid[index]:
            body[index] = True
    largest = np.array(mesh.materials[int(np.argmax(area * solid))].colour)
    for index, material in enumerate(mesh.materials):
        alike = material.texture is None and np.abs(np.array(material.colour) - largest).max() < BODY_ALIKE
        body[index] |= bool(solid[index] and alike)
    return body


def box_uv(positions: np.ndarray, tile: float) -> np.ndarray:
    """Texture coordinates by each triangle's main direction: [F, 3, 3] positions to [F, 3, 2]."""
    cross = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    axis = np.abs(cross).argmax(1)
    first, second = np.array([2, 0, 0])[axis], np.array([1, 2, 1])[axis]
    pick = np.arange(len(positions))[:, None], np.arange(3)[None]
    flat = np.stack([positions[(*pick, first[:, None])], positions[(*pick, second[:, None])]], -1) / tile
    long = np.ptp(flat.reshape(-1, 2), 0)
    return flat if long[0] >= long[1] else flat[..., ::-1]  # the grain follows the longer side


def place(plan: Plan, folder: Path) -> list[Part]:
    """All parts of a plan's things, in world units."""
    parts: list[Part] = []
    left = 0.0
    for index, thing in enumerate(plan.things):
        mesh = _turned(load_mesh(folder / thing.model.key.replace("/", "-")), thing.yaw_deg)
        low, high = mesh.positions.min((0, 1)), mesh.positions.max((0, 1))
        move = np.array([left - low[0], 0.0, -(low[2] + high[2]) / 2], np.float32)
        left += (high[0] - low[0]) * (1 + GAP)
        parts += _split(replace(mesh, positions=mesh.positions + move), index, thing, folder)
    points = np.concatenate([part.positions.reshape(-1, 3) for part in parts])
    low, high = points.min(0), points.max(0)
    radius = float(np.linalg.norm(high - low)) / 2
    move = -np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2]) + [0, plan.lift * 2 * radius, 0]
    return [replace(part, positions=((part.positions + move) / radius).astype(np.float32)) for part in parts]


def _turned(mesh: Mesh, yaw_deg: float) -> Mesh:
    yaw = np.radians(yaw_deg)
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]], np.float32)
    return replace(mesh, positions=mesh.positions @ turn, normals=mesh.normals @ turn)


def _split(mesh: Mesh, index: int, thing: Thing, folder: Path) -> list[Part]:
    body = body_of(mesh) if thing.surface else np.zeros(len(mesh.materials), bool)
    tile = max(thing.model.size_m) / TILES
    parts = []
    for number in np.unique(mesh.material):
        some = mesh.material == number
        painted = bool(body[number])
        parts.append(
            Part(
                thing=index,
                positions=mesh.positions[some],
                normals=mesh.normals[some],
                uv=box_uv(mesh.positions[some], tile) if painted else mesh.uv[some],
                surface=thing.surface if painted else None,
                material=mesh.materials[number],
                textures=folder / thing.model.key.replace("/", "-"),
            )
        )
    return parts


def own_material(model: Model, mesh: Mesh) -> str:
    """The word for what most of a thing's own surface is made of, by its modeller's names; "" where they do not say."""
    words = {
        "wooden": ("wood", "oak", "pine", "walnut"),
        "leather": ("leather",),
        "metal": ("metal", "steel", "chrome"),
    }
    area = np.bincount(mesh.material, areas(mesh.positions), len(mesh.materials))
    for word, parts in words.items():
        called = np.array([any(part in (m.name + (m.texture or "")).lower() for part in parts) for m in mesh.materials])
        if model.kind in ("seat", "wood") and area[called].sum() > 0.6 * area.sum():
            return word
    return ""
