"""The artefact: which rows of which matrices move, by how much, and on what base.

File format, version 1 (an ordinary safetensors file). For each touched tensor `T` of the checkpoint:

- `T.rows`     int32 [n]      row numbers, ascending
- `T.cluster`  int16 [n]      the cluster of each row, from 0
- `T.delta`    float32 [k, d] the shared delta of each cluster, added to every row of it

and one metadata key, `nest_patch`: a JSON object with `format`, `base` (id, revision), the settings, data hashes, tool
versions, and the SHA-256 of each touched tensor of the base. It holds no time and no measurement, so the same run gives
the same bytes; what came after (hashes once folded, evaluation) stands in `nest_patch.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nest_rs.errors import NestError
from nest_rs.files import replacing

if TYPE_CHECKING:
    from torch import nn

FORMAT = "nest-patch/1"


@dataclass(frozen=True)
class RowDelta:
    """The change of one matrix.

    Attributes:
        rows: int32 [n], ascending.
        cluster: int16 [n].
        delta: float32 [k, d_in].
    """

    rows: NDArray[np.int32]
    cluster: NDArray[np.int16]
    delta: NDArray[np.float32]


@dataclass
class NestPatch:
    """A set of row deltas by checkpoint tensor, with its manifest."""

    tensors: dict[str, RowDelta]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def trainable_params(self) -> int:
        """Numbers that were trained: clusters times row width, summed."""
        return sum(change.delta.size for change in self.tensors.values())

    @property
    def neurons(self) -> int:
        """Rows that move."""
        return sum(len(change.rows) for change in self.tensors.values())

    @property
    def clusters(self) -> int:
        """Shared deltas."""
        return sum(len(change.delta) for change in self.tensors.values())

    @classmethod
    def from_model(cls, model: nn.Module, adapter: str = "default", **manifest: Any) -> NestPatch:
        """Take the trained deltas out of a PEFT model with a `NestConfig` adapter."""
        from nest_rs.tuner import NestLinear

        tensors = {}
        for name, layer in model.named_modules():
            if isinstance(layer, NestLinear) and adapter in layer.nest_delta:
                tensors[f"{name.removeprefix('base_model.model.')}.weight"] = RowDelta(
                    layer.nest_rows[adapter].cpu().numpy().astype(np.int32),
                    layer.nest_cluster[adapter].cpu().numpy().astype(np.int16),
                    layer.nest_delta[adapter].detach().float().cpu().numpy(),
                )
        return cls(tensors, dict(manifest))

    def save(self, path: Path) -> None:
        """Write the patch file."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, change in self.tensors.items():
            arrays |= {f"{name}.rows": change.rows, f"{name}.cluster": change.cluster, f"{name}.delta": change.delta}
        # One key alone: safetensors writes a metadata map in no fixed order.
        text = json.dumps({"format": FORMAT, **self.manifest}, sort_keys=True)
        with replacing(Path(path)) as scratch:
            save_file(arrays, scratch, metadata={"nest_patch": text})

    @classmethod
    def load(cls, path: Path | str) -> NestPatch:
        """Read and check a patch file.

        Raises:
            NestError: not a patch, of another version, or inconsistent.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise NestError(f"cannot read the patch `{path}` ({error})") from error
        try:
            manifest = json.loads(metadata["nest_patch"])
            version = manifest.pop("format")
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise NestError(f"`{path}` is not a NeST patch", mend="it has no nest_patch metadata") from error
        if version != FORMAT:
            raise NestError(f"`{path}` has the format `{version}`", mend=f"this version reads {FORMAT}")
        return cls(_check(arrays, path), manifest)


def _check(arrays: Mapping[str, NDArray[Any]], path: Path | str) -> dict[str, RowDelta]:
    if not arrays:
        raise NestError(f"the patch `{path}` moves nothing", mend="it holds no tensor")
    unknown = [name for name in arrays if name.rpartition(".")[2] not in ("rows", "cluster", "delta")]
    if unknown:
        raise NestError(f"the patch `{path}` has the unknown array `{unknown[0]}`")
    names = sorted({name.rpartition(".")[0] for name in arrays})
    tensors = {}
    for name in names:
        try:
            change = RowDelta(arrays[f"{name}.rows"], arrays[f"{name}.cluster"], arrays[f"{name}.delta"])
        except KeyError as error:
            raise NestError(f"the patch `{path}` lacks the array `{error.args[0]}`") from error
        rows, cluster, delta = change.rows, change.cluster, change.delta
        right = (
            [str(array.dtype) for array in (rows, cluster, delta)] == ["int32", "int16", "float32"]
            and (rows.ndim, cluster.ndim, delta.ndim) == (1, 1, 2)
            and len(rows) == len(cluster) > 0
            and rows[0] >= 0
            and bool((np.diff(rows) > 0).all())
            and cluster.min() >= 0
            and cluster.max() < len(delta)
            and bool(np.isfinite(delta).all())
        )
        if not right:
            raise NestError(f"the patch `{path}` has inconsistent rows, clusters or deltas for `{name}`")
        tensors[name] = change
    return tensors
