"""Scores against closed forms, brute force and pytorch-fid; their memory."""

import math
import resource
import zipfile

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score

from tests.helpers.images import gaussian, moments_of
from tinydm.scripts.common.errors import MetricError
from tinydm.scripts.metrics import inputs, scores


def test_frechet_equals_pytorch_fid():
    a, b = moments_of(gaussian(400, 48, 0)), moments_of(gaussian(300, 48, 1))
    expected = fid_score.calculate_frechet_distance(*a, *b)
    assert scores.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    assert scores.frechet_distance(*b, *a) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    rng = np.random.default_rng(2)
    m1, m2, s1, s2 = rng.normal(size=(4, 20))
    expected = ((m1 - m2) ** 2).sum() + ((abs(s1) - abs(s2)) ** 2).sum()
    found = scores.frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_frechet_of_scaled_and_shifted_copies():
    x = gaussian(100, 12, 3)
    mu, sigma = moments_of(x)
    expected = 12 * 0.25 + (2 - 1) ** 2 * np.trace(sigma)  # N(mu + 1/2, 4 S) against N(mu, S)
    assert scores.frechet_distance(mu, sigma, mu + 0.5, 4 * sigma) == pytest.approx(expected)


def test_frechet_with_fewer_images_than_features():
    x, y = gaussian(10, 64, 4), gaussian(14, 64, 5)
    a, b = (z - z.mean(0) for z in (x, y))
    nuclear = np.linalg.svd(a @ b.T / math.sqrt(9 * 13), compute_uv=False).sum()
    (m1, s1), (m2, s2) = moments_of(x), moments_of(y)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear
    assert scores.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)
    assert 0 <= scores.frechet_distance(m1, s1, m1, s1) < 1e-10


def test_frechet_of_constant_images_is_the_gap_of_the_means():
    zero = np.zeros((5, 5))
    assert scores.frechet_distance(np.zeros(5), zero, np.full(5, 2.0), zero) == 20


@pytest.mark.parametrize("bad", [np.full((3, 3), np.nan), np.diag([1.0, 1.0, -1.0]), -np.eye(3)])
def test_frechet_refuses_what_is_no_covariance(bad):
    with pytest.raises(MetricError, match="covariance"):
        scores.frechet_distance(np.zeros(3), bad, np.zeros(3), np.eye(3))


def test_moments_equal_numpy_for_any_batching():
    x = gaussian(53, 9, 6).astype(np.float32) + 1000
    moments = scores.Moments(9)
    for batch in torch.from_numpy(x).split(8):
        moments.update(batch)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_moments_refuse_nan_and_single_images():
    moments = scores.Moments(2)
    with pytest.raises(MetricError, match="NaN"):
        moments.update(torch.tensor([[1.0, math.nan]]))
    moments.update(torch.ones(1, 2))
    with pytest.raises(MetricError, match="at least 2"):
        moments.covariance  # noqa: B018


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """Inception score of classifier outputs (N, K)."""
    score = scores.InceptionScore(split_size)
    score.update(logits)
    return score.value


def test_inception_score_against_its_definition():
    logits = torch.randn(23, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.double().softmax(1)
    expected = []
    for part in p.split(10):
        kl = (part * (part.log() - part.mean(0).log())).sum(1)
        expected.append(math.exp(kl.mean()))
    assert inception_score(logits, 10) == pytest.approx(np.mean(expected), rel=1e-12)
    stream = scores.InceptionScore(10)
    for batch in logits.split(4):
        stream.update(batch)
    assert stream.splits == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_sure_and_unsure_classifiers():
    assert inception_score(1000 * torch.eye(8)) == pytest.approx(8)
    assert inception_score(torch.zeros(8, 8)) == pytest.approx(1)


def brute_precision_recall(ref: np.ndarray, gen: np.ndarray, k: int = 3) -> tuple[float, float]:
    def radii(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]

    d = np.linalg.norm(gen[:, None] - ref[None], axis=2)  # (M, N)
    return (d <= radii(ref)).any(1).mean(), (d <= radii(gen)[:, None]).any(0).mean()


@pytest.mark.parametrize("block", [scores.BLOCK_BYTES, 4 * 60 * 7])
def test_precision_recall_equals_brute_force(monkeypatch, block):
    monkeypatch.setattr(scores, "BLOCK_BYTES", block)
    rng = np.random.default_rng(7)
    ref = rng.normal(size=(60, 5)) + 30
    gen = rng.normal(size=(41, 5)) * 0.5 + 30.7
    found = scores.precision_recall(torch.tensor(ref), torch.tensor(gen))
    assert found == pytest.approx(brute_precision_recall(ref, gen))
    assert 0 < found[1] < found[0] <= 1


def test_precision_recall_of_extreme_sets():
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    assert scores.precision_recall(x, x) == (1, 1)
    assert scores.precision_recall(x, x + 100) == (0, 0)
    collapsed = x[:1].repeat(20, 1)  # one reference image, again and again
    assert scores.precision_recall(x, collapsed) == (1, pytest.approx(1 / 30))
    with pytest.raises(MetricError, match="more than 3"):
        scores.precision_recall(x[:3], x)


def test_psnr():
    assert scores.psnr(255.0**2) == 0
    assert scores.psnr(1) == pytest.approx(48.1308, abs=1e-4)
    assert scores.psnr(0) == math.inf


def test_scores_need_bounded_memory(tmp_path):
    """400 MB of images in an archive, and 60,000 features, within the memory that is promised."""
    source = tmp_path / "x.npz"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (20_000, 84, 84, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(20):
                file.write(bytes(1000 * 84 * 84 * 3))
    moments = scores.Moments(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = 0
    for batch in inputs.open_source(source).images.batches(50):
        images += len(batch)
        moments.update(torch.randn(150, 64))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images == 20_000 and moments.count == 60_000
    assert after - before < 100 * 1024  # kB
