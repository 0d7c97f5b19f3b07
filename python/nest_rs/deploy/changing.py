"""Put a patch on a deployed model, and take it off."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nest_rs.checkpoints.base import Floats, widen
from nest_rs.deploy.common import one_line, sha256
from nest_rs.deploy.target import Target
from nest_rs.deploy.writing import Blocks, write
from nest_rs.errors import NestError
from nest_rs.patch import NestPatch, RowDelta


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
    work = Target(patch, target, base)
    blocks: Blocks = []
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
        with one_line():
            if found.rows is None:
                values = found.values + change.moves
            else:
                new = work.edit(name).fold(found.rows)
                if sha256(new) != seal["rows_sha256_after"]:
                    raise NestError(f"the patch does not give the rows its manifest promises for `{name}`")
                values = widen(new, seal["dtype"], seal["shape"][1])
            encoded = work.checkpoint.encode(name, values, found.places)
        blocks += zip(found.places, found.stored, encoded, strict=True)
        after = work.checkpoint.decode(name, encoded, seal["shape"][1])
        report[name] = _survival(found.values, after, change)
    if states == {"after"}:
        raise NestError(f"`{target}` carries this patch already (`{work.id[:16]}`)")
    return Applied(write(work, blocks, remove=False, out=out, overwrite=overwrite), work.id, report)


def _survival(before: Floats, after: Floats, change: RowDelta) -> dict[str, Any]:
    meant = change.moves.astype(np.float64)
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
    work = Target(patch, target, base)
    own = work.records.found[work.id].blocks() if work.records.in_place(work.id) else []
    kept = {(place[0], tuple(place[4])): old for place, old, _ in own}
    blocks: Blocks = []
    for name in sorted(patch.tensors):
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
        blocks += zip(found.places, found.stored, work.unfold(name, found), strict=True)
    return Applied(write(work, blocks, remove=True, out=out, overwrite=overwrite), work.id)
