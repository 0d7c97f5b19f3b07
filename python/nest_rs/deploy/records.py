"""The undo records of a target: which patches are on it, and what was there before."""

from __future__ import annotations

import numpy as np

from nest_rs import _core
from nest_rs.checkpoints.base import Bytes, Checkpoint, Place
from nest_rs.deploy.common import one_line

Rows = dict[tuple[str, int], Bytes]
"""The bytes of rows by their file and offset."""


def split(place: Place, content: Bytes) -> Rows:
    """The bytes of a place, row by row."""
    rows = content.reshape(len(place.offsets), -1)
    return {(place.file, offset): row for offset, row in zip(place.offsets, rows, strict=True)}


class Records:
    """The undo records of a target whose bytes are in place."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.found: dict[str, _core.Change] = {}
        for path in sorted(checkpoint.state.glob("undo-*")):
            with one_line():
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
        """Ids of the other patches that are on the target."""
        return [other for other in self.found if other != patch and self.in_place(other)]

    def originals(self, patches: list[str]) -> Rows:
        """What was in their rows before those patches."""
        rows: Rows = {}
        for patch in patches:
            for place, old, _ in self.found[patch].blocks():
                rows |= split(Place(*place), old)
        return rows
