"""A patch held against a target: are the rows there the base's, the patched ones, or neither?"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nest_rs import _core
from nest_rs.checkpoints import open_checkpoint
from nest_rs.checkpoints.base import Bytes, Floats, Place, narrow, widen
from nest_rs.checkpoints.huggingface import HuggingFaceCheckpoint
from nest_rs.deploy.common import CHUNK, one_line, same, sha256
from nest_rs.deploy.records import Records, Rows, split
from nest_rs.errors import NestError
from nest_rs.models import BUILTIN, cache_dir
from nest_rs.patch import NestPatch, sketch

log = logging.getLogger(__name__)


@dataclass
class Found:
    """A tensor's rows as the target holds them, and what they are."""

    places: list[Place]
    stored: list[Bytes]
    values: Floats
    state: Literal["before", "after", "other"]
    exact: bool
    lossless: bool = False  # the target holds the base's values themselves
    rows: Bytes | None = None  # the base's rows, or the patched ones, in the base's type


class Target:
    """A sealed patch and a checkpoint: what its rows are, before anything is changed."""

    def __init__(self, patch: NestPatch, path: Path, base: Path | None) -> None:
        if not patch.sealed:
            raise NestError(
                "the patch is not bound to a base: it holds no hashes and no residuals",
                mend="seal it: NestPatch.load(PATH).seal(BASE_FOLDER).save(PATH)",
            )
        self.patch, self.path, self._base_path = patch, path, base
        self.id = patch.id
        self.checkpoint = open_checkpoint(path)
        with one_line():
            done = _core.recover(self.checkpoint.root, self.checkpoint.state)
        if done:
            log.info("completed an interrupted %s of the patch %s", "removal" if done[0] else "apply", done[1][:16])
        self.overlay: Rows = {}

    @cached_property
    def records(self) -> Records:
        return Records(self.checkpoint)

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

    def edit(self, name: str) -> _core.RowEdit:
        """The arithmetic of one tensor's deltas."""
        return _core.RowEdit(self.seal_of(name)["dtype"], *self.patch.tensors[name].by_row())

    def find(self, name: str) -> Found:
        """Read a tensor's rows and tell what they are."""
        seal, change = self.seal_of(name), self.patch.tensors[name]
        places = self.checkpoint.locate(name, seal["shape"], change.rows)
        return self.classify(name, places, [self.read(place) for place in places])

    def classify(self, name: str, places: list[Place], stored: list[Bytes]) -> Found:
        """Compare rows with the base's and the patched ones: by hash, by the base, by the sketch."""
        seal, change = self.seal_of(name), self.patch.tensors[name]
        width = seal["shape"][1]
        values = self.checkpoint.decode(name, stored, width)
        found = Found(places, stored, values, "other", exact=True)
        native = narrow(values, seal["dtype"])
        digest = sha256(native)
        for state in ("before", "after"):
            if digest == seal[f"rows_sha256_{state}"] and self.encodes(name, native, found):
                return replace(found, state=state, lossless=True, rows=native)
        if self.checkpoint.dtype(name) == seal["dtype"]:
            return found
        old = self.base_rows(name)
        if old is not None:
            new = self.edit(name).fold(old)
            if self.encodes(name, old, found):
                return replace(found, state="before", rows=old)
            if self.encodes(name, new, found):
                return replace(found, state="after", rows=new)
        tolerance = self.checkpoint.tolerance(name)
        if tolerance is not None and change.sketch is not None and np.isfinite(values).all():
            size = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)) * width)) or 1.0
            # The mean over few rows strays from its expectation.
            tolerance *= 1 + 3 / np.sqrt(2 * len(values))
            shift = sketch(change.moves)
            here = sketch(values).astype(np.float64)
            errors = {
                "before": np.sqrt(np.mean((here - change.sketch) ** 2)) / size,
                "after": np.sqrt(np.mean((here - change.sketch - shift) ** 2)) / size,
            }
            nearest = min(errors, key=lambda state: errors[state])
            if errors[nearest] <= tolerance:
                return replace(found, state=nearest, exact=False)  # type: ignore[arg-type]
        return found

    def unfold(self, name: str, found: Found) -> list[Bytes]:
        """What the places of a patched tensor held before, by the patch's residuals.

        Raises:
            NestError: the target does not hold the patched rows exactly, and the base is not at hand.
        """
        seal, change = self.seal_of(name), self.patch.tensors[name]
        if found.rows is None:
            raise NestError(
                f"the undo record of `{self.path}` is gone, and `{name}` is stored as `{self.checkpoint.dtype(name)}`",
                mend="pass --base FOLDER, the patch's base",
            )
        with one_line():
            assert change.residual is not None
            old = self.edit(name).unfold(found.rows, change.residual)
        if sha256(old) != seal["rows_sha256_before"]:
            raise NestError(f"the residual of `{name}` does not give back the base's rows", mend="is the patch whole?")
        return self.checkpoint.encode(name, widen(old, seal["dtype"], seal["shape"][1]), found.places)

    def originals(self) -> Rows | None:
        """What the patch's rows held before it; None unless all of it is on the target."""
        rows: Rows = {}
        for name in sorted(self.patch.tensors):
            found = self.find(name)
            if found.state != "after":
                return None
            for place, old in zip(found.places, self.unfold(name, found), strict=True):
                rows |= split(place, old)
        return rows

    def encodes(self, name: str, native: Bytes, found: Found) -> bool:
        seal = self.seal_of(name)
        values = widen(native, seal["dtype"], seal["shape"][1])
        return same(self.checkpoint.encode(name, values, found.places), found.stored)

    def base_rows(self, name: str) -> Bytes | None:
        if self.base is None:
            return None
        seal, change = self.seal_of(name), self.patch.tensors[name]
        places = self.base.locate(name, seal["shape"], change.rows)
        rows = np.concatenate([self.base.read(place) for place in places])
        if self.base.dtype(name) != seal["dtype"] or sha256(rows) != seal["rows_sha256_before"]:
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
                name, native, Found(places, stored, values, "other", exact=True)
            ):
                return None
            digest.update(native.data)
        return digest.hexdigest()

    def chunks(self, name: str) -> Iterator[tuple[list[Place], list[Bytes]]]:
        count, width = self.seal_of(name)["shape"]
        step = max(1, CHUNK // (4 * width))
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
                    f"`{self.path}` carries the patch `{other[:16]}` on the same rows of `{name}`",
                    mend="remove that one first",
                )
        stored = self.checkpoint.dtype(name)
        if stored != self.seal_of(name)["dtype"] and self.base is None:
            return NestError(
                f"`{name}` of `{self.path}` is stored as `{stored}`, which does not tell the base's rows exactly",
                mend="pass --base FOLDER, the patch's base",
            )
        return NestError(
            f"the rows of `{name}` in `{self.path}` are not those of the patch's base",
            mend="is this the right model, at the right revision, exported without calibration?",
        )
