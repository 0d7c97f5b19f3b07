"""k-means against scikit-learn, and at the edges."""

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import cluster
from sklearn.exceptions import ConvergenceWarning

from nest_rs.numeric import KMeans, silhouette_score


def overlapping(n, d, k, seed=0, offset=0.0):
    """Clusters that overlap, so that labels keep moving."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(k, d)) * 0.5
    x = centers[rng.integers(k, size=n)] + rng.normal(size=(n, d)) + offset
    return x.astype(np.float32), rng


def oracle(x, init, **kwargs):
    """scikit-learn in float64: in float32 its Lloyd can part from its own Elkan."""
    x, init = x.astype(np.float64), init.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return cluster.KMeans(len(init), init=init, n_init=1, algorithm="lloyd", **kwargs).fit(x)


@pytest.mark.parametrize(
    ("n", "d", "k", "offset"),
    [(500, 3, 5, 0), (2000, 40, 16, 5), (300, 300, 7, -2), (50, 2000, 4, 1), (97, 1, 3, 100)],
)
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_same_start_same_labels_and_inertia_as_sklearn(n, d, k, offset, tol):
    x, rng = overlapping(n, d, k, offset=offset)
    init = x[rng.choice(n, k, replace=False)]
    ours = KMeans(k, init=init, tol=tol).fit(x)
    theirs = oracle(x, init, tol=tol)
    assert np.array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)


def test_stopped_early_the_labels_fit_the_centers():
    x, rng = overlapping(2000, 20, 12)
    init = x[rng.choice(2000, 12, replace=False)]
    ours = KMeans(12, init=init, max_iter=3, tol=0).fit(x)
    theirs = oracle(x, init, max_iter=3, tol=0)
    assert ours.n_iter_ == 3
    assert np.array_equal(ours.labels_, theirs.labels_)
    assert np.array_equal(ours.predict(x), ours.labels_)


def test_an_empty_cluster_takes_the_farthest_row_as_in_sklearn():
    x, _ = overlapping(200, 4, 3)
    init = np.concatenate([x[:3], np.full((1, 4), 1e4, np.float32)])
    ours = KMeans(4, init=init, max_iter=1).fit(x)
    theirs = oracle(x, init, max_iter=1)
    assert len(np.unique(ours.labels_)) == 4
    assert np.array_equal(ours.labels_, theirs.labels_)


def test_seeding_is_as_good_as_sklearns():
    x, _ = overlapping(3000, 10, 30)
    ours = [KMeans(30, random_state=s).fit(x).inertia_ for s in range(8)]
    theirs = [cluster.KMeans(30, n_init=1, random_state=s).fit(x).inertia_ for s in range(8)]
    assert np.mean(ours) < 1.01 * np.mean(theirs)


def test_restarts_take_the_best_and_seeds_differ():
    x, _ = overlapping(800, 5, 12)
    singles = [KMeans(12, n_init=1, random_state=s).fit(x).inertia_ for s in range(4)]
    assert len(set(singles)) > 1
    assert KMeans(12, n_init=10).fit(x).inertia_ <= KMeans(12, n_init=1).fit(x).inertia_


def test_cosine_is_spherical_kmeans():
    x, rng = overlapping(600, 12, 6, offset=0.3)
    init = x[rng.choice(600, 6, replace=False)]
    ours = KMeans(6, metric="cosine", init=init, tol=0).fit(x)
    unit = x.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    centers = init / np.linalg.norm(init, axis=1, keepdims=True).astype(np.float64)
    for _ in range(ours.n_iter_):
        labels = (unit @ centers.T).argmax(1)
        centers = np.stack([unit[labels == c].sum(0) for c in range(6)])
        centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    assert np.array_equal(ours.labels_, labels)
    np.testing.assert_allclose(ours.cluster_centers_, centers, atol=1e-5)
    assert ours.inertia_ == pytest.approx((1 - (unit * centers[labels]).sum(1)).sum(), rel=1e-5)
    # Lengths do not count.
    stretched = x * rng.uniform(0.1, 10, size=(600, 1)).astype(np.float32)
    again = KMeans(6, metric="cosine", init=init, tol=0).fit(stretched)
    assert np.array_equal(again.labels_, ours.labels_)


def test_zero_rows_under_cosine():
    x, _ = overlapping(60, 4, 3)
    x[[3, 17]] = 0
    fit = KMeans(3, metric="cosine", n_init=3).fit(x)
    assert np.isfinite(fit.cluster_centers_).all()
    assert np.isfinite(fit.inertia_)
    with pytest.warns(UserWarning, match="distinct"):
        assert KMeans(2, metric="cosine").fit(np.zeros((5, 3), np.float32)).inertia_ >= 0


def test_half_types_and_torch_are_the_same_numbers():
    x, _ = overlapping(400, 30, 5)
    half = x.astype(np.float16)
    brain = x.astype(ml_dtypes.bfloat16)
    for narrow, tensor in [
        (half, torch.from_numpy(half)),
        (brain, torch.from_numpy(brain.astype(np.float32)).bfloat16()),
    ]:
        want = KMeans(5).fit(narrow.astype(np.float32))
        for given_as in (narrow, tensor, tensor.requires_grad_()):
            got = KMeans(5).fit(given_as)
            assert np.array_equal(got.labels_, want.labels_)
            assert np.array_equal(got.cluster_centers_, want.cluster_centers_)
    f64 = KMeans(5).fit(x.astype(np.float64))
    assert f64.inertia_ == KMeans(5).fit(torch.from_numpy(x)).inertia_


def test_strided_and_fortran_arrays_are_copied_not_misread():
    x, _ = overlapping(300, 16, 4)
    want = KMeans(4).fit(x)
    for view in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], torch.from_numpy(x.T.copy()).T):
        assert np.array_equal(KMeans(4).fit(view).labels_, want.labels_)
    x.flags.writeable = False
    assert np.array_equal(KMeans(4).fit(x).labels_, want.labels_)


def test_as_many_clusters_as_rows():
    x, _ = overlapping(20, 3, 4)
    fit = KMeans(20).fit(x)
    assert sorted(fit.labels_) == list(range(20))
    assert fit.inertia_ == pytest.approx(0, abs=1e-9)


def test_more_clusters_than_distinct_rows_warns():
    x = np.repeat(np.float32([[0, 1], [5, 5], [9, 0]]), 10, axis=0)
    with pytest.warns(UserWarning, match="only `3` of n_clusters `6`"):
        fit = KMeans(6, n_init=3).fit(x)
    assert len(np.unique(fit.labels_)) == 3
    assert np.isfinite(fit.cluster_centers_).all()
    assert fit.inertia_ == pytest.approx(0, abs=1e-9)


def test_one_row_and_constant_columns():
    one = KMeans(1).fit(np.float32([[1, 2, 3]]))
    assert one.cluster_centers_.tolist() == [[1, 2, 3]]
    assert one.inertia_ == 0
    x, rng = overlapping(200, 6, 3)
    x[:, 2] = 7
    init = x[rng.choice(200, 3, replace=False)]
    assert np.array_equal(KMeans(3, init=init).fit(x).labels_, oracle(x, init).labels_)


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-15, 1e15, 1e30, 1e37])
def test_any_finite_magnitude(magnitude):
    x, rng = overlapping(200, 6, 3)
    scaled = (x.astype(np.float64) * magnitude).astype(np.float32)
    rows = rng.choice(200, 3, replace=False)
    # Denormals have few bits; compare with what they hold.
    plain = (scaled.astype(np.float64) / magnitude).astype(np.float32)
    got = KMeans(3, init=scaled[rows]).fit(scaled)
    want = KMeans(3, init=plain[rows]).fit(plain)
    assert np.array_equal(got.labels_, want.labels_)
    assert got.inertia_ == pytest.approx(want.inertia_ * magnitude * magnitude, rel=1e-3)
    assert np.isfinite(got.cluster_centers_).all()


def decided_in_float32(x, init):
    """Whether no row of a run is as near to two centers as float32, in which the core compares, can tell."""
    rows = x.astype(np.float64)
    centers, last = init.astype(np.float64), None
    for done in range(1, 301):
        squares = np.sort(((rows[:, None] - centers) ** 2).sum(axis=2), axis=1)
        if (
            len(init) > 1
            and (squares[:, 1] - squares[:, 0]).min() < 8 * np.finfo(np.float32).eps * (rows**2).sum(axis=1).max()
        ):
            return False
        if last is not None and np.array_equal(centers, last):
            break
        last, centers = centers, oracle(x, init, max_iter=done, tol=0).cluster_centers_
    return True


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 120),
    d=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    duplicates=st.booleans(),
)
def test_random_shapes_agree_with_sklearn(n, d, seed, share, duplicates):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32)
    if duplicates:
        x = x[rng.integers(max(1, n // 2), size=n)]
    distinct = np.unique(x, axis=0)
    k = 1 + int(share * (len(distinct) - 1))
    init = distinct[rng.permutation(len(distinct))[:k]]
    assume(decided_in_float32(x, init))
    ours = KMeans(k, init=init).fit(x)
    theirs = oracle(x, init)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4, abs=1e-5)
    assert ours.labels_.dtype == np.int32
    assert ours.cluster_centers_.shape == (k, d)


def test_sweep_gives_what_fit_and_silhouette_give():
    x, _ = overlapping(300, 20, 4)
    swept = KMeans(2, random_state=3).sweep(x, [2, 3, 5], n_init=4)
    assert [s.k for s in swept] == [2, 3, 5]
    for one in swept:
        fit = KMeans(one.k, n_init=4, random_state=3).fit(x)
        assert np.array_equal(one.labels, fit.labels_)
        assert np.array_equal(one.cluster_centers, fit.cluster_centers_)
        assert (one.inertia, one.n_iter) == (fit.inertia_, fit.n_iter_)
        assert one.silhouette == pytest.approx(silhouette_score(x, fit.labels_), abs=1e-9)


def test_sweep_where_a_silhouette_is_not_defined():
    x, _ = overlapping(4, 2, 2)
    swept = KMeans(2).sweep(x, [1, 2, 4])
    assert [s.silhouette is None for s in swept] == [True, False, True]
    assert KMeans(2).sweep(x, []) == []


@pytest.mark.parametrize(
    ("settings_", "x", "message"),
    [
        ({}, np.float32([[0, 1], [np.nan, 2], [3, 4]]), "row `1`, column `0`"),
        ({}, np.float32([[0, 1], [2, 3], [4, -np.inf]]), "`-inf` in row `2`"),
        ({}, np.float64([[0, 1], [1e300, 3], [4, 5]]), "row `1`"),
        ({}, np.zeros((0, 3), np.float32), "at least one row"),
        ({}, np.zeros((3, 0), np.float32), "at least one row and one column"),
        ({}, np.zeros(3, np.float32), "expected 2 dimensions"),
        ({}, np.array([["a", "b"]]), "expected real numbers"),
        ({}, np.zeros((3, 2), np.complex64), "expected real numbers"),
        ({"n_clusters": 9}, np.zeros((3, 2), np.float32), "n_clusters is `9`"),
        ({"n_clusters": 0}, np.zeros((3, 2), np.float32), "n_clusters is `0`"),
        ({"n_clusters": 2.5}, np.zeros((3, 2), np.float32), "n_clusters is `2.5`"),
        ({"n_init": 0}, np.zeros((3, 2), np.float32), "n_init is `0`"),
        ({"max_iter": 0}, np.zeros((3, 2), np.float32), "max_iter is `0`"),
        ({"tol": -1.0}, np.zeros((3, 2), np.float32), "tol is `-1`"),
        ({"tol": float("nan")}, np.zeros((3, 2), np.float32), "tol is `NaN`"),
        ({"random_state": -1}, np.zeros((3, 2), np.float32), "random_state is `-1`"),
        ({"n_threads": 0}, np.zeros((3, 2), np.float32), "n_threads is `0`"),
        ({"metric": "manhattan"}, np.zeros((3, 2), np.float32), "metric is `manhattan`"),
        ({"init": "random"}, np.zeros((3, 2), np.float32), "init is `random`"),
        ({"init": np.zeros((2, 5))}, np.zeros((3, 2), np.float32), "init has shape `[2, 5]`"),
        ({"init": [[0, 0], [np.nan, 1]]}, np.zeros((3, 2), np.float32), "the centres holds"),
    ],
)
def test_bad_input_is_one_clear_line(settings_, x, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        KMeans(**{"n_clusters": 2, **settings_}).fit(x)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_predict_checks_its_input():
    with pytest.raises(ValueError, match="not fitted"):
        KMeans(2).predict(np.zeros((2, 2), np.float32))
    fit = KMeans(2).fit(np.float32([[0, 0], [1, 1], [5, 5]]))
    with pytest.raises(ValueError, match="columns"):
        fit.predict(np.zeros((2, 3), np.float32))
    assert fit.predict(np.float32([[6, 6]]))[0] == fit.labels_[2]
