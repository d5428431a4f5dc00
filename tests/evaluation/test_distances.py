"""Distances of features against closed forms, independent computations and torch-fidelity's."""

import math
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import ortho_group

from davae.errors import DavaeError
from davae.evaluation.metrics.clip_score import ClipScore
from davae.evaluation.metrics.fid import (
    Gaussian,
    GaussianStatistics,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from davae.evaluation.metrics.inception_score import inception_score
from davae.evaluation.metrics.kid import kid, polynomial_kernel, unbiased_mmd
from davae.evaluation.metrics.precision_recall import precision_recall
from davae.runtime.atomic_files import file_hash


def _rows(count, features=6, *, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * scale + shift


def _moments(rows):
    return GaussianStatistics().update(rows).gaussian()


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's own arithmetic, where it is installed with the torchvision it imports."""
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_kid
    except ImportError as error:
        pytest.skip(f"torch-fidelity cannot be imported ({error})")
    return types.SimpleNamespace(fid=metric_fid, kid=metric_kid, isc=metric_isc)


def test_frechet_distance_of_gaussians_that_share_axes_has_a_closed_form():
    # Commuting covariances: |d|^2 + sum (sqrt a - sqrt b)^2.
    turn = torch.from_numpy(ortho_group.rvs(5, random_state=0))
    a, b = torch.tensor([4.0, 1.0, 9.0, 0.25, 0.0]), torch.tensor([1.0, 1.0, 4.0, 4.0, 2.0])
    shift = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    first = Gaussian(torch.zeros(5).double(), turn @ torch.diag(a).double() @ turn.T)
    second = Gaussian(shift.double(), turn @ torch.diag(b).double() @ turn.T)
    expected = 5.0 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_that_of_the_matrix_square_root():
    a, b = _rows(200, seed=1) @ _rows(6, seed=2), _rows(150, seed=3, shift=0.5)
    first, second = _moments(a), _moments(b)
    root = scipy.linalg.sqrtm(np.cov(a.numpy(), rowvar=False) @ np.cov(b.numpy(), rowvar=False)).real
    expected = np.sum((a.numpy().mean(0) - b.numpy().mean(0)) ** 2)
    expected += np.trace(np.cov(a.numpy(), rowvar=False) + np.cov(b.numpy(), rowvar=False) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_with_fewer_images_than_features():
    # Covariances of rank one along orthogonal axes: nothing in common, so the traces add up.
    along_x, along_y = torch.zeros(2, 40).double(), torch.zeros(2, 40).double()
    along_x[:, 0] = torch.tensor([-1.0, 1.0])
    along_y[:, 1] = torch.tensor([-1.0, 1.0])
    assert frechet_distance(_moments(along_x), _moments(along_y)) == pytest.approx(4.0, abs=1e-6)
    few = _rows(5, 40)
    assert frechet_distance(_moments(few), _moments(few)) == pytest.approx(0.0, abs=1e-6)


def test_fid_kid_and_inception_score_are_torch_fidelitys(fidelity):
    a, b = _rows(80, 12, seed=1), _rows(70, 12, seed=2, scale=1.3, shift=0.2)
    theirs = fidelity.fid.fid_statistics_to_metric(
        fidelity.fid.fid_features_to_statistics(a), fidelity.fid.fid_features_to_statistics(b), False
    )["frechet_inception_distance"]
    assert frechet_distance(_moments(a), _moments(b)) == pytest.approx(theirs, rel=1e-9)
    theirs = fidelity.kid.kid_features_to_metric(a, b, kid_subsets=5, kid_subset_size=50, rng_seed=7, verbose=False)
    ours = kid(a, b, subsets=5, subset_size=50, seed=7)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    theirs = fidelity.isc.isc_features_to_metric(a, splits=4, shuffle=True, rng_seed=3)
    ours = inception_score(a, splits=4, seed=3)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_kid_by_loops_and_in_expectation():
    a, b = _rows(7, 3, seed=1), _rows(9, 3, seed=2, shift=1.0)
    k = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731
    loops = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / 42
    loops += sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / 72
    loops -= 2 * sum(k(x, y) for x in a for y in b) / 63
    assert unbiased_mmd(a, b) == pytest.approx(loops, rel=1e-10)
    # One feature, x ~ N(m, s^2): E k(x, y) = sum_i binom(3, i) E[x^i] E[y^i] in closed form.
    x, y = _rows(4000, 1, seed=3), _rows(4000, 1, seed=4, scale=1.5, shift=0.5)
    moments = lambda m, s: (1.0, m, m * m + s * s, m**3 + 3 * m * s * s)  # noqa: E731
    gap = [p - q for p, q in zip(moments(0.0, 1.0), moments(0.5, 1.5), strict=True)]
    expected = sum(math.comb(3, i) * gap[i] ** 2 for i in range(4))
    assert kid(x, y, subsets=4, subset_size=2000).mean == pytest.approx(expected, rel=0.15)
    same = kid(x, _rows(4000, 1, seed=9), subsets=4, subset_size=2000).mean
    assert abs(same) < 0.02 * expected
    assert polynomial_kernel(a, b).shape == (7, 9)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_kid_of_isotropic_gaussians_has_a_closed_form(scale):
    # x, y ~ N(0, a^2 I), N(0, b^2 I): E k = 1 + 3 a^2 b^2 / F, odd moments vanish; so MMD^2 = 3 (a^2 - b^2)^2 / F.
    a, b = _rows(3000, 8, seed=5), _rows(3000, 8, seed=6, scale=scale)
    expected = 3 * (1 - scale**2) ** 2 / 8
    assert unbiased_mmd(a, b) == pytest.approx(expected, rel=0.05, abs=2e-3)


def test_batches_give_the_value_of_one_pass():
    rows = _rows(53, shift=1000.0)
    whole, parts = _moments(rows), GaussianStatistics()
    for part in rows.split([1, 20, 0, 30, 2]):
        parts.update(part)
    torch.testing.assert_close(parts.gaussian().covariance, whole.covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts.gaussian().mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.covariance, rows.T.cov(), rtol=1e-9, atol=1e-9)
    images, texts = _rows(10), _rows(10, seed=1)
    once, twice = ClipScore().update(images, texts), ClipScore()
    twice.update(images[:3], texts[:3]).update(images[3:], texts[3:])
    assert twice.score() == pytest.approx(once.score(), rel=1e-12)


def test_clip_score_of_known_angles():
    images = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert ClipScore().update(images, texts).score() == pytest.approx((100 + 100 / math.sqrt(2) + 0) / 3)
    with pytest.raises(DavaeError, match="at least one"):
        ClipScore().score()


def test_inception_score_is_the_number_of_classes_at_best_and_one_at_worst():
    sure = torch.eye(5).repeat(4, 1).log()  # log 0 = -inf, as a hard prediction is
    assert inception_score(sure, splits=1).mean == pytest.approx(5.0)
    assert inception_score(torch.zeros(20, 5), splits=2).mean == pytest.approx(1.0)


def test_precision_and_recall_of_sets_laid_out_by_hand():
    line = torch.arange(6.0)[:, None]
    far = torch.tensor([[0.5], [1.5], [2.5], [100.0], [101.0], [102.0]])
    found = precision_recall(line, far, neighbours=1)
    assert found.precision == pytest.approx(0.5)
    # Balls of radius 1 around 0.5, 1.5, 2.5 hold 0, 1, 2, 3 of the line.
    assert found.recall == pytest.approx(4 / 6)
    assert precision_recall(line, line) == (1.0, 1.0)
    cut = precision_recall(_rows(50, seed=1), _rows(40, seed=2), chunk=7)
    assert cut == precision_recall(_rows(50, seed=1), _rows(40, seed=2))


def test_statistics_travel_as_adm_writes_them(tmp_path):
    moments = _moments(_rows(30))
    message = save_statistics(moments, tmp_path / "a.npz")
    assert message == file_hash(tmp_path / "a.npz") == save_statistics(moments, tmp_path / "b.npz")
    again = load_statistics(tmp_path / "a.npz")
    assert frechet_distance(moments, again) == pytest.approx(0, abs=1e-9)
    assert again.count == 30
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4), mu_s=np.zeros(2))
    assert load_statistics(tmp_path / "adm.npz").count is None
    np.savez(tmp_path / "bad.npz", mu=np.zeros(4), sigma=np.eye(3))
    np.savez(tmp_path / "half.npz", mu=np.zeros(4))
    np.savez(tmp_path / "code.npz", mu=np.array([print], dtype=object), sigma=np.eye(1))
    for name, words in (("bad", r"\[3, 3\]"), ("half", "'sigma'"), ("code", "pickle"), ("none", "none.npz")):
        with pytest.raises(DavaeError, match=words):
            load_statistics(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: GaussianStatistics().update(torch.tensor([[float("nan")]])), "NaN"),
        (lambda: GaussianStatistics().update(_rows(1)).gaussian(), "at least 2 images"),
        (lambda: frechet_distance(_moments(_rows(5)), _moments(_rows(5, 4))), "different networks"),
        (lambda: kid(_rows(5), _rows(5), subset_size=6), "subsets of 6"),
        (lambda: precision_recall(_rows(3), _rows(9)), "3 neighbours"),
        (lambda: inception_score(_rows(3), splits=4), "4 parts"),
        (lambda: ClipScore().update(_rows(3), _rows(2)), "pairs"),
    ],
)
def test_what_cannot_be_measured_is_told(wrong, words):
    with pytest.raises(DavaeError, match=words):
        wrong()
