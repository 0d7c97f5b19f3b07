"""What a patch file holds, and which patches are on a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nest_rs import _core
from nest_rs.checkpoints import open_checkpoint
from nest_rs.deploy.common import one_line
from nest_rs.deploy.records import Records
from nest_rs.errors import NestError
from nest_rs.patch import NestPatch, patch_file


def applied_patches(target: Path) -> dict[str, Any]:
    """What lies at a path: its kind, and the patches on it by its undo records."""
    checkpoint = open_checkpoint(target)
    with one_line():
        _core.recover(checkpoint.root, checkpoint.state)
    records = Records(checkpoint)
    return {
        "kind": checkpoint.kind,
        "patches": [
            {"id": patch, "in_place": records.in_place(patch), **json.loads(change.info)}
            for patch, change in records.found.items()
        ],
    }


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
        "evidence": patch.evidence,
    }


def is_patch(path: Path) -> bool:
    """Whether a file is a patch, or a folder holds one, by its metadata alone."""
    try:
        return "nest_patch" in _core.read_header(patch_file(path))[1]
    except (NestError, ValueError, OSError):
        return False
