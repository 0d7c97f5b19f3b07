"""The numeric core with scikit-learn's manners.

Every `X` may be a NumPy array or a torch tensor of float32, float16 or bfloat16 (`ml_dtypes` for
NumPy); those are read in place when C-contiguous, copied otherwise. Other real types are converted
to float32. Results do not depend on `n_threads`, bit for bit.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nest_rs import _core

__all__ = [
    "ActivationStore",
    "ClusterSweep",
    "FoldReport",
    "KMeans",
    "LogisticProbe",
    "PooledStats",
    "fold_file",
    "pooled_stats",
    "select_rows",
    "silhouette_samples",
    "silhouette_score",
    "tensor_sha256",
]

Path: TypeAlias = str | PathLike[str]
Metric: TypeAlias = Literal["euclidean", "cosine"]
Distance: TypeAlias = Literal["euclidean", "sqeuclidean", "cosine"]
StoreDtype: TypeAlias = Literal["f32", "f16", "bf16"]
# A torch tensor is not an ArrayLike, and torch is imported by the caller or not at all.
Matrix: TypeAlias = Any

_Bits: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]


def _torch_array(x: Any) -> tuple[np.ndarray[Any, Any], str | None] | None:
    """A torch tensor as an array, with the tag "bf16" if it holds the bits of bfloat16."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy(), "bf16"
    return x.numpy(), None


def _bits(x: Matrix, ndim: int, name: str = "X") -> tuple[_Bits, str]:
    """`x` as the core takes it: a C-contiguous float32 or uint16 array, and its dtype tag."""
    converted = _torch_array(x)
    array, tag = converted if converted is not None else (np.asarray(x), None)
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape `{array.shape}`, expected {ndim} dimensions")
    if tag == "bf16" or array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array).view(np.uint16), "bf16"
    if array.dtype == np.float16:
        return np.ascontiguousarray(array).view(np.uint16), "f16"
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype `{array.dtype}`: expected real numbers")
    if array.dtype == np.float32:
        return np.ascontiguousarray(array, dtype=np.float32), "f32"
    # Too large for float32 becomes infinite, which the core then names by its row.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32), "f32"


def _values(x: Any) -> np.ndarray[Any, Any]:
    """A vector of labels or flags as a NumPy array."""
    converted = _torch_array(x)
    return converted[0] if converted is not None else np.asarray(x)


def _integers(x: Any, dtype: type[np.signedinteger[Any]], name: str) -> NDArray[Any]:
    """A vector of whole numbers in a narrower type, checked to fit."""
    array = _values(x)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise ValueError(f"{name} has dtype `{array.dtype}` and shape `{array.shape}`: expected whole numbers")
    limits = np.iinfo(dtype)
    if array.size and (int(array.max()) > limits.max or int(array.min()) < limits.min):
        raise ValueError(f"{name} goes up to `{int(array.max())}`: too large")
    return np.ascontiguousarray(array, dtype=dtype)


def _two_classes(y: Any) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Labels as 0 and 1, and the two classes in ascending order."""
    array = _values(y)
    if array.ndim != 1:
        raise ValueError(f"y has shape `{array.shape}`, expected one label a row")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("y holds a label that is not finite")
    classes = np.unique(array)
    if len(classes) != 2:
        shown = ", ".join(str(c) for c in classes[:5])
        raise ValueError(f"y holds `{len(classes)}` classes (`{shown}`): a probe needs two")
    return (array == classes[1]).astype(np.uint8), classes


def _whole(value: Any, name: str) -> int:
    """A count or a seed that the core can take."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and 0 <= value < 2**63):
        raise ValueError(f"{name} is `{value}`: must be a whole number from 0 on")
    return int(value)


def _threads(n_threads: int | None) -> int | None:
    return None if n_threads is None else _whole(n_threads, "n_threads")


class ClusterSweep(NamedTuple):
    """One k of `KMeans.sweep`."""

    k: int
    labels: NDArray[np.int32]
    cluster_centers: NDArray[np.float32]
    inertia: float
    n_iter: int
    silhouette: float | None
    """Mean silhouette; None where it is not defined."""


