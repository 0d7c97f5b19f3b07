"""What a deployed form of a model must answer, and the three plain element types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nest_rs import _core
from nest_rs.errors import NestError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def narrow(values: Floats, dtype: str) -> Bytes:
    """Round float32 values to F32, F16 or BF16 (nearest even); their bytes."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(_TYPES[dtype])).reshape(-1).view(np.uint8)


def widen(stored: Bytes, dtype: str, width: int) -> Floats:
    """Bytes of F32, F16 or BF16 as float32 [n, width]."""
    values: Floats = stored.view(_TYPES[dtype]).reshape(-1, width).astype(np.float32)
    return values


class Place(NamedTuple):
    """Where rows lie in a file: row i begins at `offsets[i]` and has `items` items, `stride` bytes apart."""

    file: str
    item: int
    stride: int
    items: int
    offsets: list[int]


class Checkpoint(ABC):
    """A deployed model whose rows can be found, read and written.

    Attributes:
        path: What the user named.
        root: The folder its files lie in.
        state: The folder of its journal and undo records.
    """

    kind: str

    def __init__(self, path: Path, root: Path, state: Path) -> None:
        self.path, self.root, self.state = path, root, state

    @abstractmethod
    def files(self) -> list[Path]:
        """The files of which a copy consists."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """How a tensor is stored: F32, F16, BF16 or a quantised type's name."""

    @abstractmethod
    def locate(self, name: str, shape: Sequence[int], rows: NDArray[np.integer[Any]]) -> list[Place]:
        """Where rows of a tensor of the base, of shape (rows, width), lie here.

        Raises:
            NestError: there is no such tensor here, it has another shape, or it cannot be patched.
        """

    @abstractmethod
    def decode(self, name: str, stored: list[Bytes], width: int) -> Floats:
        """The values of rows, [n, width], from the bytes of their places."""

    @abstractmethod
    def encode(self, name: str, values: Floats, places: list[Place]) -> list[Bytes]:
        """The bytes of each place for rows of the given values."""

    def tolerance(self, name: str) -> float | None:
        """How far, relative to its size, a row may lie from the base's for want of precision; None if not at all."""
        return None

    def read(self, place: Place) -> Bytes:
        """The bytes of a place, row after row."""
        try:
            return _core.read_rows(self.root, place)
        except (ValueError, OSError) as error:
            raise NestError(str(error)) from error

    def check_writable(self, files: set[str]) -> None:
        """Refuse to change in place what other names share.

        Raises:
            NestError: a file is a link, or has a second name.
        """
        for name in sorted(files):
            path = self.root / name
            if path.is_symlink() or path.stat().st_nlink > 1:
                raise NestError(
                    f"`{path}` is a link or shares its bytes with another name; changing it in place would change both",
                    mend="write a copy with -o",
                )


def plain_places(file: str, begin: int, row_bytes: int, rows: NDArray[np.integer[Any]]) -> Place:
    """Rows that lie one after the other from `begin`."""
    offsets = begin + rows.astype(np.int64) * row_bytes
    return Place(file, row_bytes, row_bytes, 1, offsets.tolist())


def state_of(file: Path) -> Path:
    """Where the journal and the undo records of a single file lie."""
    return file.with_name(f".{file.name}.nest-rs")
