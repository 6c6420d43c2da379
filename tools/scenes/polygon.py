"""A polygon cut into triangles: a fan where it is convex, ears where it is not (railings are one face with holes)."""

import numpy as np


def triangulate(points: np.ndarray) -> list[tuple[int, int, int]]:
    """Corner indices of N - 2 triangles. points: [N, 3], flat, in order; holes may hang on a doubled edge."""
    count = len(points)
    following = np.roll(points, -1, 0)
    normal = np.cross(points, following).sum(0)  # Newell: right for every flat polygon
    axis = int(np.abs(normal).argmax())
    flat = np.delete(points, axis, 1) * ([1, 1] if (normal[axis] > 0) ^ (axis == 1) else [1, -1])
    turns = _turn(np.roll(flat, 1, 0), flat, np.roll(flat, -1, 0))
    if (turns >= -1e-12).all():
        return [(0, last - 1, last) for last in range(2, count)]
    return _clip_ears(flat)


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Twice the signed area of triangles abc, [...]: positive where they turn left."""
    first, second = b - a, c - b
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def _clip_ears(flat: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut corners that turn left and hold no other corner, until a triangle is left."""
    ring, ears = list(range(len(flat))), []
    while len(ring) > 3:
        place = next((p for p in range(len(ring)) if _is_ear(flat, ring, p)), 0)  # a tangled one is cut anywhere
        ears.append((ring[place - 1], ring[place], ring[(place + 1) % len(ring)]))
        del ring[place]
    return [*ears, (ring[0], ring[1], ring[2])]


def _is_ear(flat: np.ndarray, ring: list[int], place: int) -> bool:
    a, b, c = flat[ring[place - 1]], flat[ring[place]], flat[ring[(place + 1) % len(ring)]]
    if _turn(a, b, c) <= 1e-14:
        return False
    others = flat[ring]
    same = (others[:, None] == np.stack([a, b, c])).all(-1).any(1)  # corners of a doubled edge do not count
    inside = (_turn(a, b, others) >= 0) & (_turn(b, c, others) >= 0) & (_turn(c, a, others) >= 0)
    return not (inside & ~same).any()
