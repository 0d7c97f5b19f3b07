"""The probe and the selection against scikit-learn."""

import ml_dtypes
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nest_rs.numeric import LogisticProbe, select_rows


def activations(n, d, seed=0, shift=2.0, planted=6):
    """Max-pooled activations are positive on average; a few columns tell the classes apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, d)) + shift + rng.normal(size=d)
    x[:, :planted] += 1.5 * y[:, None]
    return x.astype(np.float32), y


def oracle(x, y, C=1.0):
    model = LogisticRegression(C=C, tol=1e-12, max_iter=100_000)
    return model.fit(np.asarray(x, np.float64), y)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("n", "d", "C", "shift"),
    [(300, 20, 1.0, 2), (100, 400, 1.0, 2), (200, 900, 1.0, 0), (150, 30, 0.01, 5), (400, 50, 100.0, 1)],
)
def test_the_optimum_is_sklearns(n, d, C, shift):
    x, y = activations(n, d, shift=shift)
    ours = LogisticProbe(C=C).fit(x, y)
    theirs = oracle(x, y, C)
    assert cosine(ours.coef_, theirs.coef_[0]) > 1 - 1e-8
    np.testing.assert_allclose(ours.coef_, theirs.coef_[0], rtol=1e-3, atol=1e-5)
    assert ours.intercept_ == pytest.approx(theirs.intercept_[0], rel=1e-3, abs=1e-3)
    for z in (2.0, 3.0):
        assert np.array_equal(select_rows(ours.coef_, z), select_rows(theirs.coef_[0], z))


def test_the_gradient_on_the_raw_matrix_vanishes():
    x, y = activations(500, 300, shift=30.0)
    fit = LogisticProbe().fit(x, y)
    wide = x.astype(np.float64)
    residual = fit.predict_proba(x)[:, 1] - y
    gradient = fit.coef_ + wide.T @ residual
    assert np.abs(gradient).max() < 1e-7 * np.linalg.norm(fit.coef_)
    assert abs(residual.sum()) < 1e-7


def test_selected_rows_are_the_planted_ones():
    x, y = activations(400, 3000, planted=12)
    assert set(range(12)) <= set(select_rows(LogisticProbe().fit(x, y).coef_))


def test_half_types_and_torch_are_the_same_numbers():
    x, y = activations(120, 64)
    for narrow in (x.astype(np.float16), x.astype(ml_dtypes.bfloat16)):
        want = LogisticProbe().fit(narrow.astype(np.float32), y)
        assert np.array_equal(LogisticProbe().fit(narrow, y).coef_, want.coef_)
    tensor = torch.from_numpy(x).bfloat16()
    assert np.array_equal(LogisticProbe().fit(tensor, torch.from_numpy(y)).coef_, want.coef_)


def test_any_two_classes_will_do():
    x, y = activations(80, 10)
    want = LogisticProbe().fit(x, y)
    for labels in (y.astype(bool), np.where(y, "harmful", "benign"), y * 5 - 2, y.astype(float)):
        got = LogisticProbe().fit(x, labels)
        assert np.array_equal(got.coef_, want.coef_)
        assert list(got.classes_) == sorted(set(labels.tolist()))
    assert (want.predict(x) == y).mean() > 0.9
    np.testing.assert_allclose(want.predict_proba(x).sum(1), 1)


def test_separable_and_scaled_columns_still_converge():
    x = np.float32([[-1, 0], [-2, 0], [1, 0], [2, 0]]) * np.float32([1000, 1])
    fit = LogisticProbe(C=1e6).fit(x, [0, 0, 1, 1])
    assert np.isfinite(fit.coef_).all()
    assert fit.coef_[1] == 0
    assert (fit.predict(x) == [0, 0, 1, 1]).all()


def test_constant_columns_get_no_weight():
    fit = LogisticProbe().fit(np.full((8, 3), 7, np.float32), [0, 1, 1, 1, 0, 1, 1, 1])
    assert (fit.coef_ == 0).all()
    assert fit.intercept_ == pytest.approx(np.log(3))


@pytest.mark.parametrize(
    ("x", "y", "C", "message"),
    [
        (np.zeros((3, 2)), [1, 1, 1], 1.0, "holds `1` classes"),
        (np.zeros((3, 2)), [0, 1, 2], 1.0, "holds `3` classes"),
        (np.zeros((3, 2)), [0, 1], 1.0, "y has shape `2`"),
        (np.zeros((3, 2)), [[0], [1], [1]], 1.0, "one label a row"),
        (np.zeros((3, 2)), [0, 1, np.nan], 1.0, "not finite"),
        (np.zeros((3, 2)), [0, 1, 1], 0.0, "C is `0`"),
        (np.zeros((3, 2)), [0, 1, 1], float("inf"), "C is `inf`"),
        (np.array([[0, 1], [2, np.nan], [1, 1]]), [0, 1, 1], 1.0, "row `1`, column `1`"),
    ],
)
def test_bad_input_is_one_clear_line(x, y, C, message):
    with pytest.raises(ValueError, match=message):
        LogisticProbe(C=C).fit(x.astype(np.float32), y)


def test_selection_is_the_formula():
    rng = np.random.default_rng(0)
    coef = rng.standard_t(3, size=4000)
    for z in (1.0, 2.0, 3.0, 4.0):
        scores = (coef - coef.mean()) / coef.std()
        both = np.flatnonzero(scores > z)
        assert np.array_equal(select_rows(coef, z, positive=False), both)
        shifted = coef - 2.5
        want = np.flatnonzero((scores > z) & (shifted > 0))
        assert np.array_equal(select_rows(shifted, z), want)
    assert select_rows(coef).dtype == np.int32


def test_selection_at_the_edges():
    assert select_rows(np.full(50, 0.1), 0.0).size == 0
    assert select_rows([]).size == 0
    assert select_rows([1.0]).size == 0
    with pytest.raises(ValueError, match="row `1`"):
        select_rows([0.0, np.nan])
    with pytest.raises(ValueError, match="expected one weight a row"):
        select_rows(np.zeros((2, 2)))
