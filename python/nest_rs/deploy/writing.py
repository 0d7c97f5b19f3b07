"""Write a change: in place under the journal, or on a copy that takes its name when it is whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from nest_rs import _core
from nest_rs.checkpoints.base import Bytes, Checkpoint, Place, state_of
from nest_rs.deploy.common import one_line
from nest_rs.deploy.target import Target
from nest_rs.errors import NestError
from nest_rs.files import new_folder

Blocks = list[tuple[Place, Bytes, Bytes]]
"""Places, with their bytes before and after."""


def write(work: Target, blocks: Blocks, *, remove: bool, out: Path | None, overwrite: bool) -> Path:
    """Write the change that a patch is on a target.

    Args:
        work: The patch and the target.
        blocks: The rows that change.
        remove: Whether the patch goes off.
        out: Leave the target alone and write a copy.
        overwrite: Replace `out`.

    Returns:
        What was written: the target, or `out`.

    Raises:
        NestError: what is to be written exists, is shared with other names, or cannot be written.
    """
    info = {"remove": remove, "base": work.patch.manifest.get("base"), "neurons": work.patch.neurons}
    change = _core.Change(remove, work.id, json.dumps(info, sort_keys=True), blocks)  # type: ignore[arg-type]
    checkpoint = work.checkpoint
    if out is None:
        checkpoint.check_writable({place.file for place, _, _ in blocks})
        with one_line():
            change.commit(checkpoint.root, checkpoint.state)
        return work.path
    here = checkpoint.path.resolve()
    if here in (out.resolve(), *out.resolve().parents):
        raise NestError(f"the output `{out}` lies in the target", mend="name another one, or pass --in-place")
    with one_line():
        if checkpoint.path.is_dir():
            _copy_folder(checkpoint, change, out, overwrite)
        else:
            _copy_file(work, change, out, overwrite)
    return out


def _copy_folder(checkpoint: Checkpoint, change: _core.Change, out: Path, overwrite: bool) -> None:
    with new_folder(out, overwrite=overwrite) as scratch:
        for path in checkpoint.files():
            change.copy(path, scratch / path.name)
        state = scratch / checkpoint.state.name
        if checkpoint.state.is_dir():
            shutil.copytree(checkpoint.state, state)
        change.note(state)


def _copy_file(work: Target, change: _core.Change, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise NestError(f"the output `{out}` exists", mend="name another one or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    state = state_of(out)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        change.copy(work.checkpoint.path, scratch / out.name)
        for record in (*(work.records.found[other] for other in work.records.others(work.id)), change):
            _renamed(record, out.name).note(scratch / state.name)
        shutil.rmtree(state, ignore_errors=True)
        if (scratch / state.name).is_dir():
            (scratch / state.name).rename(state)
        (scratch / out.name).rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _renamed(change: _core.Change, file: str) -> _core.Change:
    """A change of a single file for the same bytes under another name."""
    blocks = [((file, *place[1:]), old, new) for place, old, new in change.blocks()]
    return _core.Change(json.loads(change.info)["remove"], change.patch, change.info, blocks)
