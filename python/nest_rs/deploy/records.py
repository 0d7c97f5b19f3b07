"""The undo records of a target: which patches are on it, and what was there before."""

from __future__ import annotations

import numpy as np

from nest_rs import _core
from nest_rs.checkpoints.base import Bytes, Checkpoint, Place
from nest_rs.deploy.common import one_line


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
        return [other for other in self.found if other != patch and self.in_place(other)]

    def originals(self, patches: list[str]) -> dict[tuple[str, int], Bytes]:
        """By file and offset of a row, what was there before those patches."""
        rows = {}
        for patch in patches:
            for place, old, _ in self.found[patch].blocks():
                for offset, row in zip(place[4], old.reshape(len(place[4]), -1), strict=True):
                    rows[place[0], offset] = row
        return rows
