"""The opening that a chat template gives every prompt, computed once a batch.

A template's system text is often longer than the request itself. Its keys and values are the same for every row, so one
row is run and shared; gradients flow through it as through any other token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

if TYPE_CHECKING:
    from torch import nn


def shared_prefix(ids: Sequence[list[int]]) -> list[int]:
    """The longest opening of all prompts that leaves each at least one token of its own."""
    first, last = min(ids), max(ids)  # in lexical order: what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(shared, min(map(len, ids)) - 1)]


def prefix_cache(model: nn.Module, prefix: torch.Tensor) -> Any:
    """Keys and values of the prefix.

    Args:
        model: A transformers causal language model, or a PEFT model around one.
        prefix: Token ids [1, p].

    Returns:
        A transformers cache of one row; None for an empty prefix.
    """
    if not prefix.shape[1]:
        return None
    return getattr(model(input_ids=prefix, use_cache=True, logits_to_keep=1), _cache_name())


@functools.cache
def _cache_name() -> str:
    """What transformers calls a cache that a forward pass takes and gives; renamed in 5.24."""
    return "cache" if Version(version("transformers")) >= Version("5.24") else "past_key_values"


def behind(cache: Any, rows: int) -> dict[str, Any]:
    """The arguments of a forward pass, or of `generate`, whose `rows` rows stand behind a one-row cache."""
    return {_cache_name(): _repeated(cache, rows)}


def _repeated(cache: Any, rows: int) -> Any:
    """A copy for a batch; gradients reach the original."""
    if cache is None:
        return None
    batch = copy.copy(cache)
    batch.layers = [copy.copy(layer) for layer in cache.layers]
    batch.batch_repeat_interleave(rows)
    return batch


def budgeted(ids: Sequence[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Consecutive runs of prompts whose padded size stays within a budget of tokens."""
    batch: list[list[int]] = []
    for row in ids:
        if batch and max(len(row), *map(len, batch)) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def behind_prefix(
    batch: Sequence[list[int]], prefix: Sequence[int], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The prompts' own tokens, padded on the right.

    Returns:
        Token ids [n, width]; which are not padding, bool [n, width]; the attention mask, int64 [n, prefix + width].
    """
    rest = [row[len(prefix) :] for row in batch]
    width = max(map(len, rest))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rest], device=device)
    lengths = torch.tensor([len(row) for row in rest], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    return tokens, mask, torch.cat([mask.new_ones(len(rest), len(prefix)), mask], dim=1).long()
