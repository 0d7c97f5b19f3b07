"""What the modules of this package share: hashes of bytes, and errors in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from nest_rs.checkpoints.base import Bytes
from nest_rs.errors import NestError

CHUNK = 1 << 25  # bytes of a matrix read at a time


@contextmanager
def one_line() -> Iterator[None]:
    """The core's and the system's complaints, as the user's."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise NestError(str(error)) from error


def sha256(*parts: Bytes) -> str:
    """SHA-256 of bytes, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()


def same(one: list[Bytes], two: list[Bytes]) -> bool:
    """Whether two lists hold the same bytes."""
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
