"""The compiled core. `nest_rs.numeric` is the layer to use.

Arrays are C-contiguous. `dtype` says what an `x` holds: "f32" for float32, "f16" or "bf16" for the
bits of halves in a uint16 array. Errors are ValueError, or OSError where the system refused.
"""

from os import PathLike
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]
_Path: TypeAlias = str | PathLike[str]
# labels, centers, inertia, n_iter, clusters in use
_Fit: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32], float, int, int]
# coef, intercept, n_iter, converged
_Probe: TypeAlias = tuple[NDArray[np.float64], float, int, bool]

__version__: str

def isa() -> str: ...
def kmeans_fit(
    x: _Array,
    dtype: str,
    n_clusters: int,
    *,
    metric: str,
    init: NDArray[np.float32] | None,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
    n_threads: int | None,
) -> _Fit: ...
def kmeans_sweep(
    x: _Array,
    dtype: str,
    ks: list[int],
    *,
    metric: str,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
    n_threads: int | None,
) -> list[tuple[int, _Fit, float | None]]: ...
def kmeans_predict(
    x: _Array,
    dtype: str,
    centers: NDArray[np.float32],
    *,
    metric: str,
    n_threads: int | None,
) -> NDArray[np.int32]: ...
def silhouette_samples(
    x: _Array,
    dtype: str,
    labels: NDArray[np.int32],
    *,
    metric: str,
    n_threads: int | None,
) -> tuple[float, NDArray[np.float64]]: ...
def probe_fit(
    x: _Array,
    dtype: str,
    y: NDArray[np.uint8],
    *,
    c: float,
    n_threads: int | None,
) -> _Probe: ...
def select_rows(coef: NDArray[np.float64], z: float, positive: bool) -> NDArray[np.int32]: ...
def masked_max(
    x: _Array,
    dtype: str,
    mask: NDArray[np.uint8],
    *,
    n_threads: int | None,
) -> _Array: ...
def fold_file(
    src: _Path,
    dst: _Path,
    edits: dict[str, tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]],
) -> dict[str, tuple[str, str, int, int]]: ...
def tensor_sha256(path: _Path, names: list[str] | None = None) -> dict[str, str]: ...
def read_header(
    path: _Path,
) -> tuple[list[tuple[str, str, list[int], int, int]], dict[str, str]]: ...

@final
class ClassStats:
    def __new__(cls, n_classes: int, d: int) -> ClassStats: ...
    def update(self, x: _Array, dtype: str, y: NDArray[np.uint8], *, n_threads: int | None) -> None: ...
    def merge(self, other: ClassStats) -> None: ...
    def copy(self) -> ClassStats: ...
    @staticmethod
    def from_parts(count: NDArray[np.int64], mean: NDArray[np.float64], m2: NDArray[np.float64]) -> ClassStats: ...
    @property
    def count(self) -> NDArray[np.int64]: ...
    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def var(self) -> NDArray[np.float64]: ...
    @property
    def m2(self) -> NDArray[np.float64]: ...

@final
class StoreWriter:
    @staticmethod
    def create(
        path: _Path,
        sites: list[tuple[str, int]],
        n_rows: int,
        dtype: str,
        metadata: dict[str, str],
    ) -> StoreWriter: ...
    @staticmethod
    def resume(path: _Path) -> StoreWriter: ...
    def write(self, site: str, start: int, block: _Array, dtype: str) -> None: ...
    def finish(self) -> Store: ...
    def close(self) -> None: ...
    @property
    def sites(self) -> list[tuple[str, int]]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...

@final
class Store:
    @staticmethod
    def open(path: _Path) -> Store: ...
    def read(self, site: str) -> NDArray[np.float32]: ...
    def columns(self, site: str, cols: list[int], standardize: bool) -> NDArray[np.float32]: ...
    def fit_probes(
        self,
        y: NDArray[np.uint8],
        *,
        c: float,
        sites: list[str] | None,
        n_threads: int | None,
    ) -> list[tuple[str, _Probe]]: ...
    @property
    def sites(self) -> list[tuple[str, int]]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...

# Patches.

_Bytes: TypeAlias = NDArray[np.uint8]
# file, item, stride, count, offsets
_Place: TypeAlias = tuple[str, int, int, int, list[int]]

@final
class RowEdit:
    def __new__(cls, dtype: str, cluster: NDArray[np.int32], delta: NDArray[np.float32]) -> RowEdit: ...
    def fold(self, old: _Bytes) -> _Bytes: ...
    def residual(self, old: _Bytes, new: _Bytes) -> _Bytes: ...
    def unfold(self, new: _Bytes, residual: _Bytes) -> _Bytes: ...

def read_rows(root: _Path, rows: _Place) -> _Bytes: ...
def recover(root: _Path, state: _Path) -> tuple[bool, str] | None: ...
def read_gguf(
    path: _Path,
) -> tuple[list[tuple[str, int, list[int], int, int]], dict[str, str], dict[str, int]]: ...

@final
class Change:
    def __new__(cls, remove: bool, patch: str, info: str, blocks: list[tuple[_Place, _Bytes, _Bytes]]) -> Change: ...
    @staticmethod
    def read(path: _Path) -> Change: ...
    def commit(self, root: _Path, state: _Path) -> None: ...
    def copy(self, src: _Path, dst: _Path) -> None: ...
    def note(self, state: _Path) -> None: ...
    @property
    def patch(self) -> str: ...
    @property
    def info(self) -> str: ...
    def blocks(self) -> list[tuple[_Place, _Bytes, _Bytes]]: ...