class KMeans:
    """Exact k-means, as scikit-learn's with `algorithm="lloyd"`.

    After `fit`: `labels_` (int32, n), `cluster_centers_` (float32, k x d), `inertia_` (float) and
    `n_iter_`. With `metric="cosine"` the centres are unit vectors and the inertia is the sum of
    `1 - cos`; zero rows have distance 1 to every centre. An `init` array starts one run.
    """

    labels_: NDArray[np.int32]
    cluster_centers_: NDArray[np.float32]
    inertia_: float
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: Metric = "euclidean",
        init: Literal["k-means++"] | ArrayLike = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: int = 0,
        n_threads: int | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric: Metric = metric
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.n_threads = n_threads

    def fit(self, X: Matrix, y: object = None) -> Self:
        """Cluster the rows of `X`. Warns if it has fewer distinct rows than clusters."""
        x, dtype = _bits(X, 2)
        k = _whole(self.n_clusters, "n_clusters")
        labels, centers, inertia, n_iter, n_used = _core.kmeans_fit(
            x,
            dtype,
            k,
            metric=self.metric,
            init=self._centers(),
            n_init=_whole(self.n_init, "n_init"),
            max_iter=_whole(self.max_iter, "max_iter"),
            tol=float(self.tol),
            seed=_whole(self.random_state, "random_state"),
            n_threads=_threads(self.n_threads),
        )
        if n_used < k:
            warnings.warn(
                f"only `{n_used}` of n_clusters `{k}` hold a row: X has too few distinct rows",
                stacklevel=2,
            )
        self.labels_ = labels
        self.cluster_centers_ = centers
        self.inertia_ = inertia
        self.n_iter_ = n_iter
        self.n_features_in_ = x.shape[1]
        return self

    def fit_predict(self, X: Matrix, y: object = None) -> NDArray[np.int32]:
        """`fit(X).labels_`."""
        return self.fit(X).labels_

    def predict(self, X: Matrix) -> NDArray[np.int32]:
        """The nearest centre of each row."""
        if not hasattr(self, "cluster_centers_"):
            raise ValueError("this KMeans is not fitted: call fit first")
        x, dtype = _bits(X, 2)
        return _core.kmeans_predict(
            x,
            dtype,
            self.cluster_centers_,
            metric=self.metric,
            n_threads=_threads(self.n_threads),
        )

    def sweep(self, X: Matrix, ks: Iterable[int], n_init: int | None = None) -> list[ClusterSweep]:
        """Cluster into each of `ks`, and score each by its mean silhouette.

        Uses this object's metric, `max_iter`, `tol`, `random_state` and `n_threads`; `n_init`
        defaults to its own. Each k's result is what `fit` gives for that k.
        """
        if self._centers() is not None:
            raise ValueError("init is an array: a sweep seeds itself, use `k-means++`")
        x, dtype = _bits(X, 2)
        swept = _core.kmeans_sweep(
            x,
            dtype,
            [_whole(k, "k") for k in ks],
            metric=self.metric,
            n_init=_whole(self.n_init if n_init is None else n_init, "n_init"),
            max_iter=_whole(self.max_iter, "max_iter"),
            tol=float(self.tol),
            seed=_whole(self.random_state, "random_state"),
            n_threads=_threads(self.n_threads),
        )
        return [
            ClusterSweep(k, labels, centers, inertia, n_iter, silhouette)
            for k, (labels, centers, inertia, n_iter, _), silhouette in swept
        ]

    def _centers(self) -> NDArray[np.float32] | None:
        if isinstance(self.init, str):
            if self.init != "k-means++":
                raise ValueError(f"init is `{self.init}`: expected `k-means++` or an array")
            return None
        centers = np.ascontiguousarray(np.asarray(self.init), dtype=np.float32)
        if centers.ndim != 2:
            raise ValueError(f"init has shape `{centers.shape}`, expected (n_clusters, d)")
        return centers


def silhouette_samples(
    X: Matrix,
    labels: ArrayLike,
    metric: Distance = "euclidean",
    n_threads: int | None = None,
) -> NDArray[np.float64]:
    """The silhouette of each row; 0 in a cluster of one."""
    x, dtype = _bits(X, 2)
    whole = _integers(labels, np.int32, "labels")
    threads = _threads(n_threads)
    return _core.silhouette_samples(x, dtype, whole, metric=metric, n_threads=threads)[1]


