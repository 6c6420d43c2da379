"""A plan as a Mitsuba scene: things, floor, wall, light and camera; its picture in light values, and its exact maps."""

from dataclasses import dataclass
from typing import Any

import drjit as dr
import looks
import mitsuba as mi
import numpy as np
import surfaces
from draws import Plan, generator
from framing import Camera, frame
from maps import FIRST_THING, FLOOR, WALL, Guides, Maps
from solids import Part
from surfaces import Surface

FAR = 80.0  # size of floor and wall, in radii
FLOOR_TILE, WALL_TILE = 2.2, 0.7
LIGHT_SHAPE = (64, 128)
SEE_THROUGH = 0.5  # opacity under which the maps show what is behind
GUIDE_RAYS = 4  # along each side of a pixel
LAYERS = 12  # of transparent surfaces that the maps look through


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A scene ready to render."""

    scene: Any
    camera: Camera
    labels: dict[int, int]


def build(plan: Plan, parts: list[Part], size_px: int) -> Stage:
    """Put everything in place. Raises what Mitsuba raises for broken geometry."""
    points = np.concatenate([part.positions.reshape(-1, 3) for part in parts]).astype(np.float64)
    camera = frame(points, plan.azimuth_deg, plan.elevation_deg, plan.view_deg, plan.fill, plan.shift)
    entries: dict[str, Any] = {
        "type": "scene",
        "light": {"type": "envmap", "bitmap": mi.Bitmap(draw_light(plan))},
        "sensor": _sensor(camera, size_px),
        "floor": _plane(_floor_turn(), FLOOR_TILE, plan.floor, generator(plan.seed, plan.number, plan.attempt, 2)),
        "wall": _plane(
            _wall_turn(plan, points), WALL_TILE, plan.wall, generator(plan.seed, plan.number, plan.attempt, 3)
        ),
    }
    patterns = {
        index: surfaces.texture(thing.surface, generator(plan.seed, plan.number, plan.attempt, 4 + index))
        for index, thing in enumerate(plan.things)
        if thing.surface
    }
    for number, part in enumerate(parts):
        entries[f"part{number}_{part.thing}"] = _mesh(f"part{number}_{part.thing}", part, patterns.get(part.thing))
    scene = mi.load_dict(entries)
    return Stage(scene=scene, camera=camera, labels={_number(shape): _label(shape.id()) for shape in scene.shapes()})


def _number(shape: Any) -> int:
    return int(dr.reinterpret_array(mi.UInt32, mi.ShapePtr(shape))[0])


def _label(name: str) -> int:
    return {"wall": WALL, "floor": FLOOR}.get(name) if name in ("wall", "floor") else FIRST_THING + int(name[-1])


def _sensor(camera: Camera, size_px: int) -> dict[str, Any]:
    return {
        "type": "perspective",
        "fov": camera.view_deg,
        "near_clip": 1e-3,
        "to_world": mi.ScalarTransform4f().look_at(
            list(camera.origin), list(camera.origin + camera.forward), list(camera.up)
        ),
        "film": {
            "type": "hdrfilm", "width": size_px, "height": size_px, "pixel_format": "rgb",
            "rfilter": {"type": "box"},  # the guides below are means over pixels too
        },
        "sampler": {"type": "independent"},
    }  # fmt: skip


def draw_light(plan: Plan) -> np.ndarray:
    """The surroundings as a source of light: a bright sky and one soft lamp in front. Returns [H, 2 H, 3] float32."""
    v, u = (np.mgrid[: LIGHT_SHAPE[0], : LIGHT_SHAPE[1]] + 0.5) / np.array(LIGHT_SHAPE)[:, None, None]
    azimuth, polar = 2 * np.pi * u, np.pi * v
    directions = np.stack([np.sin(azimuth) * np.sin(polar), np.cos(polar), -np.cos(azimuth) * np.sin(polar)], -1)
    towards, height = np.radians([plan.light_azimuth_deg, plan.light_elevation_deg])
    lamp = np.array([np.sin(towards) * np.cos(height), np.sin(height), np.cos(towards) * np.cos(height)])
    lobe = np.exp(plan.light_sharpness * (directions @ lamp - 1)) * plan.light_sharpness
    sky = 0.38 + 0.22 * directions[..., 1] + 0.2 * directions[..., 2]
    warm = np.array([1 + plan.warmth, 1.0, 1 - plan.warmth])
    light = np.maximum(sky, 0.1)[..., None] * (2 - warm) + plan.light_power * lobe[..., None] * warm
    return light.astype(np.float32)


def _floor_turn() -> Any:
    return mi.ScalarTransform4f().rotate([1, 0, 0], -90)


def _wall_turn(plan: Plan, points: np.ndarray) -> Any:
    """The wall's place: behind every point, along its own normal."""
    yaw = np.radians(plan.wall_yaw_deg)
    normal = np.array([np.sin(yaw), 0.0, np.cos(yaw)])
    offset = float((points @ normal).min()) - plan.wall_gap - 1e-3
    return mi.ScalarTransform4f().translate(list(normal * offset)).rotate([0, 1, 0], plan.wall_yaw_deg)


