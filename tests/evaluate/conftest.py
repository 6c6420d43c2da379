"""A held-out set of drawn shapes, a canny annotator, and generators that obey it or do not."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from bridle.evaluate import Evaluation, HeldOutPair, evaluate

SIZE_PX = 48


class Canny:
    name = "canny"
    channels = 1

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        assert rng is None, "measuring must not be random"
        return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 80, 160)[..., None]


class Grey:
    """A soft hint, for which F1 makes no sense; under the name of any condition."""

    def __init__(self, name: str = "grey", channels: int = 1) -> None:
        self.name, self.channels = name, channels

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        soft = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 2)[..., None]
        return np.repeat(soft, self.channels, axis=2)


def draw(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    for _ in range(3):
        x, y, radius = (int(value) for value in rng.integers((10, 10, 4), (38, 38, 10)))
        cv2.circle(image, (x, y), radius, tuple(int(value) for value in rng.integers(0, 160, 3)), -1)
    return image


class Generator:
    """Obeys a share of the hints wherever the control is on; otherwise draws something else. Remembers its calls."""

    def __init__(self, pairs: list[HeldOutPair], obeyed: float = 1.0) -> None:
        self.pairs = pairs
        self.obeyed = obeyed
        self.calls: list[tuple[list[int], float]] = []

    def __call__(
        self, hints: list[np.ndarray], captions: list[str], seeds: list[int], scale: float
    ) -> list[np.ndarray]:
        self.calls.append((seeds, scale))
        obeyed = round(self.obeyed * len(hints)) if scale else 0
        return [
            self.pairs[index].image if index < obeyed else draw(1000 * seed + index) for index, seed in enumerate(seeds)
        ]


def make_pairs(annotator: Canny | Grey, count: int = 8) -> list[HeldOutPair]:
    images = [draw(seed) for seed in range(count)]
    return [
        HeldOutPair(id=f"shapes/{index}", image=image, hint=annotator(image), caption=f"shapes {index}")
        for index, image in enumerate(images)
    ]


@pytest.fixture
def pairs() -> list[HeldOutPair]:
    """Eight pairs with canny hints."""
    return make_pairs(Canny(), 8)


@pytest.fixture
def canny() -> Canny:
    return Canny()


@pytest.fixture
def generator(pairs: list[HeldOutPair]) -> Generator:
    """Obeys every hint of `pairs`."""
    return Generator(pairs)


@pytest.fixture
def reconstruct() -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """A perfect autoencoder."""
    return list


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., Evaluation]:
    """Evaluates a generator that obeys the given share of hints: canny ones, soft ones, or those of a condition."""

    def run(obeyed: float = 1.0, count: int = 8, soft: bool = False, condition: str = "") -> Evaluation:
        annotator = Grey(condition, 3) if condition else Grey() if soft else Canny()
        pairs = make_pairs(annotator, count)
        return evaluate(pairs, annotator, Generator(pairs, obeyed), list, tmp_path, [1, 2], settings={"steps": 20})

    return run
