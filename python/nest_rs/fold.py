"""Fold a patch into a checkpoint: the rows move in the files, the model is never loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from nest_rs.errors import NestError, listed
from nest_rs.files import new_folder
from nest_rs.models import Base
from nest_rs.numeric import fold_file
from nest_rs.patch import NestPatch

# What belongs to a checkpoint beside its weights; other weight formats would be stale after the fold.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")


def merge_folder(base: Base, patch: NestPatch, out: Path, *, card: str, overwrite: bool = False) -> dict[str, Any]:
    """Copy a base folder with the patch folded in.

    Every byte but the moved rows is the base's. W'[i, :] is added in float32 and rounded once to the stored dtype.

    Args:
        base: The base the patch was made for.
        patch: The deltas.
        out: A new folder.
        card: The model card, written to README.md.
        overwrite: Replace `out`.

    Returns:
        For each touched tensor: `sha256_before`, `sha256_after`, `rows` and `changed` (elements whose bits moved).

    Raises:
        NestError: the base lacks a tensor of the patch, or it is not the tensor the patch was made for.
    """
    shards = sorted(base.folder.glob("*.safetensors"))
    home: dict[str, Path] = {}
    for shard in shards:
        with safe_open(shard, framework="numpy") as file:
            home |= dict.fromkeys(file.keys(), shard)
    missing = [name for name in patch.tensors if name not in home]
    if missing:
        raise NestError(f"the base `{base.id}` has no tensor {listed(missing)}", mend="is this the patch's base?")
    seals = patch.manifest.get("tensors", {})
    expected = {name: seal["sha256_before"] for name, seal in seals.items()}
    report: dict[str, Any] = {}
    with new_folder(out, overwrite=overwrite) as scratch:
        for pattern in _SMALL_FILES:
            for file in base.folder.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        for shard in shards:
            edits = {
                name: (change.rows, *change.by_row()) for name, change in patch.tensors.items() if home[name] == shard
            }
            try:
                folded = fold_file(shard, scratch / shard.name, edits)
            except ValueError as error:
                raise NestError(str(error)) from error
            for name, entry in folded.items():
                if entry.sha256_before != expected.get(name, entry.sha256_before):
                    raise NestError(
                        f"the tensor `{name}` of the base `{base.id}` is not the one the patch was made for",
                        mend="is this the patch's base?",
                    )
                report[name] = entry._asdict()
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return report
