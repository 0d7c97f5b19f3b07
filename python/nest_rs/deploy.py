"""Put a patch on a deployed model, take it off to the bit, and tell whether it is there.

One road for every form (`nest_rs.checkpoints`): the rows are found, compared with what the patch's base must hold,
computed, and written under a journal, so that a crash at any moment leaves the old rows, the new ones, or a journal
which the next command completes. The model is never loaded; memory is that of the touched rows.

Beside a target lies its state, `.nest-rs/` in a folder or `.<name>.nest-rs/` beside a file: one undo record a patch
that is on, with the bytes before and after (layout: `src/fold/journal.rs`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nest_rs import _core
from nest_rs.checkpoints import open_checkpoint
from nest_rs.checkpoints.base import Bytes, Checkpoint, Floats, Place, narrow, widen
from nest_rs.checkpoints.huggingface import HuggingFaceCheckpoint
from nest_rs.errors import NestError, listed
from nest_rs.files import new_folder
from nest_rs.models import BUILTIN, cache_dir
from nest_rs.patch import NestPatch, RowDelta, sketch

log = logging.getLogger(__name__)

State = Literal["clean", "patched", "other", "tampered"]
_CHUNK = 1 << 25  # bytes of a matrix read at a time


@dataclass
class Applied:
    """What `apply` or `remove` did.

    Attributes:
        path: The patched folder or file.
        patch: The patch's id.
        tensors: For each touched tensor `rows`, `elements`, `changed` (elements whose stored bits moved), and `kept`
            and `error`: the share of the delta that survives rounding into the stored type (1 is all of it), and the
            norm of the difference between the change that was meant and the one made, relative to the former.
    """

    path: Path
    patch: str
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        state: `clean` (the base), `patched` (by this patch), `other` (by another patch alone) or `tampered`.
        tensor: The first tensor, by name, that is not as it should be; None unless tampered.
        others: Ids of other patches that are on the target, by its undo records.
        exact: False where the target's precision allowed no more than a likeness.
    """

    state: State
    tensor: str | None = None
    others: tuple[str, ...] = ()
    exact: bool = True


@contextmanager
def _one_line() -> Iterator[None]:
    """The core's and the system's complaints, as the user's."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise NestError(str(error)) from error


def _sha256(*parts: Bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def _same(one: list[Bytes], two: list[Bytes]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


# Undo records.


class _Records:
    """The undo records of a target whose bytes are in place."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.found: dict[str, _core.Change] = {}
        for path in sorted(checkpoint.state.glob("undo-*")):
            with _one_line():
                change = _core.Change.read(path)
            self.found[change.patch] = change

    def in_place(self, patch: str) -> bool:
        """Whether the target holds what the record of that patch wrote."""
        change = self.found.get(patch)
        if change is None:
            return False
        known = {path.name for path in self.checkpoint.files()}
        return all(
            place[0] in known and np.array_equal(self.checkpoint.read(Place(*place)), new)
            for place, _, new in change.blocks()
        )

    def others(self, patch: str) -> list[str]:
        return [other for other in self.found if other != patch and self.in_place(other)]

    def originals(self, patches: list[str]) -> dict[tuple[str, int], Bytes]:
        """By file and offset of a row, what was there before those patches."""
        rows = {}
        for patch in patches:
            for place, old, _ in self.found[patch].blocks():
                for offset, row in zip(place[4], old.reshape(len(place[4]), -1), strict=True):
                    rows[place[0], offset] = row
        return rows


# One patch on one target.


@dataclass
class _Found:
    """A tensor's rows as the target holds them, and what they are."""

    places: list[Place]
    stored: list[Bytes]
    values: Floats
    state: Literal["before", "after", "other"]
    exact: bool
    lossless: bool = False  # the target holds the base's values themselves
    rows: Bytes | None = None  # the base's rows, or the patched ones, in the base's type


