"""The processes of a run: one, or as many as `accelerate launch` (or torchrun) started.

The probe and the training share their work; every other stage is the first process's. All must see one file system.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any


def share() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (_state().process_index, count) if count > 1 else (0, 1)


def is_main() -> bool:
    """Whether this is the process that writes what all would write."""
    return share()[0] == 0


def wait() -> None:
    """Until all processes have come here."""
    if share()[1] > 1:
        _state().wait_for_everyone()


@cache
def _state() -> Any:
    import torch
    from accelerate import PartialState

    cpu = torch.accelerator.current_accelerator(check_available=True) is None
    cpu |= os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # While the first process judges a model, the others wait longer than a collective operation is allowed by default.
    return PartialState(cpu=cpu, timeout=timedelta(days=1))
