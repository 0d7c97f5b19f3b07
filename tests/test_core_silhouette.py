"""Silhouettes against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from nest_rs.numeric import silhouette_samples, silhouette_score

METRICS = ["euclidean", "sqeuclidean", "cosine"]


def oracle(x, labels, metric):
    return metrics.silhouette_samples(np.asarray(x, np.float64), labels, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(3, 1, 2), (50, 2000, 8), (500, 7, 20), (1500, 64, 3), (700, 300, 32)])
def test_agrees_with_sklearn(metric, n, d, k):
    rng = np.random.default_rng(n)
    centers = rng.normal(size=(k, d)) * 2
    labels = np.concatenate([np.arange(k), rng.integers(k, size=n - k)])
    x = (centers[labels] + rng.normal(size=(n, d)) + 3).astype(np.float32)
    want = oracle(x, labels, metric)
    got = silhouette_samples(x, labels, metric)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert silhouette_score(x, labels, metric) == pytest.approx(want.mean(), abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_tight_clusters_far_from_the_origin(metric):
    # |x|^2 + |y|^2 - 2 x.y in f32 would be wrong in the first digit here.
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 4
    centers = rng.normal(size=(4, 10)) * 100 + 1000
    x = (centers[labels] + rng.normal(size=(200, 10)) * 0.05).astype(np.float32)
    tolerance = 1e-6 if metric != "cosine" else 1e-5
    np.testing.assert_allclose(silhouette_samples(x, labels, metric), oracle(x, labels, metric), atol=tolerance)


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("copies", [0, 1, 300])
def test_near_and_far_pairs_are_equally_precise(spread, copies):
    """Distances come from products where rows are far apart, else from differences: pair by pair, or all of them."""
    rng = np.random.default_rng(copies)
    labels = np.concatenate([np.arange(5), rng.integers(5, size=795)])
    x = (rng.normal(size=(5, 48)) * spread)[labels] + rng.normal(size=(800, 48))
    x[100 : 100 + copies] = x[100] + 1e-3 * rng.normal(size=(copies, 48))  # rows that all but coincide
    x = x.astype(np.float32)
    np.testing.assert_allclose(silhouette_samples(x, labels), oracle(x, labels, "euclidean"), atol=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("d", [3, 48, 300])
def test_many_rows_are_as_precise_as_few(spread, d):
    """Beyond 5,120 rows the products come from digits where the processor has tiles."""
    rng = np.random.default_rng(d)
    labels = np.concatenate([np.arange(5), rng.integers(5, size=5196)])
    x = (rng.normal(size=(5, d)) * spread)[labels] + rng.normal(size=(5201, d))
    x[100:400] = x[100] + 1e-3 * rng.normal(size=(300, d))  # rows that all but coincide
    x[7] = 1e3 * x[7]
    x = x.astype(np.float32)
    np.testing.assert_allclose(silhouette_samples(x, labels), oracle(x, labels, "euclidean"), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(3, 80),
    d=st.integers(1, 30),
    k=st.integers(2, 12),
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(METRICS),
    half=st.booleans(),
)
def test_random_shapes_agree_with_sklearn(n, d, k, seed, metric, half):
    rng = np.random.default_rng(seed)
    k = min(k, n - 1)
    labels = np.concatenate([np.arange(k), rng.integers(k, size=n - k)]) * 7 - 20
    x = rng.normal(size=(n, d)).astype(np.float16 if half else np.float32)
    x[rng.integers(n)] = x[rng.integers(n)]  # duplicates
    x[rng.integers(n)] = 0
    np.testing.assert_allclose(silhouette_samples(x, labels, metric), oracle(x, labels, metric), atol=2e-6)


def test_singletons_score_zero():
    x = np.float32([[0], [1], [10], [11], [50]])
    scores = silhouette_samples(x, [0, 0, 1, 1, 2])
    assert scores[4] == 0
    assert (scores[:4] > 0.5).all()


def test_all_rows_equal_is_zero_not_nan():
    for metric in METRICS:
        assert silhouette_score(np.ones((6, 3), np.float32), [0, 0, 0, 1, 1, 1], metric) == 0


@pytest.mark.parametrize("magnitude", [1e-40, 1e-25, 1e25, 1e37])
def test_any_finite_magnitude(magnitude):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = ((rng.normal(size=(60, 5)) + labels[:, None]) * magnitude).astype(np.float32)
    plain = x.astype(np.float64) / magnitude
    for metric in METRICS:
        np.testing.assert_allclose(silhouette_samples(x, labels, metric), oracle(plain, labels, metric), atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "metric", "message"),
    [
        ([0, 0, 0, 0], "euclidean", "distinct labels is `1`"),
        ([0, 1, 2, 3], "euclidean", "distinct labels is `4`"),
        ([0, 1], "euclidean", "labels has shape `2`"),
        ([0.5, 1, 1, 0], "euclidean", "whole numbers"),
        ([0, 1, 1, 2**40], "euclidean", "too large"),
        ([0, 1, 1, 0], "manhattan", "metric is `manhattan`"),
    ],
)
def test_bad_input_is_one_clear_line(labels, metric, message):
    with pytest.raises(ValueError, match=message):
        silhouette_score(np.zeros((4, 2), np.float32), labels, metric)


def test_a_nan_row_is_named():
    x = np.zeros((4, 2), np.float32)
    x[2, 1] = np.nan
    for metric in METRICS:
        with pytest.raises(ValueError, match="row `2`, column `1`"):
            silhouette_score(x, [0, 0, 1, 1], metric)