class _Work:
    def __init__(self, patch: NestPatch, target: Path, base: Path | None) -> None:
        if not patch.sealed:
            raise NestError(
                "the patch is not bound to a base: it holds no hashes and no residuals",
                mend="seal it: NestPatch.load(PATH).seal(BASE_FOLDER).save(PATH)",
            )
        self.patch, self.target, self._base_path = patch, target, base
        self.id = patch.id
        self.checkpoint = open_checkpoint(target)
        with _one_line():
            done = _core.recover(self.checkpoint.root, self.checkpoint.state)
        if done:
            log.info("completed an interrupted %s of the patch %s", "removal" if done[0] else "apply", done[1][:16])
        self.overlay: dict[tuple[str, int], Bytes] = {}

    @cached_property
    def records(self) -> _Records:
        return _Records(self.checkpoint)

    @cached_property
    def base(self) -> HuggingFaceCheckpoint | None:
        """The base's folder, if it was named or is at hand."""
        known = (self.patch.manifest.get("base") or {}).get("id")
        for folder in (self._base_path, Path(known) if known else None, cache_dir() / BUILTIN):
            if folder is None or (folder.name == BUILTIN and known != BUILTIN):
                continue
            if (folder / "config.json").is_file():
                return HuggingFaceCheckpoint(folder)
            if folder == self._base_path:
                raise NestError(f"no model folder at `{folder}`", mend="--base takes the patch's base")
        return None

    def seal_of(self, name: str) -> dict[str, Any]:
        seal: dict[str, Any] = self.patch.manifest["tensors"][name]
        return seal

    def read(self, place: Place) -> Bytes:
        """A place's bytes, with other patches' rows set back if that was asked for."""
        content = self.checkpoint.read(place)
        if self.overlay:
            rows = content.reshape(len(place.offsets), -1)
            for index, offset in enumerate(place.offsets):
                row = self.overlay.get((place.file, offset))
                if row is not None and len(row) == rows.shape[1]:
                    rows[index] = row
        return content

    def fold(self, name: str, old: Bytes) -> Bytes:
        change = self.patch.tensors[name]
        return _core.fold_rows(old, self.seal_of(name)["dtype"], change.cluster, change.delta)

    def find(self, name: str) -> _Found:
        """Read a tensor's rows and tell what they are."""
        seal, change = self.seal_of(name), self.patch.tensors[name]
        places = self.checkpoint.locate(name, seal["shape"], change.rows)
        return self.classify(name, places, [self.read(place) for place in places])

    def classify(self, name: str, places: list[Place], stored: list[Bytes]) -> _Found:
        """Compare rows with the base's and the patched ones: by hash, by the base, by the sketch."""
        seal, change = self.seal_of(name), self.patch.tensors[name]
        width = seal["shape"][1]
        values = self.checkpoint.decode(name, stored, width)
        found = _Found(places, stored, values, "other", exact=True)
        native = narrow(values, seal["dtype"])
        digest = _sha256(native)
        for state in ("before", "after"):
            if digest == seal[f"rows_sha256_{state}"] and self.encodes(name, native, found):
                return replace(found, state=state, lossless=True, rows=native)
        if self.checkpoint.dtype(name) == seal["dtype"]:
            return found
        old = self.base_rows(name)
        if old is not None:
            new = self.fold(name, old)
            if self.encodes(name, old, found):
                return replace(found, state="before", rows=old)
            if self.encodes(name, new, found):
                return replace(found, state="after", rows=new)
        tolerance = self.checkpoint.tolerance(name)
        if tolerance is not None and change.sketch is not None and np.isfinite(values).all():
            size = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)) * width)) or 1.0
            # The mean over few rows strays from its expectation.
            tolerance *= 1 + 3 / np.sqrt(2 * len(values))
            shift = sketch(change.delta)[change.cluster]
            here = sketch(values).astype(np.float64)
            errors = {
                "before": np.sqrt(np.mean((here - change.sketch) ** 2)) / size,
                "after": np.sqrt(np.mean((here - change.sketch - shift) ** 2)) / size,
            }
            nearest = min(errors, key=lambda state: errors[state])
            if errors[nearest] <= tolerance:
                return replace(found, state=nearest, exact=False)  # type: ignore[arg-type]
        return found

    def encodes(self, name: str, native: Bytes, found: _Found) -> bool:
        seal = self.seal_of(name)
        values = widen(native, seal["dtype"], seal["shape"][1])
        return _same(self.checkpoint.encode(name, values, found.places), found.stored)

    def base_rows(self, name: str) -> Bytes | None:
        if self.base is None:
            return None
        seal, change = self.seal_of(name), self.patch.tensors[name]
        places = self.base.locate(name, seal["shape"], change.rows)
        rows = np.concatenate([self.base.read(place) for place in places])
        if self.base.dtype(name) != seal["dtype"] or _sha256(rows) != seal["rows_sha256_before"]:
            raise NestError(f"`{self.base.path}` is not the patch's base: its `{name}` differs")
        return rows

    def whole_sha256(self, name: str) -> str | None:
        """SHA-256 of all of a tensor in the base's type; None where the target cannot hold it exactly."""
        seal = self.seal_of(name)
        digest = hashlib.sha256()
        for places, stored in self.chunks(name):
            values = self.checkpoint.decode(name, stored, seal["shape"][1])
            native = narrow(values, seal["dtype"])
            if self.checkpoint.dtype(name) != seal["dtype"] and not self.encodes(
                name, native, _Found(places, stored, values, "other", exact=True)
            ):
                return None
            digest.update(native.data)
        return digest.hexdigest()

    def chunks(self, name: str) -> Iterator[tuple[list[Place], list[Bytes]]]:
        count, width = self.seal_of(name)["shape"]
        step = max(1, _CHUNK // (4 * width))
        for start in range(0, count, step):
            rows = np.arange(start, min(start + step, count))
            places = self.checkpoint.locate(name, (count, width), rows)
            yield places, [self.read(place) for place in places]

    def refuse(self, name: str) -> NestError:
        """Why rows that are neither the base's nor this patch's stop the work."""
        own = {(place.file, offset) for place in self.find(name).places for offset in place.offsets}
        for other in self.records.others(self.id):
            if own & self.records.originals([other]).keys():
                return NestError(
                    f"`{self.target}` carries the patch `{other[:16]}` on the same rows of `{name}`",
                    mend="remove that one first",
                )
        stored = self.checkpoint.dtype(name)
        if stored != self.seal_of(name)["dtype"] and self.base is None:
            return NestError(
                f"`{name}` of `{self.target}` is stored as `{stored}`, which does not tell the base's rows exactly",
                mend="pass --base FOLDER, the patch's base",
            )
        return NestError(
            f"the rows of `{name}` in `{self.target}` are not those of the patch's base",
            mend="is this the right model, at the right revision, exported without calibration?",
        )

    def commit(self, change: _core.Change, out: Path | None, overwrite: bool) -> Path:
        """Write the change, in place or on a copy."""
        checkpoint = self.checkpoint
        if out is None:
            checkpoint.check_writable({place[0] for place, _, _ in change.blocks()})
            with _one_line():
                change.commit(checkpoint.root, checkpoint.state, durable=True)
            return self.target
        here = checkpoint.path.resolve()
        if here in (out.resolve(), *out.resolve().parents):
            raise NestError(f"the output `{out}` lies in the target", mend="name another one, or pass --in-place")
        with _one_line():
            if checkpoint.path.is_dir():
                self._copy_folder(change, out, overwrite)
            else:
                self._copy_file(change, out, overwrite)
        return out

    def _copy_folder(self, change: _core.Change, out: Path, overwrite: bool) -> None:
        checkpoint = self.checkpoint
        with new_folder(out, overwrite=overwrite) as scratch:
            for path in checkpoint.files():
                _core.copy_file(path, scratch / path.name)
            state = scratch / checkpoint.state.name
            if checkpoint.state.is_dir():
                shutil.copytree(checkpoint.state, state)
            # A copy that is cut short never takes its name, so it need not be flushed piece by piece.
            change.commit(scratch, state, durable=False)

    def _copy_file(self, change: _core.Change, out: Path, overwrite: bool) -> None:
        if out.exists() and not overwrite:
            raise NestError(f"the output `{out}` exists", mend="name another one or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        state = state_of(out)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            _core.copy_file(self.checkpoint.path, scratch / out.name)
            renamed = [((out.name, *place[1:]), old, new) for place, old, new in change.blocks()]
            change = _core.Change(json.loads(change.info)["remove"], change.patch, change.info, renamed)
            change.commit(scratch, scratch / state.name, durable=False)
            shutil.rmtree(state, ignore_errors=True)
            if (scratch / state.name).is_dir():
                (scratch / state.name).rename(state)
            (scratch / out.name).rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def change(self, remove: bool, blocks: list[tuple[Place, Bytes, Bytes]]) -> _core.Change:
        info = {"remove": remove, "base": self.patch.manifest.get("base"), "neurons": self.patch.neurons}
        return _core.Change(remove, self.id, json.dumps(info, sort_keys=True), blocks)  # type: ignore[arg-type]


def state_of(file: Path) -> Path:
    """Where the journal and the undo records of a single file lie."""
    return file.with_name(f".{file.name}.nest-rs")


def apply(
    patch: NestPatch, target: Path, *, out: Path | None = None, base: Path | None = None, overwrite: bool = False
) -> Applied:
    """Put a patch on a deployed model.

    Args:
        patch: A sealed patch.
        target: A Hugging Face folder, an ONNX folder or a GGUF file.
        out: Leave the target alone and write a copy; without it the rows change in place.
        base: The patch's base, for targets of less precision than it has; found by the manifest where that is possible.
        overwrite: Replace `out`.

    Raises:
        NestError: the target is not the patch's base, carries the patch already or another one on the same rows, or
            cannot be written. It is then as it was.
    """
    work = _Work(patch, target, base)
    blocks: list[tuple[Place, Bytes, Bytes]] = []
    report = {}
    states = set()
    for name in sorted(patch.tensors):
        change, seal = patch.tensors[name], work.seal_of(name)
        found = work.find(name)
        if found.state == "other":
            raise work.refuse(name)
        states.add(found.state)
        if states == {"before", "after"}:
            raise NestError(f"`{target}` carries the patch in part: `{name}` is not as the tensors before it")
        if found.state == "after":
            continue
        with _one_line():
            if found.rows is None:
                values = found.values + change.delta[change.cluster]
            else:
                new = work.fold(name, found.rows)
                if _sha256(new) != seal["rows_sha256_after"]:
                    raise NestError(f"the patch does not give the rows its manifest promises for `{name}`")
                values = widen(new, seal["dtype"], seal["shape"][1])
            encoded = work.checkpoint.encode(name, values, found.places)
        blocks += zip(found.places, found.stored, encoded, strict=True)
        after = work.checkpoint.decode(name, encoded, seal["shape"][1])
        report[name] = _survival(found.values, after, change)
    if states == {"after"}:
        raise NestError(f"`{target}` carries this patch already (`{work.id[:16]}`)")
    return Applied(work.commit(work.change(False, blocks), out, overwrite), work.id, report)


def _survival(before: Floats, after: Floats, change: RowDelta) -> dict[str, Any]:
    meant = change.delta[change.cluster].astype(np.float64)
    made = after.astype(np.float64) - before
    power = float(np.vdot(meant, meant)) or 1.0
    return {
        "rows": len(change.rows),
        "elements": meant.size,
        "changed": int(np.count_nonzero(made)),
        "kept": round(float(np.vdot(made, meant)) / power, 6),
        "error": round(float(np.sqrt(np.square(made - meant).sum() / power)), 6),
    }


def remove(
    patch: NestPatch, target: Path, *, out: Path | None = None, base: Path | None = None, overwrite: bool = False
) -> Applied:
    """Take a patch off a deployed model: every file is then what it was, to the bit.

    From the undo record beside the target; without one, from the patch's residuals where the target has the base's
    precision, else from the base.

    Args:
        patch: The patch that is on the target.
        target: As for `apply`.
        out: Leave the target alone and write a copy.
        base: The patch's base.
        overwrite: Replace `out`.

    Raises:
        NestError: the target does not carry the patch, or its original rows cannot be had. It is then as it was.
    """
    work = _Work(patch, target, base)
    own = work.records.found[work.id].blocks() if work.records.in_place(work.id) else []
    kept = {(place[0], tuple(place[4])): old for place, old, _ in own}
    blocks: list[tuple[Place, Bytes, Bytes]] = []
    for name in sorted(patch.tensors):
        change, seal = patch.tensors[name], work.seal_of(name)
        found = work.find(name)
        originals = [kept.get((place.file, tuple(place.offsets))) for place in found.places]
        whole = [old for old in originals if old is not None]
        if len(whole) == len(originals):
            if work.classify(name, found.places, whole).state == "before":
                blocks += zip(found.places, found.stored, whole, strict=True)
                continue
            raise NestError(f"the undo record of `{target}` does not hold the base's rows of `{name}`")
        if found.state == "other":
            raise work.refuse(name)
        if found.state == "before":
            raise NestError(f"`{target}` does not carry this patch: `{name}` holds the base's rows")
        if found.rows is None:
            raise NestError(
                f"the undo record of `{target}` is gone, and `{name}` is stored as `{work.checkpoint.dtype(name)}`",
                mend="pass --base FOLDER, the patch's base",
            )
        with _one_line():
            assert change.residual is not None
            old = _core.unfold_rows(found.rows, seal["dtype"], change.cluster, change.delta, change.residual)
        if _sha256(old) != seal["rows_sha256_before"]:
            raise NestError(f"the residual of `{name}` does not give back the base's rows", mend="is the patch whole?")
        encoded = work.checkpoint.encode(name, widen(old, seal["dtype"], seal["shape"][1]), found.places)
        blocks += zip(found.places, found.stored, encoded, strict=True)
    return Applied(work.commit(work.change(True, blocks), out, overwrite), work.id)


def verify(patch: NestPatch, target: Path, *, base: Path | None = None) -> Verdict:
    """Tell whether a deployed model is the patch's base, carries the patch, or neither.

    The touched tensors are read whole and compared with the manifest's hashes (where the target cannot hold the base's
    values exactly, the touched rows alone). Rows that another patch changed, by the undo record of that patch, count
    as they were before it.

    Args:
        patch: A sealed patch.
        target: As for `apply`.
        base: The patch's base, for targets of less precision.

    Raises:
        NestError: the target cannot be read or lacks a tensor.
    """
    work = _Work(patch, target, base)
    others = work.records.others(work.id)
    work.overlay = work.records.originals(others)
    applied = work.records.in_place(work.id)
    first: str | None = None
    exact = True
    for name in sorted(patch.tensors):
        found = work.find(name)
        state: str = found.state
        if applied and found.rows is None:
            # Of too little precision to be told by itself, but to the byte what the record says was written.
            state, found = "after", replace(found, exact=True)
        exact &= found.exact
        if state == "other" and work.checkpoint.dtype(name) != work.seal_of(name)["dtype"] and work.base is None:
            raise work.refuse(name)
        if found.lossless and state != "other":
            whole = work.whole_sha256(name)
            if whole is not None and whole != work.seal_of(name)[f"sha256_{state}"]:
                state = "other"
        first = first or state
        if state == "other" or state != first:
            return Verdict("tampered", name, tuple(others), exact)
    if first == "after":
        return Verdict("patched", None, tuple(others), exact)
    return Verdict("other" if others else "clean", None, tuple(others), exact)


def applied_patches(target: Path) -> dict[str, Any]:
    """What lies at a path: its kind, and the patches on it by its undo records."""
    checkpoint = open_checkpoint(target)
    with _one_line():
        _core.recover(checkpoint.root, checkpoint.state)
    records = _Records(checkpoint)
    return {
        "kind": checkpoint.kind,
        "patches": [
            {"id": patch, "in_place": records.in_place(patch), **json.loads(change.info)}
            for patch, change in records.found.items()
        ],
    }


def seal(patch: NestPatch, folder: Path) -> NestPatch:
    """Bind a patch to its base (see `NestPatch.seal`)."""
    base = HuggingFaceCheckpoint(folder)
    tensors, seals = {}, {}
    for name, change in sorted(patch.tensors.items()):
        shape, dtype = base.shape(name), base.dtype(name)
        if shape[1] != change.delta.shape[1] or change.rows[-1] >= shape[0]:
            raise NestError(
                f"the tensor `{name}` of `{folder}` has the shape `{list(shape)}`; the patch moves row "
                f"`{change.rows[-1]}`, {change.delta.shape[1]} wide"
            )
        before, after = hashlib.sha256(), hashlib.sha256()
        olds, news = [], []
        step = max(1, _CHUNK // (4 * shape[1]))
        for start in range(0, shape[0], step):
            rows: NDArray[Any] = np.arange(start, min(start + step, shape[0]))
            chunk = np.concatenate([base.read(place) for place in base.locate(name, shape, rows)])
            before.update(chunk.data)
            inside = (change.rows >= start) & (change.rows < start + step)
            if inside.any():
                table = chunk.reshape(len(rows), -1)
                picked = change.rows[inside] - start
                old = table[picked].reshape(-1)
                try:
                    new = _core.fold_rows(old, dtype, np.ascontiguousarray(change.cluster[inside]), change.delta)
                except ValueError as error:
                    raise NestError(f"`{name}`: {error}") from error
                table[picked] = new.reshape(len(picked), -1)
                olds.append(old)
                news.append(new)
            after.update(chunk.data)
        old, new = np.concatenate(olds), np.concatenate(news)
        tensors[name] = replace(
            change,
            residual=_core.residual(old, new, dtype, change.cluster, change.delta),
            sketch=sketch(widen(old, dtype, shape[1])),
        )
        seals[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "sha256_before": before.hexdigest(),
            "sha256_after": after.hexdigest(),
            "rows_sha256_before": _sha256(old),
            "rows_sha256_after": _sha256(new),
        }
    return NestPatch(tensors, {**patch.manifest, "tensors": seals})


def describe(patch: NestPatch) -> dict[str, Any]:
    """A patch in a few facts, its manifest included."""
    residual = sum(8 * len(change.residual) for change in patch.tensors.values() if change.residual is not None)
    elements = sum(len(change.rows) * change.delta.shape[1] for change in patch.tensors.values())
    return {
        "id": patch.id,
        "tensors": len(patch.tensors),
        "rows": patch.neurons,
        "clusters": patch.clusters,
        "trained": patch.trainable_params,
        "residual_bits_per_element": round(residual / elements, 3) if patch.sealed else None,
        "manifest": patch.manifest,
    }


def is_patch(path: Path) -> bool:
    """Whether a file is a patch, by its metadata alone."""
    if not path.is_file():
        return False
    try:
        return "nest_patch" in _core.read_header(path)[1]
    except (ValueError, OSError):
        return False


def name_list(patches: tuple[str, ...]) -> str:
    """Short ids for a message."""
    return listed(patch[:16] for patch in patches)
