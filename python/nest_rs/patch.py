"""The artefact: which rows of which matrices move, by how much, and on what base.

File format, version 1: an ordinary safetensors file, so byte by byte

- 8 bytes, u64 little-endian: the length n of the header;
- n bytes, the header: JSON that gives type, shape and place of each array, padded with spaces;
- the arrays, little-endian, one after the other.

For each touched tensor `T` of the checkpoint, with n rows in k clusters and rows of d elements, the arrays

- `T.rows`     int32 [n]       row numbers, ascending; of a stack of expert matrices, numbered through
- `T.cluster`  int16 [n]       the cluster of each row, from 0
- `T.delta`    float32 [k, d]  the shared delta of each cluster: new row = round(float32(old row) + delta)
- `T.tie`      float32 [n, k]  where ties were learned, how far each row follows each delta of its matrix: then
                               new row = round(float32(old row) + move), move = sum over c of tie[row, c] * delta[c],
                               every product and sum rounded to float32, in the order of c
- `T.residual` uint8 [m]       what rounding lost, for taking the delta off to the bit (see below)
- `T.sketch`   float32 [n, 2]  two sums of each original row under fixed signs, by which a quantised copy is known

and one metadata key, `nest_patch`: a JSON object with `format` ("nest-patch/1"), `sha256`, `tensors`, and what the
maker adds: `base` (id, revision), settings, data hashes, tool versions. `tensors` gives for each T its `dtype` (F32,
F16 or BF16), `shape` ([rows, d]), and SHA-256 in hexadecimal: `sha256_before` and `sha256_after` of all of its bytes,
`rows_sha256_before` and `rows_sha256_after` of the touched rows' bytes in ascending order.

`sha256` is the patch's id. It is taken over the JSON object without the keys `sha256` and `evidence` (sorted keys,
separators "," and ":", non-ASCII escaped), then for each array in the order of names over the line "name dtype shape"
(NumPy's names; the shape's numbers joined by "x"; ended by a newline) and its bytes.

`T.residual` is one raw DEFLATE stream (RFC 1951). Inflated, it holds for each element in row-major order the distance
from round(float32(new) - delta) to old, counted in steps between neighbouring numbers of the type with -0 one step
below 0, as a zigzag LEB128 number.

The signs of a sketch: with s(c) the SplitMix64 finaliser of (c + 1) * 0x9E3779B97F4A7C15, column c has the sign minus
in sum j where bit j of s(c) is set.

A patch that has not been sealed to a base (`NestPatch.seal`) has no residual, no sketch and no `tensors`; it can be
folded into a folder but not applied to, removed from or looked for in one.

`evidence`, if the patch was judged, is an object of its own (`nest_rs.evidence`) with its own `sha256`, over its other
keys written in the same way: what was measured later does not change the id of what was measured. The file holds no
time, so the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    from nest_rs.deploy import Applied, Verdict

FILE_NAME = "nest_patch.safetensors"
FORMAT = "nest-patch/1"
_HASHES = ("sha256_before", "sha256_after", "rows_sha256_before", "rows_sha256_after")
_DTYPES = {
    "rows": ("int32", 1),
    "cluster": ("int16", 1),
    "delta": ("float32", 2),
    "residual": ("uint8", 1),
    "sketch": ("float32", 2),
    "tie": ("float32", 2),
}


def tied(delta: Any, cluster: Any, tie: Any = None) -> Any:
    """What each row moves by, [n, d]; of NumPy arrays and torch tensors alike, to the same bits.

    Args:
        delta: float32 [k, d].
        cluster: Integers [n], the delta that each row follows.
        tie: float32 [n, k], how far it follows each; it then takes the place of `cluster`.
    """
    if tie is None:
        return delta[cluster]
    moved = tie[:, 0, None] * delta[0]
    for c in range(1, len(delta)):  # a matrix product would leave the order of the sum to a library
        moved = moved + tie[:, c, None] * delta[c]
    return moved


@dataclass(frozen=True)
class RowDelta:
    """The change of one matrix.

    Attributes:
        rows: int32 [n], ascending.
        cluster: int16 [n].
        delta: float32 [k, d_in].
        residual: uint8 [m], what rounding loses (module docstring); None before sealing.
        sketch: float32 [n, 2], sums of the original rows; None before sealing.
        tie: float32 [n, k], how far each row follows each delta; None where it follows its cluster's alone.
    """

    rows: NDArray[np.int32]
    cluster: NDArray[np.int16]
    delta: NDArray[np.float32]
    residual: NDArray[np.uint8] | None = None
    sketch: NDArray[np.float32] | None = None
    tie: NDArray[np.float32] | None = None

    @property
    def ties(self) -> NDArray[np.float32]:
        """How far each row follows each delta, float32 [n, k]; one-hot where that was not learned."""
        return np.eye(len(self.delta), dtype=np.float32)[self.cluster] if self.tie is None else self.tie

    @property
    def moves(self) -> NDArray[np.float32]:
        """What each row moves by, float32 [n, d_in]."""
        with np.errstate(over="ignore"):  # the fold says which row would not be finite
            moved: NDArray[np.float32] = tied(self.delta, self.cluster, self.tie)
        return moved

    def by_row(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The change as the core takes it: of each row the index of its move, int32 [n], and the moves [m, d_in]."""
        if self.tie is None:
            return self.cluster.astype(np.int32), self.delta
        return np.arange(len(self.rows), dtype=np.int32), self.moves

    @property
    def trained(self) -> int:
        """Numbers that were trained."""
        return self.delta.size + (0 if self.tie is None else self.tie.size)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of the file for tensor `name`."""
        found = ((part, getattr(self, part)) for part in _DTYPES)
        return {f"{name}.{part}": np.ascontiguousarray(value) for part, value in found if value is not None}


@dataclass
class NestPatch:
    """A set of row deltas by checkpoint tensor, with its manifest.

    Attributes:
        tensors: The change of each matrix, by its name in the checkpoint.
        manifest: What the patch is of and for; part of its id.
        evidence: What it was seen to do (`nest_rs.evidence`), if it was judged; no part of its id.
    """

    tensors: dict[str, RowDelta]
    manifest: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None

    @property
    def trainable_params(self) -> int:
        """Numbers that were trained: clusters times row width, and rows times clusters where ties were learned."""
        return sum(change.trained for change in self.tensors.values())

    @property
    def neurons(self) -> int:
        """Rows that move."""
        return sum(len(change.rows) for change in self.tensors.values())

    @property
    def clusters(self) -> int:
        """Shared deltas."""
        return sum(len(change.delta) for change in self.tensors.values())

    @property
    def sealed(self) -> bool:
        """Whether the patch is bound to the bytes of a base."""
        return "tensors" in self.manifest

    @property
    def id(self) -> str:
        """SHA-256 of arrays and manifest, 64 hexadecimal digits."""
        digest = hashlib.sha256(_canonical({"format": FORMAT, **self.manifest}))
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype} {'x'.join(map(str, array.shape))}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {key: array for name, change in self.tensors.items() for key, array in change.arrays(name).items()}

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
                    tie=layer.nest_tie[adapter].detach().float().cpu().numpy() if adapter in layer.nest_tie else None,
                )
        return cls(tensors, dict(manifest))

    def document(self) -> dict[str, Any]:
        """All but the arrays: format, id, manifest and evidence."""
        evidence = {} if self.evidence is None else {"evidence": self.evidence}
        return {"format": FORMAT, "sha256": self.id, **self.manifest, **evidence}

    def save(self, path: Path) -> None:
        """Write the patch file."""
        # One key alone: safetensors writes a metadata map in no fixed order.
        text = json.dumps(self.document(), sort_keys=True)
        with replacing(Path(path)) as scratch:
            save_file(self._arrays(), scratch, metadata={"nest_patch": text})

    @classmethod
    def load(cls, path: Path | str) -> NestPatch:
        """Read and check a patch file, or the one in a run's folder `patch`.

        Raises:
            NestError: not a patch, of another version, inconsistent, or changed since it was written.
        """
        path = patch_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise NestError(f"cannot read the patch `{path}` ({error})") from error
        try:
            manifest = json.loads(metadata["nest_patch"])
            version = manifest.pop("format")
            digest = manifest.pop("sha256", None)
            evidence = manifest.pop("evidence", None)
        except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise NestError(f"`{path}` is not a NeST patch", mend="it has no nest_patch metadata") from error
        if version != FORMAT:
            raise NestError(f"`{path}` has the format `{version}`", mend=f"this version reads {FORMAT}")
        patch = cls(_check(arrays, path), manifest, evidence)
        if patch.sealed:
            _check_seal(patch, path)
        if digest != patch.id:
            raise NestError(
                f"the patch `{path}` was changed after it was written: its SHA-256 is not `{digest}`",
                mend="get it again from its maker",
            )
        if evidence is not None and (
            not isinstance(evidence, dict) or evidence.get("sha256") != evidence_sha256(evidence)
        ):
            raise NestError(
                f"the evidence in the patch `{path}` was changed after it was written",
                mend="get it again from its maker",
            )
        return patch

    def seal(self, folder: Path) -> NestPatch:
        """Bind the patch to a base: its rows' residuals and sketches, and hashes before and after.

        Args:
            folder: The Hugging Face folder the deltas were trained on.

        Raises:
            NestError: the folder lacks a tensor, shapes do not fit, or a row would not be finite.
        """
        from nest_rs.deploy import seal

        return seal(self, Path(folder))

    def apply(
        self, target: Path | str, *, out: Path | None = None, base: Path | None = None, overwrite: bool = False
    ) -> Applied:
        """Put the patch on a checkpoint, in place or on a copy (see `nest_rs.deploy.apply`)."""
        from nest_rs.deploy import apply

        return apply(self, Path(target), out=out, base=base, overwrite=overwrite)

    def remove(
        self, target: Path | str, *, out: Path | None = None, base: Path | None = None, overwrite: bool = False
    ) -> Applied:
        """Take the patch off a checkpoint, bit for bit (see `nest_rs.deploy.remove`)."""
        from nest_rs.deploy import remove

        return remove(self, Path(target), out=out, base=base, overwrite=overwrite)

    def verify(self, target: Path | str, *, base: Path | None = None, others: Sequence[NestPatch] = ()) -> Verdict:
        """Tell whether a checkpoint carries the patch (see `nest_rs.deploy.verify`)."""
        from nest_rs.deploy import verify

        return verify(self, Path(target), base=base, others=others)

    def to_lora(self, out: Path, *, overwrite: bool = False) -> Path:
        """Write the patch as a PEFT LoRA adapter (see `nest_rs.adapter.write_lora`)."""
        from nest_rs.adapter import write_lora

        return write_lora(self, Path(out), overwrite=overwrite)

    def diff(self, other: NestPatch) -> dict[str, dict[str, Any]]:
        """Compare two patches, tensor by tensor.

        Returns:
            For each tensor that differs: `rows_here`, `rows_there` (rows of one alone), `rows_both`, and `distance`,
            the L2 norm of the difference of the two dense changes. Empty if the patches move the same rows equally.
        """
        out: dict[str, dict[str, Any]] = {}
        for name in sorted(self.tensors.keys() | other.tensors.keys()):
            here, there = self.tensors.get(name), other.tensors.get(name)
            mine = {} if here is None else dict(zip(here.rows.tolist(), here.moves, strict=True))
            theirs = {} if there is None else dict(zip(there.rows.tolist(), there.moves, strict=True))
            widths = {change.delta.shape[1] for change in (here, there) if change is not None}
            if len(widths) > 1:
                raise NestError(f"the patches disagree on the width of `{name}`", mend="are they for the same base?")
            zero = np.zeros(widths.pop(), np.float32)
            squares = sum(
                float(np.square(mine.get(row, zero).astype(np.float64) - theirs.get(row, zero)).sum())
                for row in mine.keys() | theirs.keys()
            )
            if mine.keys() != theirs.keys() or squares:
                out[name] = {
                    "rows_here": len(mine.keys() - theirs.keys()),
                    "rows_there": len(theirs.keys() - mine.keys()),
                    "rows_both": len(mine.keys() & theirs.keys()),
                    "distance": float(np.sqrt(squares)),
                }
        return out

    def compose(self, other: NestPatch, *, base: Path | None = None) -> NestPatch:
        """One patch that does what both do, for patches of one base that share no row.

        Args:
            other: The other patch.
            base: The base's folder; the result is then sealed to it.

        Raises:
            NestError: the patches move the same row, or are sealed to different bases.
        """
        tensors = dict(self.tensors)
        for name, change in other.tensors.items():
            mine = tensors.get(name)
            seals = [patch.manifest.get("tensors", {}).get(name) for patch in (self, other)]
            if all(seals) and any(seals[0][key] != seals[1][key] for key in ("dtype", "shape", "sha256_before")):
                raise NestError(f"the patches were made for different bases: `{name}` is not the same in both")
            if mine is None:
                tensors[name] = replace(change, residual=None, sketch=None)
                continue
            shared = np.intersect1d(mine.rows, change.rows)
            if len(shared):
                raise NestError(
                    f"both patches move the row `{shared[0]}` of `{name}` ({len(shared)} rows in all)",
                    mend="only patches on disjoint rows can be composed",
                )
            if mine.delta.shape[1] != change.delta.shape[1]:
                raise NestError(f"the patches disagree on the width of `{name}`", mend="are they for the same base?")
            order = np.argsort(rows := np.concatenate([mine.rows, change.rows]))
            cluster = np.concatenate([mine.cluster, change.cluster + np.int16(len(mine.delta))])
            tie = _side_by_side(mine, change)
            tensors[name] = RowDelta(
                rows[order],
                cluster[order],
                np.concatenate([mine.delta, change.delta]),
                tie=None if tie is None else tie[order],
            )
        tensors = {name: replace(change, residual=None, sketch=None) for name, change in tensors.items()}
        manifest = {"base": self.manifest.get("base"), "composed": [self.id, other.id]}
        both = NestPatch(dict(sorted(tensors.items())), manifest)
        return both.seal(base) if base is not None else both


def _side_by_side(one: RowDelta, other: RowDelta) -> NDArray[np.float32] | None:
    """The ties of two changes that share no row, [n + n', k + k']; None where neither has any."""
    if one.tie is None and other.tie is None:
        return None
    first, second = one.ties, other.ties
    apart = np.zeros((len(first), second.shape[1]), np.float32), np.zeros((len(second), first.shape[1]), np.float32)
    return np.block([[first, apart[0]], [apart[1], second]])


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def evidence_sha256(evidence: dict[str, Any]) -> str:
    """SHA-256 of a patch's evidence without its key `sha256`, in hexadecimal."""
    return hashlib.sha256(_canonical({key: value for key, value in evidence.items() if key != "sha256"})).hexdigest()


