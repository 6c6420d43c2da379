"""Rendered scenes: what must hold whatever is drawn. Nothing here renders, so Mitsuba is not needed."""

import io
import json
import zipfile
from dataclasses import replace

import describe
import develop
import draws
import framing
import library
import names
import numpy as np
import obj
import pack
import polygon
import pytest
import scene_file
from maps import Guides
from PIL import Image

SQUARE_WITH_HOLE = [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)]
CUBE = "".join(f"v {x} {y} {z}\n" for x in (0, 1) for y in (0, 1) for z in (0, 1)) + (
    "f 1 2 4 3\nf 5 7 8 6\nf 1 5 6 2\nf 3 4 8 7\nf 1 3 7 5\nf 2 6 8 4\n"
)


def models():
    """Forty models of ten names, a quarter of them CC0."""
    return library.hold_out([
        library.Model(
            key=f"some/{n}", name=f"thing {n % 10}", kind=("seat", "own", "wood")[n % 3], mount="floor",
            licence=library.CC0 if n % 4 == 0 else library.CC_BY, creator="A", title="T",
            size_m=(1.0, 0.1 + n / 40, 1.0),
        )
        for n in range(40)
    ])  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [1, -1])
def test_a_face_with_a_hole_keeps_its_hole(axis, order):
    points = np.insert(np.array(SQUARE_WITH_HOLE, float), axis, 0.5, axis=1)[::order]
    triangles = points[np.array(polygon.triangulate(points))]
    assert obj.areas(triangles).sum() == pytest.approx(12)


def test_edges_of_a_cube_stay_sharp_and_those_of_a_cylinder_round():
    cube = obj.read_mesh(CUBE + "f 1 2 4 3\n", {})
    assert len(cube.positions) == 12  # the face that is there twice counts once
    assert np.abs(cube.normals).max(-1) == pytest.approx(1)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    ring = "".join(f"v {np.cos(a)} {y} {np.sin(a)}\n" for a in angles for y in (0, 1))
    sides = "".join(f"f {2 * n + 1} {2 * n + 2} {(2 * n + 3) % 32 + 1} {(2 * n + 2) % 32 + 1}\n" for n in range(16))
    cylinder = obj.read_mesh(ring + sides, {})
    outwards = cylinder.positions * [1, 0, 1]
    # 22.5 degrees between two sides: a flat side's normal would be 11 degrees off at its corners
    assert np.abs((cylinder.normals * outwards).sum(-1)).min() > np.cos(np.radians(5))


@pytest.mark.parametrize("elevation_deg", [8.0, 60.0])
def test_the_camera_fills_the_wanted_part_of_the_frame(elevation_deg):
    points = np.random.default_rng(0).normal(size=(200, 3)) * [1, 0.3, 2]
    camera = framing.frame(points, 20.0, elevation_deg, 35.0, 0.7, (0.1, -0.05))
    seen = camera.project(points)
    low, high = seen.min(0), seen.max(0)
    assert (high - low).max() / 2 == pytest.approx(0.7, abs=0.01)
    assert (low + high) / 2 == pytest.approx([0.1, -0.05], abs=0.01)


def test_a_scene_follows_from_its_number_alone():
    first = draws.draw_plan(models(), "all", 0, 17, 0)
    draws.draw_plan(models(), "all", 0, 18, 0)
    assert draws.draw_plan(models(), "all", 0, 17, 0) == first
    assert draws.draw_plan(models(), "all", 0, 18, 0).things != first.things


def test_training_never_sees_a_held_out_object_and_cc0_scenes_only_cc0():
    for number in range(200):
        plan = draws.draw_plan(models(), "cc0", 3, number, number % 3)
        assert {thing.model.held_out for thing in plan.things} == {plan.held_out}
        assert {thing.model.licence for thing in plan.things} == {library.CC0}


def test_every_held_out_object_has_a_name_that_training_knows():
    split = models()
    known = {model.name for model in split if not model.held_out}
    held_out = [model for model in split if model.held_out]
    assert len(held_out) >= 10
    assert {model.name for model in held_out} <= known
    assert [m.held_out for m in library.hold_out(split[::-1])] == [m.held_out for m in split[::-1]]


def test_denoising_smooths_the_light_and_leaves_the_surfaces():
    albedo = np.full((32, 32, 3), 0.2)
    albedo[::2, :, 0] = 0.8  # stripes of one pixel, which any blur would grey
    flat = Guides(albedo=albedo, normals=np.ones((32, 32, 3)) / 3**0.5, depth=np.ones((32, 32)))
    noise = np.random.default_rng(0).normal(1, 0.15, (32, 32, 1))
    error = np.abs(develop.denoise(albedo * noise, flat) / albedo - 1).mean()
    assert error < 0.25 * np.abs(noise - 1).mean()


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"name": "chair", "colour": "blue", "material": "plastic"}, "a blue plastic chair"),
        ({"name": "pair of scissors", "colour": "red", "material": ""}, "a pair of red scissors"),
        ({"name": "umbrella", "colour": "", "material": ""}, "an umbrella"),
    ],
)
def test_things_are_called_as_people_call_them(fact, said):
    assert describe.phrase(fact) == said


def test_sizes_are_no_part_of_a_name():
    assert names.plain_name("some/model", "Bed 140x190") == "bed"
    assert names.plain_name("cc0/caballito", "Rocking horse 2") == "rocking horse"


def test_a_pack_gives_back_what_was_rendered(tmp_path):
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(16, 16, 3)).astype(np.float32)
    scene = scene_file.Scene(
        picture=np.full((16, 16, 3), 90, np.uint8), depth=rng.uniform(2, 9, (16, 16)).astype(np.float32),
        normals=normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        labels=rng.integers(0, 4, (16, 16), np.uint8), about={"number": 7, "caption": "a cup"},
    )  # fmt: skip
    scene_file.save(scene_file.path(tmp_path, 7), scene)
    scene_file.save(scene_file.path(tmp_path, 8), replace(scene, about={"number": 8, "caption": "a mug"}))
    pack.pack(tmp_path, tmp_path / "packed", maps=True)

    def opened(name):
        with zipfile.ZipFile(tmp_path / "packed" / f"{name}.zip") as archive:
            return np.asarray(Image.open(io.BytesIO(archive.read("000007.webp"))).convert("RGB"))

    with zipfile.ZipFile(tmp_path / "packed" / "pictures.zip") as archive:
        facts = [json.loads(line) for line in archive.read("scenes.jsonl").decode().splitlines()]
    assert [fact["caption"] for fact in facts] == ["a cup", "a mug"]
    near, far = facts[0]["near"], facts[0]["far"]
    inverse = opened("depth")[..., 0] / 255 * (1 / near - 1 / far) + 1 / far
    assert np.abs(inverse - 1 / scene.depth).max() < 0.6 / 255 * (1 / near - 1 / far)
    assert np.abs(opened("normals") / 127.5 - 1 - scene.normals).max() < 0.6 / 127.5
    assert (opened("labels")[..., 0] == scene.labels).all()
    assert np.abs(opened("pictures").astype(int) - 90).max() <= 2
