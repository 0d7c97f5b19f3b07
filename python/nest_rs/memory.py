"""What to do when a batch does not fit: take less at a time, and say so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from nest_rs.errors import NestError

T = TypeVar("T")
log = logging.getLogger(__name__)


def halving(work: Callable[[int], T], size: int, unit: str) -> tuple[T, int]:
    """Call `work(size)`, with half the size again and again where memory runs out.

    Args:
        work: Does the whole of the work, at most `size` of it at a time; called anew after a failure.
        size: The first size to try, at least 1.
        unit: What is counted, for the message.

    Returns:
        The work's result, and the size that fits.

    Raises:
        NestError: there is no memory for a single one.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if size <= 1:
                raise NestError(
                    f"out of memory with `{size}` {unit}", mend="free some, or use a smaller model or --dtype bfloat16"
                ) from error
        size //= 2  # only here has the error let go of the frames that hold the batch
        log.warning("out of memory: going on with %d %s", size, unit)
        clear_device_cache(garbage_collection=True)