def sketch(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two sums of each row under fixed signs: float32 [n, d] -> [n, 2] (taken in float64)."""
    # SplitMix64: each column's signs are a function of its number alone.
    with np.errstate(over="ignore"):
        bits = (np.arange(rows.shape[1], dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    minus = np.stack([bits >> np.uint64(j) & np.uint64(1) for j in range(2)], axis=1)
    return (rows.astype(np.float64) @ (1.0 - 2.0 * minus.astype(np.float64))).astype(np.float32)


def patch_file(path: Path | str) -> Path:
    """The file that a path names: itself, or the patch in a folder.

    Raises:
        NestError: a folder without a patch.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / FILE_NAME).is_file():
        raise NestError(f"the folder `{path}` holds no patch", mend=f"name the file, `{FILE_NAME}` of a run")
    return path / FILE_NAME


def _check(arrays: Mapping[str, NDArray[Any]], path: Path | str) -> dict[str, RowDelta]:
    if not arrays:
        raise NestError(f"the patch `{path}` moves nothing", mend="it holds no tensor")
    unknown = [name for name in arrays if name.rpartition(".")[2] not in _DTYPES]
    if unknown:
        raise NestError(f"the patch `{path}` has the unknown array `{unknown[0]}`")
    tensors = {}
    for name in sorted({name.rpartition(".")[0] for name in arrays}):
        parts = {part: arrays.get(f"{name}.{part}") for part in _DTYPES}
        missing = [part for part in ("rows", "cluster", "delta") if parts[part] is None]
        if missing:
            raise NestError(f"the patch `{path}` lacks the array `{name}.{missing[0]}`")
        change = RowDelta(**parts)  # type: ignore[arg-type]
        typed = all(
            str(array.dtype) == _DTYPES[part][0] and array.ndim == _DTYPES[part][1]
            for part, array in parts.items()
            if array is not None
        )
        rows, cluster, delta = change.rows, change.cluster, change.delta
        right = (
            typed
            and len(rows) == len(cluster) > 0
            and rows[0] >= 0
            and bool((np.diff(rows.astype(np.int64)) > 0).all())
            and cluster.min() >= 0
            and cluster.max() < len(delta)
            and delta.shape[1] > 0
            and bool(np.isfinite(delta).all())
            and (change.tie is None or (change.tie.shape == (len(rows), len(delta)) and np.isfinite(change.tie).all()))
            and (change.residual is None) == (change.sketch is None)
            and (change.sketch is None or (change.sketch.shape == (len(rows), 2) and np.isfinite(change.sketch).all()))
        )
        if not right:
            raise NestError(f"the patch `{path}` has inconsistent rows, clusters or deltas for `{name}`")
        tensors[name] = change
    return tensors


def _check_seal(patch: NestPatch, path: Path | str) -> None:
    seals = patch.manifest["tensors"]
    if not isinstance(seals, dict) or seals.keys() != patch.tensors.keys():
        raise NestError(f"the patch `{path}` has a manifest for other tensors than it moves")
    for name, change in patch.tensors.items():
        seal = seals[name]
        shape = seal.get("shape") if isinstance(seal, dict) else None
        right = (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(size) is int for size in shape)
            and shape[1] == change.delta.shape[1]
            and change.rows[-1] < shape[0] < 2**31
            and seal.get("dtype") in ("F32", "F16", "BF16")
            and all(re.fullmatch("[0-9a-f]{64}", str(seal.get(key))) for key in _HASHES)
            and change.residual is not None
        )
        if not right:
            raise NestError(f"the patch `{path}` has a manifest that does not fit `{name}`")