def silhouette_score(
    X: Matrix,
    labels: ArrayLike,
    metric: Distance = "euclidean",
    n_threads: int | None = None,
) -> float:
    """The mean silhouette. Needs 2 to n - 1 distinct labels."""
    x, dtype = _bits(X, 2)
    whole = _integers(labels, np.int32, "labels")
    threads = _threads(n_threads)
    return _core.silhouette_samples(x, dtype, whole, metric=metric, n_threads=threads)[0]


class LogisticProbe:
    """L2-regularised logistic regression, solved to its one optimum.

    The objective is that of scikit-learn's `LogisticRegression(C=C)`. After `fit`: `coef_`
    (float64, d), `intercept_`, `n_iter_` (Newton steps), `classes_` (the second is the positive one).
    """

    coef_: NDArray[np.float64]
    intercept_: float
    n_iter_: int
    classes_: NDArray[Any]

    def __init__(self, C: float = 1.0, n_threads: int | None = None) -> None:
        self.C = C
        self.n_threads = n_threads

    def fit(self, X: Matrix, y: ArrayLike) -> Self:
        """Fit rows `X` with labels `y` of exactly two classes."""
        x, dtype = _bits(X, 2)
        classes, names = _two_classes(y)
        coef, intercept, n_iter, converged = _core.probe_fit(
            x, dtype, classes, c=float(self.C), n_threads=_threads(self.n_threads)
        )
        if not converged:
            _warn_unconverged("the probe", stacklevel=3)
        self.coef_ = coef
        self.intercept_ = intercept
        self.n_iter_ = n_iter
        self.classes_ = names
        return self

    def decision_function(self, X: Matrix) -> NDArray[np.float64]:
        """`X @ coef_ + intercept_`, in float64."""
        if not hasattr(self, "coef_"):
            raise ValueError("this LogisticProbe is not fitted: call fit first")
        x, dtype = _bits(X, 2)
        if x.shape[1] != len(self.coef_):
            raise ValueError(f"X has `{x.shape[1]}` columns, the probe has {len(self.coef_)}")
        margins: NDArray[np.float64] = _widen(x, dtype).astype(np.float64) @ self.coef_
        return margins + self.intercept_

    def predict_proba(self, X: Matrix) -> NDArray[np.float64]:
        """Probabilities of both classes, (n, 2)."""
        margins = self.decision_function(X)
        # exp of a negative number only: no overflow
        small = np.exp(-np.abs(margins))
        p = np.where(margins >= 0, 1.0, small) / (1.0 + small)
        return np.stack([1.0 - p, p], axis=1)

    def predict(self, X: Matrix) -> NDArray[Any]:
        """The likelier class of each row."""
        chosen: NDArray[Any] = self.classes_[(self.decision_function(X) > 0).astype(int)]
        return chosen


def _warn_unconverged(what: str, stacklevel: int) -> None:
    warnings.warn(
        f"{what} stopped before its optimum: the columns may differ too much in scale",
        stacklevel=stacklevel,
    )


def _widen(x: _Bits, dtype: str) -> NDArray[np.float32]:
    """Bits back to numbers; exact."""
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    if dtype == "f16":
        return x.view(np.float16).astype(np.float32)
    return x.astype(np.float32, copy=False)


def select_rows(coef: ArrayLike, z: float = 3.0, positive: bool = True) -> NDArray[np.int32]:
    """Rows whose coefficient is more than `z` population standard deviations above the mean.

    With `positive`, only those with a positive coefficient. Ascending; empty if all are equal.
    """
    weights = np.ascontiguousarray(_values(coef), dtype=np.float64)
    if weights.ndim != 1:
        raise ValueError(f"coef has shape `{weights.shape}`, expected one weight a row")
    return _core.select_rows(weights, float(z), bool(positive))


