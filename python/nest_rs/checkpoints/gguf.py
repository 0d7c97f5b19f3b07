"""A GGUF file, as llama.cpp reads it: whole rows are re-quantised, every other byte stays.

The arithmetic of the quantised types is the `gguf` package's, which is llama.cpp's own reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from nest_rs import _core
from nest_rs.checkpoints.base import Bytes, Checkpoint, Floats, Place, narrow, plain_places, state_of, widen
from nest_rs.errors import NestError

# The types we write, and how far (relative to their size) rows of each lie from the base's: up to twice what rounding
# costs a row of normally distributed weights.
_TOLERANCE = {
    "F32": 1e-6,
    "F16": 4e-4,
    "BF16": 3e-3,
    "Q8_0": 8e-3,
    "Q5_0": 0.065,
    "Q5_1": 0.065,
    "Q4_0": 0.13,
    "Q4_1": 0.13,
}
_PLAIN = ("F32", "F16", "BF16")


class GgufCheckpoint(Checkpoint):
    """Reads the header; the tensors stay where they are."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.parent, state_of(path))
        try:
            tensors, self._strings, self._numbers = _core.read_gguf(path)
        except (ValueError, OSError) as error:
            raise NestError(str(error)) from error
        self._tensors = {name: (kind, shape, begin, end) for name, kind, shape, begin, end in tensors}

    @cached_property
    def _names(self) -> TensorNameMap:
        known = self._strings.get("general.architecture", "")
        arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == known), None)
        blocks = self._numbers.get(f"{known}.block_count")
        if arch is None or blocks is None or blocks > 10_000:
            raise NestError(f"`{self.path}` has the architecture `{known}`, which the gguf package does not know")
        return get_tensor_name_map(arch, int(blocks))

    def files(self) -> list[Path]:
        return [self.path]

    def _find(self, name: str) -> tuple[int, list[int], int, int]:
        mapped = self._names.get_name(name, try_suffixes=(".weight",))
        found = self._tensors.get(mapped or "")
        if found is None:
            raise NestError(f"`{self.path}` has no tensor for `{name}`", mend="is this the patch's base?")
        return found

    def dtype(self, name: str) -> str:
        kind = self._find(name)[0]
        try:
            dtype = GGMLQuantizationType(kind).name
        except ValueError:
            dtype = str(kind)
        if dtype not in _TOLERANCE:
            raise NestError(
                f"`{name}` of `{self.path}` is stored as `{dtype}`, whose rows cannot be quantised here",
                mend=f"apply the patch to the F16 file, then quantise it (this reads {', '.join(_TOLERANCE)})",
            )
        return dtype

    def tolerance(self, name: str) -> float | None:
        return _TOLERANCE[self.dtype(name)]

    def locate(self, name: str, shape: Sequence[int], rows: NDArray[np.integer[Any]]) -> list[Place]:
        self.dtype(name)
        _, stored, begin, end = self._find(name)
        # GGUF gives the width first; a stack of experts counts as one matrix.
        found = [int(np.prod(stored[1:], dtype=np.int64)), stored[0]] if stored else []
        if found != list(shape):
            raise NestError(
                f"the tensor `{name}` of `{self.path}` has the shape `{found}`, the patch's base `{list(shape)}`",
                mend="is this the patch's base?",
            )
        return [plain_places(self.path.name, begin, (end - begin) // shape[0], rows)]

    def decode(self, name: str, stored: list[Bytes], width: int) -> Floats:
        dtype = self.dtype(name)
        if dtype in _PLAIN:
            return widen(stored[0], dtype, width)
        kind = GGMLQuantizationType[dtype]
        values: Floats = dequantize(stored[0], kind).reshape(-1, width)
        return values

    def encode(self, name: str, values: Floats, places: list[Place]) -> list[Bytes]:
        dtype = self.dtype(name)
        if dtype in _PLAIN:
            return [narrow(values, dtype)]
        return [np.ascontiguousarray(quantize(values, GGMLQuantizationType[dtype])).reshape(-1).view(np.uint8)]
