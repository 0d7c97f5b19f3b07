"""A Hugging Face folder: one safetensors file, or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_rs import _core
from nest_rs.checkpoints.base import Bytes, Checkpoint, Floats, Place, narrow, plain_places, widen
from nest_rs.errors import NestError
from nest_rs.files import read_json

INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint beside its weights; other weight formats would be stale after a change.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")

# transformers 5 holds a layer's experts as one stack, [experts, gate rows then up rows, width]; on disk many models
# have one matrix an expert. In memory: `<block>.experts.gate_up_proj`; on disk: block, gate and up of each expert.
_EXPERTS = (
    (r"\.mlp$", ".mlp", "gate_proj", "up_proj"),  # Qwen2/3-MoE, OLMoE, DeepSeek, GLM-4-MoE
    (r"\.mlp$", ".block_sparse_moe", "w1", "w3"),  # Mixtral
    (r"\.block_sparse_moe$", ".block_sparse_moe", "w1", "w3"),
    (r"\.feed_forward$", ".feed_forward", "gate_proj", "up_proj"),
)


class _Tensor(NamedTuple):
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class HuggingFaceCheckpoint(Checkpoint):
    """Reads the shards' headers; the tensors stay where they are."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        super().__init__(path, path, path / ".nest-rs")
        self._matrices: dict[str, list[_Tensor]] = {}

    @cached_property
    def shards(self) -> list[str]:
        """File names of the shards.

        Raises:
            NestError: there is none, or the index names something that is not a file of this folder.
        """
        if (self.root / INDEX).is_file():
            index = read_json(self.root / INDEX)
            table = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
                raise NestError(f"the index `{self.root / INDEX}` has no weight_map")
            names = sorted(set(table.values()))
        else:
            names = sorted(path.name for path in self.root.glob("*.safetensors"))
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
                raise NestError(f"the index of `{self.root}` names the shard `{name}`, which is not in this folder")
            if not (self.root / name).is_file():
                raise NestError(f"the shard `{name}` of `{self.root}` is missing")
        if not names:
            raise NestError(f"no .safetensors weights in `{self.root}`")
        return names

    @cached_property
    def tensors(self) -> dict[str, _Tensor]:
        """All tensors by name."""
        found: dict[str, _Tensor] = {}
        for shard in self.shards:
            try:
                header, _ = _core.read_header(self.root / shard)
            except (ValueError, OSError) as error:
                raise NestError(str(error)) from error
            for name, dtype, shape, begin, end in header:
                if name in found:
                    raise NestError(f"the tensor `{name}` is in both `{found[name].file}` and `{shard}`")
                found[name] = _Tensor(shard, dtype, tuple(shape), begin, end)
        return found

    def files(self) -> list[Path]:
        small = {path for pattern in SMALL_FILES for path in self.root.glob(pattern) if path.is_file()}
        return [self.root / shard for shard in self.shards] + sorted(small)

    def matrix(self, name: str) -> list[_Tensor]:
        """The tensors on disk that make up a matrix of the model, in the order of its rows.

        Raises:
            NestError: no such tensor, or not one of F32, F16 or BF16.
        """
        if name not in self._matrices:
            parts = self._find(name)
            for part in parts:
                if part.dtype not in ("F32", "F16", "BF16"):
                    raise NestError(f"the tensor `{name}` is stored as `{part.dtype}`", mend="use F32, F16 or BF16")
                if len(part.shape) < 2 or part.shape[-1] != parts[0].shape[-1] or part.dtype != parts[0].dtype:
                    raise NestError(f"the tensor `{name}` has the shape `{list(part.shape)}`, not that of a matrix")
            self._matrices[name] = parts
        return self._matrices[name]

    def _find(self, name: str) -> list[_Tensor]:
        if name in self.tensors:
            return [self.tensors[name]]
        match = re.fullmatch(r"(?P<block>.+)\.experts\.gate_up_proj(\.weight)?", name)
        for pattern, block, gate, up in _EXPERTS if match else ():
            assert match is not None
            if not re.search(pattern, match["block"]):
                continue
            prefix = re.sub(pattern, block, match["block"]) + ".experts"
            parts: list[_Tensor] = []
            expert = 0
            while f"{prefix}.{expert}.{gate}.weight" in self.tensors:
                for projection in (gate, up):
                    part = self.tensors.get(f"{prefix}.{expert}.{projection}.weight")
                    if part is None:
                        raise NestError(f"`{self.path}` has no tensor `{prefix}.{expert}.{projection}.weight`")
                    parts.append(part)
                expert += 1
            if parts:
                return parts
        raise NestError(f"`{self.path}` has no tensor `{name}`", mend="is this the patch's base?")

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and width of a matrix; a stack of matrices counts as one, its rows numbered through."""
        parts = self.matrix(name)
        return sum(_rows(part) for part in parts), parts[0].shape[-1]

    def dtype(self, name: str) -> str:
        return self.matrix(name)[0].dtype

    def locate(self, name: str, shape: Sequence[int], rows: NDArray[np.integer[Any]]) -> list[Place]:
        found = self.shape(name)
        if found != tuple(shape):
            raise NestError(
                f"the tensor `{name}` of `{self.path}` has the shape `{list(found)}`, the patch's base `{list(shape)}`",
                mend="is this the patch's base?",
            )
        places, first = [], 0
        for part in self.matrix(name):
            count = _rows(part)
            inside = rows[(rows >= first) & (rows < first + count)] - first
            if len(inside):
                places.append(plain_places(part.file, part.begin, (part.end - part.begin) // count, inside))
            first += count
        return places

    def decode(self, name: str, stored: list[Bytes], width: int) -> Floats:
        return widen(np.concatenate(stored), self.dtype(name), width)

    def encode(self, name: str, values: Floats, places: list[Place]) -> list[Bytes]:
        content = narrow(values, self.dtype(name))
        ends = np.cumsum([place.item * len(place.offsets) for place in places])
        return np.split(content, ends[:-1])


def _rows(part: _Tensor) -> int:
    return int(np.prod(part.shape[:-1], dtype=np.int64))