@dataclass
class PooledStats:
    """A pooled batch, and count, mean and variance of each class so far."""

    pooled: NDArray[Any]
    """Maximum over the kept tokens, (batch, d), in the type of X (bfloat16 from `ml_dtypes`)."""
    _stats: _core.ClassStats | None

    @property
    def count(self) -> NDArray[np.int64]:
        """Rows of each class, (classes,)."""
        return self._need().count

    @property
    def mean(self) -> NDArray[np.float64]:
        """Means, (classes, d)."""
        return self._need().mean

    @property
    def var(self) -> NDArray[np.float64]:
        """Population variances, (classes, d)."""
        return self._need().var

    def merge(self, other: PooledStats) -> PooledStats:
        """The statistics of both; the pooled rows of this, then of the other."""
        stats = self._need().copy()
        stats.merge(other._need())
        return PooledStats(np.concatenate([self.pooled, other.pooled]), stats)

    def _need(self) -> _core.ClassStats:
        if self._stats is None:
            raise ValueError("no classes were given: call pooled_stats with y")
        return self._stats

    def __getstate__(self) -> dict[str, Any]:
        stats = self._stats
        parts = None if stats is None else (stats.count, stats.mean, stats.m2)
        return {"pooled": self.pooled, "parts": parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pooled = state["pooled"]
        parts = state["parts"]
        self._stats = None if parts is None else _core.ClassStats.from_parts(*parts)


def pooled_stats(
    X: Matrix,
    mask: ArrayLike,
    y: ArrayLike | None = None,
    *,
    n_classes: int = 2,
    n_threads: int | None = None,
) -> PooledStats:
    """Max-pool `X` (batch, tokens, d) over the tokens that `mask` (batch, tokens) keeps.

    With `y` (classes 0 to `n_classes` - 1, at most 256), also the statistics of each class. A row
    without a token is an error; so is a value that is kept and not finite.
    """
    x, dtype = _bits(X, 3)
    flags = _values(mask)
    keep = np.ascontiguousarray(flags != 0, dtype=np.uint8)
    threads = _threads(n_threads)
    pooled = _core.masked_max(x, dtype, keep, n_threads=threads)
    stats = None
    if y is not None:
        if not 1 <= _whole(n_classes, "n_classes") <= 256:
            raise ValueError(f"n_classes is `{n_classes}`: must be between 1 and 256")
        classes = _integers(y, np.int64, "y")
        if classes.size and not 0 <= int(classes.min()) <= int(classes.max()) < n_classes:
            raise ValueError(f"y holds a class outside `0..{n_classes}`")
        stats = _core.ClassStats(int(n_classes), x.shape[2])
        stats.update(pooled, dtype, classes.astype(np.uint8), n_threads=threads)
    return PooledStats(_typed(pooled, dtype), stats)


def _typed(x: _Bits, dtype: str) -> NDArray[Any]:
    """Bits as the type they are, without a copy."""
    if dtype == "f16":
        return x.view(np.float16)
    if dtype == "bf16":
        import ml_dtypes

        return x.view(ml_dtypes.bfloat16)
    return x


class ActivationStore:
    """Activations of many sites on disk: an ordinary safetensors file, one matrix a site.

    `create` starts a file at its full size under `NAME.partial`; `write` fills rows in any order;
    `finish` renames it, after which the store is read through a memory map. As a context manager it
    finishes at the end of the block, or leaves the partial file to `resume` if the block failed.
    """

    def __init__(self, writer: _core.StoreWriter | None, store: _core.Store | None) -> None:
        self._writer = writer
        self._store = store

    @classmethod
    def create(
        cls,
        path: Path,
        sites: Mapping[str, int],
        n_rows: int,
        dtype: StoreDtype = "bf16",
        metadata: Mapping[str, str] | None = None,
    ) -> ActivationStore:
        """Start a store of `n_rows` rows with `sites` (name -> width)."""
        widths = [(name, _whole(width, "width")) for name, width in sites.items()]
        writer = _core.StoreWriter.create(path, widths, _whole(n_rows, "n_rows"), dtype, dict(metadata or {}))
        return cls(writer, None)

    @classmethod
    def resume(cls, path: Path) -> ActivationStore:
        """Continue a store that was not finished; rows never written read as zeros."""
        return cls(_core.StoreWriter.resume(path), None)

    @classmethod
    def open(cls, path: Path) -> ActivationStore:
        """Map a finished store for reading."""
        return cls(None, _core.Store.open(path))

    def write(self, site: str, start: int, block: Matrix) -> None:
        """Write rows `start`, `start + 1`, ... of a site."""
        if self._writer is None:
            raise ValueError("the store is finished or closed: it takes no more rows")
        x, dtype = _bits(block, 2, "block")
        self._writer.write(site, _whole(start, "start"), x, dtype)

    def finish(self) -> Self:
        """Flush, rename to the final name, and open for reading."""
        if self._writer is not None:
            self._store = self._writer.finish()
            self._writer = None
        return self

    def close(self) -> None:
        """Let go of the file; an unfinished one stays as `.partial`."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._writer is not None:
            self.finish()
        elif self._writer is not None:
            self.close()

    @property
    def sites(self) -> dict[str, int]:
        """Width of each site."""
        return dict(self._file().sites)

    @property
    def n_rows(self) -> int:
        """Rows (prompts) of every site."""
        return self._file().n_rows

    @property
    def dtype(self) -> str:
        """ "f32", "f16" or "bf16"."""
        return self._file().dtype

    @property
    def metadata(self) -> dict[str, str]:
        """The free string map of the header."""
        return self._file().metadata

    def read(self, site: str) -> NDArray[np.float32]:
        """A site's matrix (n_rows, width)."""
        return self._mapped().read(site)

    def columns(self, site: str, rows: ArrayLike, standardize: bool = False) -> NDArray[np.float32]:
        """The points of the clustering, (len(rows), n_rows).

        `rows` are rows of the weight matrix, so columns of the store: one point a neuron, its values
        over all prompts. With `standardize`, each is brought to mean 0 and deviation 1 over prompts.
        """
        chosen = _integers(rows, np.int64, "rows")
        if chosen.size and int(chosen.min()) < 0:
            raise ValueError(f"rows hold `{int(chosen.min())}`: must not be negative")
        return self._mapped().columns(site, chosen.tolist(), bool(standardize))

    def fit_probes(
        self,
        y: ArrayLike,
        C: float = 1.0,
        sites: Sequence[str] | None = None,
        n_threads: int | None = None,
    ) -> dict[str, tuple[NDArray[np.float64], float]]:
        """One probe a site, side by side, straight from the map: site -> (coef, intercept)."""
        classes, _ = _two_classes(y)
        fits = self._mapped().fit_probes(
            classes,
            c=float(C),
            sites=None if sites is None else list(sites),
            n_threads=_threads(n_threads),
        )
        for name, (_, _, _, converged) in fits:
            if not converged:
                _warn_unconverged(f"the probe of site `{name}`", stacklevel=3)
        return {name: (coef, intercept) for name, (coef, intercept, _, _) in fits}

    def _file(self) -> _core.Store | _core.StoreWriter:
        file = self._store or self._writer
        if file is None:
            raise ValueError("the store is closed")
        return file

    def _mapped(self) -> _core.Store:
        if self._store is None:
            raise ValueError("the store is not open for reading: finish or open it first")
        return self._store


class FoldReport(NamedTuple):
    """What a fold did to one tensor."""

    sha256_before: str
    sha256_after: str
    rows: int
    changed: int
    """Elements whose bits changed."""


def fold_file(
    src: Path,
    dst: Path,
    edits: Mapping[str, tuple[ArrayLike, ArrayLike, Matrix]],
) -> dict[str, FoldReport]:
    """Copy a safetensors file with `delta[cluster[i]]` added to each row `rows[i]` of its tensors.

    `edits` maps a tensor's name to `(rows, cluster, delta)`: int (m,), int (m,), float32 (k, d_in).
    The sum is taken in float32 and rounded to the tensor's type, to nearest even. All other bytes
    stay. Everything is checked first; a failure leaves nothing behind. `dst` may be `src`.
    """
    plain = {}
    for name, (rows, cluster, delta) in edits.items():
        x, dtype = _bits(delta, 2, f"the delta of `{name}`")
        plain[name] = (
            _integers(rows, np.int32, f"rows of `{name}`"),
            _integers(cluster, np.int32, f"clusters of `{name}`"),
            _widen(x, dtype),
        )
    report = _core.fold_file(src, dst, plain)
    return {name: FoldReport(*entry) for name, entry in report.items()}


def tensor_sha256(path: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of the raw bytes of tensors of a safetensors file; of all without `names`."""
    return _core.tensor_sha256(path, None if names is None else list(names))
