"""Less at a time where memory runs out."""

from __future__ import annotations

import pytest
import torch

from nest_rs import NestError
from nest_rs.memory import fewest_parts, halving


def short_of(limit: float) -> list[int]:
    """Sizes that were tried; the error is torch's own, of an allocation no machine can make."""
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > limit:
            torch.empty(2**61, dtype=torch.uint8)
        return f"done with {size}"

    assert halving(work, 40, "rows") == (f"done with {tried[-1]}", tried[-1])
    return tried


def test_the_size_is_halved_until_it_fits() -> None:
    assert short_of(40) == [40]
    assert short_of(12) == [40, 20, 10]
    assert short_of(1) == [40, 20, 10, 5, 2, 1]
    with pytest.raises(NestError, match="out of memory with `1` rows"):
        short_of(0)


def test_a_step_is_cut_into_as_many_parts_as_it_takes() -> None:
    tried: list[int] = []

    def train(parts: int) -> int:
        tried.append(parts)
        if parts < 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return parts

    assert fewest_parts(train, 1, 32) == (8, 8)
    assert tried == [1, 2, 4, 8]
    with pytest.raises(NestError, match="out of memory with `4` parts of a step"):
        fewest_parts(train, 4, 8)
    with pytest.raises(ZeroDivisionError):
        halving(lambda size: size // 0, 8, "rows")
