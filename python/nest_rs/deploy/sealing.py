"""Bind a patch to the bytes of its base."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_rs import _core
from nest_rs.checkpoints.base import widen
from nest_rs.checkpoints.huggingface import HuggingFaceCheckpoint
from nest_rs.deploy.common import CHUNK, sha256
from nest_rs.errors import NestError
from nest_rs.patch import NestPatch, sketch


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
        index, moves = change.by_row()
        step = max(1, CHUNK // (4 * shape[1]))
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
                    new = _core.RowEdit(dtype, index[inside], moves).fold(old)
                except ValueError as error:
                    raise NestError(f"`{name}`: {error}") from error
                table[picked] = new.reshape(len(picked), -1)
                olds.append(old)
                news.append(new)
            after.update(chunk.data)
        old, new = np.concatenate(olds), np.concatenate(news)
        tensors[name] = replace(
            change,
            residual=_core.RowEdit(dtype, index, moves).residual(old, new),
            sketch=sketch(widen(old, dtype, shape[1])),
        )
        seals[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "sha256_before": before.hexdigest(),
            "sha256_after": after.hexdigest(),
            "rows_sha256_before": sha256(old),
            "rows_sha256_after": sha256(new),
        }
    return NestPatch(tensors, {**patch.manifest, "tensors": seals}, patch.evidence)
