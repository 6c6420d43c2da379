"""An OBJ model as triangles: positions, smooth normals, texture coordinates and the material of each.

In: the text of an OBJ file and of its MTL libraries. Out: `Mesh`, with every corner of every triangle spelt out, which
is what the renderer wants and what lets a surface get new texture coordinates without splitting anything.
"""

import re
from dataclasses import dataclass, field

import numpy as np
from polygon import triangulate

CREASE_DEG = 40.0  # faces that meet at less than this look rounded, others keep their edge
UV_LIMIT = 1e4  # two models have coordinates of 3e9 on a few triangles; those show one texel
WHITE = (0.8, 0.8, 0.8)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an MTL file says of one surface. `colour` as displayed (sRGB) in [0, 1]; `opacity` in [0, 1]."""

    name: str
    colour: tuple[float, float, float] = WHITE
    specular: float = 0.0
    shininess: float = 10.0
    opacity: float = 1.0
    texture: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """F triangles. positions, normals: [F, 3, 3]; uv: [F, 3, 2], v downwards; material: [F], indices of `materials`."""

    positions: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    materials: list[Material] = field(default_factory=list)


def read_materials(text: str) -> dict[str, Material]:
    """The materials of an MTL library by name."""
    found: dict[str, dict] = {}
    current: dict = {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            current = found.setdefault(rest.strip(), {"name": rest.strip()})
        elif key == "Kd":
            current["colour"] = tuple(float(number) for number in rest.split()[:3])
        elif key == "Ks":
            current["specular"] = max(float(number) for number in rest.split()[:3])
        elif key == "Ns":
            current["shininess"] = float(rest)
        elif key == "d":
            current["opacity"] = float(rest.split()[-1])
        elif key == "map_Kd":
            current["texture"] = rest.strip()
    return {name: Material(**values) for name, values in found.items()}


def read_mesh(text: str, library: dict[str, Material]) -> Mesh:
    """Parse an OBJ text. Faces of more corners are cut up; lines and points are left out."""
    vertices: list[list[float]] = []
    coordinates: list[list[float]] = []
    corners: list[tuple[int, int]] = []  # vertex and coordinate of three corners a triangle; -1: no coordinate
    faces: list[int] = []
    names: dict[str, int] = {}
    material = 0
    for line in text.splitlines():
        if line.startswith("v "):
            vertices.append([float(word) for word in line.split()[1:4]])
        elif line.startswith("vt "):
            coordinates.append([float(word) for word in line.split()[1:3]])
        elif line.startswith("usemtl"):
            material = names.setdefault(line[6:].strip(), len(names))
        elif line.startswith("f "):
            if not names:
                names[""] = 0
            polygon = [_corner(word, len(vertices), len(coordinates)) for word in line.split()[1:]]
            for triangle in _cut([vertices[vertex] for vertex, _ in polygon]):
                corners += [polygon[corner] for corner in triangle]
                faces.append(material)
    return _assemble(vertices, coordinates, corners, faces, [library.get(n, Material(name=n)) for n in names])


def _cut(points: list[list[float]]) -> list[tuple[int, int, int]]:
    if len(points) > 4:
        return triangulate(np.array(points))
    return [(0, last - 1, last) for last in range(2, len(points))]  # nearly all, so no time is spent on them


def _corner(word: str, vertices: int, coordinates: int) -> tuple[int, int]:
    numbers = re.split("/", word)
    vertex = int(numbers[0])
    coordinate = int(numbers[1]) if len(numbers) > 1 and numbers[1] else 0
    return (
        vertex - 1 if vertex > 0 else vertices + vertex,
        coordinate - 1 if coordinate > 0 else coordinates + coordinate if coordinate < 0 else -1,
    )


def _assemble(vertices: list, coordinates: list, corners: list, faces: list, materials: list[Material]) -> Mesh:
    index = np.array(corners, np.int64).reshape(-1, 3, 2)
    points = np.array(vertices, np.float64)
    uv = np.array([*coordinates, [0.0, 0.0]], np.float64)[index[..., 1]]  # -1 takes the last one
    uv[..., 1] = 1 - uv[..., 1]
    uv[(np.abs(uv) > UV_LIMIT).any((1, 2))] = 0
    positions = points[index[..., 0]]
    cross = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    real = np.linalg.norm(cross, axis=1) > 1e-14  # needles without an area have no normal
    real &= _first_of_each(positions)
    index, positions, cross, uv = index[real], positions[real], cross[real], uv[real]
    return Mesh(
        positions=positions.astype(np.float32),
        normals=smooth_normals(index[..., 0], cross).astype(np.float32),
        uv=uv.astype(np.float32),
        material=np.array(faces, np.int16)[real],
        materials=materials,
    )


def _first_of_each(positions: np.ndarray) -> np.ndarray:
    """Which triangles are the first at their place, [F] bool: a second one would flicker through the first."""
    size = max(float(np.ptp(positions.reshape(-1, 3), 0).max()), 1e-9)
    corners = np.round(positions / size * 1e5).astype(np.int64) @ np.array([1, 1 << 20, 1 << 40])
    _, first = np.unique(np.sort(corners, 1), axis=0, return_index=True)
    return np.isin(np.arange(len(positions)), first)


def smooth_normals(vertex: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Normals of every corner: the mean, weighed by area, of the faces around its vertex within the crease angle.

    Args:
        vertex: [F, 3], the vertex of each corner.
        cross: [F, 3], each face's normal, as long as twice its area.

    Returns: [F, 3, 3], unit length.
    """
    unit = cross / np.linalg.norm(cross, axis=1, keepdims=True)
    order = np.argsort(vertex.ravel(), kind="stable")
    face = order // 3
    _, first, count = np.unique(vertex.ravel()[order], return_index=True, return_counts=True)
    total = np.zeros((len(order), 3))
    start, size = np.repeat(first, count), np.repeat(count, count)
    for step in range(int(count.max(initial=0))):  # the step-th neighbour of every corner that has that many
        some = np.flatnonzero(step < size)
        other = face[start[some] + step]
        near = np.einsum("ij,ij->i", unit[face[some]], unit[other]) > np.cos(np.radians(CREASE_DEG))
        total[some[near]] += cross[other[near]]
    normals = np.empty_like(total)
    normals[order] = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-30)
    return normals.reshape(-1, 3, 3)


def areas(positions: np.ndarray) -> np.ndarray:
    """Area of each triangle. positions: [F, 3, 3]; returns [F]."""
    cross = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    return np.linalg.norm(cross, axis=1) / 2
