"""Less at a time where memory runs out."""

from __future__ import annotations

import pytest
import torch

from nest_rs import NestError
from nest_rs.memory import halving


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


def test_an_accelerator_out_of_memory_is_told_from_other_errors() -> None:
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return size

    assert halving(work, 8, "rows") == (1, 1)
    assert tried == [8, 4, 2, 1]
    with pytest.raises(ZeroDivisionError):
        halving(lambda size: size // 0, 8, "rows")
