"""Figures are those of the literature: counted by hand, or proven against scikit-image."""

import numpy as np
import pytest

from bridle.errors import HintError
from bridle.evaluate.fidelity import edge_f1, match_edges, ssim


def edges(*pixels: tuple[int, int]) -> np.ndarray:
    image = np.zeros((16, 16), np.uint8)
    for y, x in pixels:
        image[y, x] = 255
    return image


def slow_f1(reference: np.ndarray, output: np.ndarray, tolerance_px: int) -> float:
    """The definition, pixel by pixel."""
    wanted, drawn = np.argwhere(reference), np.argwhere(output)
    distance = np.sqrt(((wanted[:, None] - drawn[None]) ** 2).sum(-1))
    recall = (distance.min(axis=1) <= tolerance_px).mean()
    precision = (distance.min(axis=0) <= tolerance_px).mean()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("tolerance_px", [0, 1, 2, 3])
def test_f1_is_that_of_the_definition(tolerance_px: int) -> None:
    rng = np.random.default_rng(0)
    reference, output = (np.uint8(255) * (rng.random((2, 40, 30)) < 0.1)).astype(np.uint8)
    expected = slow_f1(reference, output, tolerance_px)
    assert 0 < expected < 1
    assert edge_f1(reference, output, tolerance_px) == pytest.approx(expected, abs=1e-12)


def test_tolerance_forgives_one_pixel_but_not_its_diagonal() -> None:
    assert edge_f1(edges((5, 5)), edges((5, 6)), 0) == 0.0
    assert edge_f1(edges((5, 5)), edges((5, 6)), 1) == 1.0
    assert edge_f1(edges((5, 5)), edges((6, 6)), 1) == 0.0


def test_empty_maps_agree_only_with_each_other() -> None:
    empty, one = edges(), edges((3, 3))
    assert (edge_f1(empty, empty), edge_f1(empty, one), edge_f1(one, empty)) == (1.0, 0.0, 0.0)


def test_channels_are_compared_apart() -> None:
    left, right = np.stack([edges((5, 5)), edges()], -1), np.stack([edges(), edges((5, 5))], -1)
    assert edge_f1(left, left) == 1.0
    assert edge_f1(left, right) == 0.0


def test_every_edge_is_hit_missed_or_extra() -> None:
    match = match_edges(edges((2, 2), (9, 9)), edges((2, 3), (13, 4)))
    assert np.argwhere(match.hit).tolist() == [[2, 2]]
    assert np.argwhere(match.missed).tolist() == [[9, 9]]
    assert np.argwhere(match.extra).tolist() == [[13, 4]]


@pytest.mark.parametrize("shape", [(64, 48), (33, 40, 3), (20, 11, 1)])
def test_ssim_equals_scikit_image(shape: tuple[int, ...]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 256, shape, np.uint8)
    output = np.clip(reference + rng.normal(0, 60, shape), 0, 255).astype(np.uint8)
    expected = metrics.structural_similarity(
        reference,
        output,
        gaussian_weights=True,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1 if len(shape) == 3 else None,
    )
    assert 0.1 < expected < 0.95
    assert ssim(reference, output) == pytest.approx(expected, abs=1e-9)
    assert ssim(reference, reference) == pytest.approx(1.0)


def test_soft_maps_have_no_f1() -> None:
    soft = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with pytest.raises(HintError, match="binary"):
        edge_f1(soft, soft)


def test_maps_of_other_size_are_refused() -> None:
    with pytest.raises(HintError, match=r"\[16, 16\]"):
        edge_f1(np.zeros((8, 8), np.uint8), edges())
    with pytest.raises(HintError, match="11"):
        ssim(np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8))
