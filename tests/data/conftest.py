"""A small data set, and what is written to make one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WritePicture = Callable[..., Path]


def draw(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    """[height, width, 3] uint8 noise: no two crops or mirrors of it are equal."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def write_picture(tmp_path: Path) -> WritePicture:
    def write(name: str, seed: int = 0, width: int = 24, height: int = 16) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(seed, width, height)).save(path)
        return path

    return write