def _plane(turn: Any, tile: float, surface: Surface, rng: np.random.Generator) -> dict[str, Any]:
    repeats = 2 * FAR / tile
    return {
        "type": "rectangle",
        "to_world": turn.scale(FAR),
        "bsdf": looks.painted(surface, surfaces.texture(surface, rng), repeats),
    }


def _mesh(name: str, part: Part, pattern: np.ndarray | None) -> Any:
    properties = mi.Properties()
    properties["bsdf"] = mi.load_dict(looks.painted(part.surface, pattern) if part.surface else looks.own(part))
    corners = 3 * len(part.positions)
    mesh = mi.Mesh(
        name, corners, len(part.positions), props=properties, has_vertex_normals=True, has_vertex_texcoords=True
    )
    values = mi.traverse(mesh)
    values["vertex_positions"] = part.positions.ravel()
    values["vertex_normals"] = np.ascontiguousarray(part.normals, np.float32).ravel()
    values["vertex_texcoords"] = np.ascontiguousarray(part.uv, np.float32).ravel()
    values["faces"] = np.arange(corners, dtype=np.uint32)
    values.update()
    return mesh


def trace(stage: Stage, samples: int, seed: int) -> np.ndarray:
    """The picture in light values, [H, W, 3] float32."""
    integrator = mi.load_dict({"type": "path", "max_depth": 6})
    return np.array(mi.render(stage.scene, integrator=integrator, spp=samples, seed=seed))


def look(stage: Stage) -> Maps:
    """Exact maps: one ray through the centre of each pixel, on through what is transparent."""
    depth, normals, labels, albedo = (values[..., 0] for values in _look(stage, 1))
    return Maps(depth=depth, normals=np.moveaxis(normals, 0, -1), labels=labels, albedo=np.moveaxis(albedo, 0, -1))


def guides(stage: Stage) -> Guides:
    """The same means over each pixel, from a grid of rays, as the picture's own pixels are means."""
    depth, normals, _, albedo = (values.mean(-1) for values in _look(stage, GUIDE_RAYS))
    return Guides(depth=depth, normals=np.moveaxis(normals, 0, -1), albedo=np.moveaxis(albedo, 0, -1))


def _look(stage: Stage, rays: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Depth [H, W, K], normals [3, H, W, K], labels [H, W, K] and albedo [3, H, W, K] of K = rays² rays a pixel."""
    sensor = stage.scene.sensors()[0]
    size = int(sensor.film().size()[0])
    fine = size * rays
    index = dr.arange(mi.UInt32, fine * fine)
    place = mi.Point2f((index % fine + 0.5) / fine, (index // fine + 0.5) / fine)
    ray, _ = sensor.sample_ray(0.0, 0.5, place, mi.Point2f(0.5))
    hit = stage.scene.ray_intersect(ray)
    for _ in range(LAYERS):
        clear = hit.is_valid() & (mi.luminance(hit.bsdf().eval_null_transmission(hit)) > 1 - SEE_THROUGH)
        if not dr.any(clear):
            break
        behind = stage.scene.ray_intersect(hit.spawn_ray(ray.d), clear)
        hit = dr.select(clear, behind, hit)
    return tuple(_by_pixel(values, size, rays) for values in _read(stage, hit, ray))


def _by_pixel(values: np.ndarray, size: int, rays: int) -> np.ndarray:
    """[..., (size rays)²] to [..., size, size, rays²]."""
    grid = values.reshape(*values.shape[:-1], size, rays, size, rays)
    return np.swapaxes(grid, -3, -2).reshape(*values.shape[:-1], size, size, rays * rays)


def _read(stage: Stage, hit: Any, ray: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    camera = stage.camera
    normals = np.array(hit.sh_frame.n)
    normals = normals * -np.sign(np.sum(normals * np.array(ray.d), 0) + 1e-12)
    axes = np.stack([camera.right, camera.up, -camera.forward])
    numbers, places = np.unique(np.array(dr.reinterpret_array(mi.UInt32, hit.shape)), return_inverse=True)
    return (
        (camera.forward @ (np.array(hit.p) - camera.origin[:, None])).astype(np.float32),
        (axes @ normals).astype(np.float32),
        np.array([stage.labels[int(number)] for number in numbers], np.uint8)[places],
        np.array(hit.bsdf().eval_diffuse_reflectance(hit)).astype(np.float32),
    )
