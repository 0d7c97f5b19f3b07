"""Batches without end, for the loops that are not the Trainer's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from nest_rs.train import Example


def drawn(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """All examples in random order, in batches of `size` (or of all there are), then again."""
    size = max(1, min(size, len(examples)))
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))
