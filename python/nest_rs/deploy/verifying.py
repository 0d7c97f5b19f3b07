"""Tell whether a deployed model carries a patch.

No mark in the weights, the header or the configuration says that a patch is on: a patched file has, byte for byte, the
content of one made from the merged model, and taking the patch off leaves nothing behind. So another patch is known by
its undo record beside the target, or by its own file (`others`); where neither is at hand, rows that it shares a tensor
with look like any other change, and the target is called tampered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nest_rs.deploy.target import Target
from nest_rs.patch import NestPatch

State = Literal["clean", "patched", "other", "tampered"]


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        state: `clean` (the base), `patched` (by this patch), `other` (by another patch alone) or `tampered`.
        tensor: The first tensor, by name, that is not as it should be; None unless tampered.
        others: Ids of other patches that are on the target, by its undo records or by their own files.
        exact: False where the target's precision allowed no more than a likeness.
    """

    state: State
    tensor: str | None = None
    others: tuple[str, ...] = ()
    exact: bool = True


def verify(patch: NestPatch, target: Path, *, base: Path | None = None, others: Sequence[NestPatch] = ()) -> Verdict:
    """Tell whether a deployed model is the patch's base, carries the patch, or neither.

    The touched tensors are read whole and compared with the manifest's hashes (where the target cannot hold the base's
    values exactly, the touched rows alone). Rows that another patch changed count as they were before it, as its undo
    record or its residuals tell.

    Args:
        patch: A sealed patch.
        target: As for `apply`.
        base: The patch's base, for targets of less precision.
        others: Sealed patches of the same base that may be on the target too.

    Raises:
        NestError: the target cannot be read or lacks a tensor.
    """
    work = Target(patch, target, base)
    ids = work.records.others(work.id)
    work.overlay = work.records.originals(ids)
    for other in others:
        if other.id not in (work.id, *ids):
            rows = Target(other, target, base).originals()
            if rows is not None:
                ids.append(other.id)
                work.overlay |= rows
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
            return Verdict("tampered", name, tuple(ids), exact)
    if first == "after":
        return Verdict("patched", None, tuple(ids), exact)
    return Verdict("other" if ids else "clean", None, tuple(ids), exact)
