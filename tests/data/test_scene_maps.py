"""The estimators of depth, normals and classes: what is known of a scene they find, in pictures of any size."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from bridle.data.annotate import get_annotator
from bridle.data.annotate.scene_maps import WEIGHTS, load_network
from bridle.data.palette import SEGMENTATION
from bridle.data.scenes import PACKED, read_facts

PALETTE = np.array(list(SEGMENTATION.values()), np.uint8)
SHOWN = 16


def unpack(zip_name: str, number: int) -> np.ndarray:
    with zipfile.ZipFile(PACKED / f"{zip_name}.zip") as archive:
        return np.asarray(Image.open(io.BytesIO(archive.read(f"{number:06}.webp"))).convert("RGB"))


@pytest.fixture(scope="module")
def numbers() -> list[int]:
    """Scenes of objects that the network was not trained on."""
    return [scene["number"] for scene in read_facts() if scene["split"] == "held_out"][:SHOWN]


def test_depth_of_scenes_never_seen_is_near_the_exact_one(numbers: list[int]) -> None:
    errors = []
    for number in numbers:
        found, exact = get_annotator("depth")(unpack("pictures", number)), unpack("depth", number)
        assert (found == found[..., :1]).all()
        errors.append(np.sqrt(np.mean((found.astype(float) - exact) ** 2)))
    assert np.mean(errors) < 25  # another scene's map: 54


def test_normals_of_scenes_never_seen_are_near_the_exact_ones(numbers: list[int]) -> None:
    angles = []
    for number in numbers:
        found, exact = get_annotator("normals")(unpack("pictures", number)), unpack("normals", number)
        a, b = found / 127.5 - 1, exact / 127.5 - 1
        assert np.linalg.norm(a, axis=2) == pytest.approx(1, abs=0.02)
        cosine = (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
        angles.append(np.rad2deg(np.arccos(cosine.clip(-1, 1))).mean())
    assert np.mean(angles) < 16  # another scene's map: 32


def test_classes_of_scenes_never_seen_are_mostly_right(numbers: list[int]) -> None:
    shares = []
    for number in numbers:
        found = get_annotator("segmentation")(unpack("pictures", number))
        exact = PALETTE[unpack("labels", number)[..., 0]]
        assert {tuple(colour) for colour in found.reshape(-1, 3).tolist()} <= set(SEGMENTATION.values())
        shares.append((found == exact).all(axis=2).mean())
    assert np.mean(shares) > 0.9


@pytest.mark.parametrize("name", ["depth", "normals", "segmentation"])
@pytest.mark.parametrize("size", [(384, 512), (50, 40)])
def test_pictures_of_other_sizes_have_the_same_map(numbers: list[int], name: str, size: tuple[int, int]) -> None:
    height, width = size
    picture, annotator = unpack("pictures", numbers[0]), get_annotator(name)
    resized = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    expected = cv2.resize(annotator(picture), (width, height), interpolation=cv2.INTER_NEAREST)
    found = annotator(resized)
    assert found.shape == (height, width, 3)
    assert np.abs(found.astype(float) - expected).mean() < 20


@pytest.mark.parametrize("size", [(9, 300), (1, 1)])
def test_the_narrowest_pictures_have_maps_too(size: tuple[int, int]) -> None:
    assert get_annotator("depth")(np.zeros((*size, 3), np.uint8)).shape == (*size, 3)


def test_the_network_is_read_once_and_by_no_other_annotator() -> None:
    assert load_network() is load_network()
    code = "import sys; from bridle.data.annotate import get_annotator; get_annotator('canny'); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_weights_are_small_and_say_how_they_were_made() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    with safe_open(WEIGHTS, "np") as file:
        about = file.metadata()
    assert {"what", "made_by", "data", "licence"} <= set(about)
    assert json.loads(about["held_out"])["pictures"] > 100


def test_nothing_here_unpickles() -> None:
    folder = Path(WEIGHTS).parent
    assert not any("torch.load" in path.read_text() or "pickle" in path.read_text() for path in folder.glob("*.py"))
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".ckpt")]
