"""What a piece of work costs: wall-clock seconds and the most memory it held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

# Seconds between two looks at the memory of the process.
_INTERVAL = 0.05


@dataclass
class Cost:
    """Seconds and peak memory.

    Attributes:
        seconds: Wall clock.
        peak_mb: MB (10^6 bytes) of the accelerator's memory; on a processor, the resident memory of the process, in
            which what the allocator kept of earlier work is included.
    """

    seconds: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def metered(device: torch.device) -> Iterator[Cost]:
    """Measure the block; the result is complete when it ends."""
    cost = Cost()
    started = time.perf_counter()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        yield cost
        torch.accelerator.synchronize()
        cost.peak_mb = round(torch.accelerator.max_memory_allocated() / 1e6, 1)
        cost.seconds = round(time.perf_counter() - started, 2)
        return
    ended = threading.Event()
    process = psutil.Process()

    def watch() -> None:
        # The kernel's own high-water mark never goes down, so work after the first would not be seen.
        while True:
            cost.peak_mb = max(cost.peak_mb, round(process.memory_info().rss / 1e6, 1))
            if ended.wait(_INTERVAL):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        ended.set()
        watcher.join()
        cost.seconds = round(time.perf_counter() - started, 2)
