"""Many sequences in one row: all layers see each token once and no padding, the attention sees each sequence alone.

Sequences behind a shared prefix attend to the prefix's own tokens, which stand in the row once. To transformers this is
one more attention function (its `AttentionInterface`); the layout reaches it as an argument of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ATTENTION = "nest_packed"
# Lengths are rounded up to multiples of these: libraries prepare each product's shape when they first meet it, which
# may take longer than the product, and remember a limited number of them.
_TOKENS = 64
_WIDTH = 8
# Short sequences are padded apart from long ones, where the scores are then less than this share; a group holds a
# multiple of this share of the batch.
_WORTH = 0.8
_GROUP = 1 / 4


@dataclass(frozen=True)
class Sequences:
    """Sequences of one batch, whose tokens follow each other in the row, and the padded groups that attention sees.

    Attributes:
        slots: For each place of the groups, one behind the other, the token there, counted from the first of these
            sequences; for padding any token. int64 [sum of n * width].
        places: For each token its place, int64 [tokens].
        biases: Of each group, what is added to attention scores: 0 where a place sees a key, else minus infinity,
            [n, width, keys]. Widths are rounded up on the left.
        prefix: How many tokens, just before these sequences, all of them stand behind.
    """

    slots: torch.Tensor
    places: torch.Tensor
    biases: list[torch.Tensor]
    prefix: int

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype, prefix: int = 0) -> Sequences:
        """From a padding mask, bool [n, width], whose rows hold one run of tokens each."""
        tokens = _numbers(mask)
        places = tokens.new_empty(int(mask.sum()))
        slots, biases, start = [], [], 0
        for rows in _groups(mask, prefix):
            columns = mask[rows].any(dim=0).nonzero()[:, 0]
            first, last = int(columns[0]), int(columns[-1]) + 1
            edge = (-(last - first) % _WIDTH, 0)
            own, held = (functional.pad(x[rows, first:last], edge) for x in (mask, tokens))
            slots.append(held.flatten())
            places[held[own]] = start + own.flatten().nonzero()[:, 0]
            start += own.numel()
            seen = own[:, None, :] & own.new_ones(own.shape[1], own.shape[1]).tril()
            # Nobody reads what padding computes; it sees all, so that it is finite.
            seen = torch.cat([own.new_ones(*own.shape, prefix), seen | ~own[:, :, None]], dim=2)
            biases.append(torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, -torch.inf))
        return cls(torch.cat(slots), places, biases, prefix)


def _numbers(mask: torch.Tensor) -> torch.Tensor:
    """At each place of a padding mask the number of its token, or of one nearby, int64 [n, width]."""
    return (mask.flatten().cumsum(dim=0) - 1).clamp(min=0).view(mask.shape)


def _groups(mask: torch.Tensor, prefix: int) -> list[torch.Tensor]:
    """The rows of a padding mask, int64: all of them, or short and long ones apart where that saves enough."""
    rows, width = mask.shape
    starts = mask.int().argmax(dim=1)
    order = starts.argsort(descending=True, stable=True)
    widths = [width - start for start in starts[order].tolist()]  # of the longest so far

    def scores(count: int, longest: int) -> int:
        return count * longest * (longest + prefix)

    def apart(cut: int) -> int:
        return scores(cut, widths[cut - 1]) + scores(rows - cut, widths[-1])

    step = max(1, int(rows * _GROUP))
    cut = min(range(step, rows, step), key=apart, default=0)
    if not cut or apart(cut) > _WORTH * scores(rows, widths[-1]):
        return [torch.arange(rows, device=mask.device)]
    return [order[:cut], order[cut:]]


@dataclass(frozen=True)
class Row:
    """Padded batches as one row of tokens.

    Attributes:
        inputs: What a model's forward pass takes: ids and positions [1, T], and the layout. The last tokens may belong
            to no sequence.
        slots: By batch, the token of the row at each place, int64 [n, width].
    """

    inputs: dict[str, Any]
    slots: list[torch.Tensor]


def pack(batches: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype) -> Row:
    """One row of what `nest_rs.train.collate` pads, each batch behind its prefix."""
    ids, positions, packing, slots = [], [], [], []
    start = 0
    for batch in batches:
        prefix = batch["prefix"].shape[1]
        if prefix:
            ids.append(batch["prefix"][0])
            positions.append(torch.arange(prefix, device=ids[-1].device))
            packing.append(Sequences.of(batch["prefix"].new_ones(1, prefix, dtype=torch.bool), dtype))
        mask = batch["attention_mask"][:, prefix:].bool()
        ids.append(batch["input_ids"][mask])
        positions.append(batch["position_ids"][mask])
        packing.append(Sequences.of(mask, dtype, prefix))
        slots.append(_numbers(mask) + start + prefix)
        start += prefix + len(ids[-1])
    row = {"input_ids": rounded_up(torch.cat(ids))[None], "position_ids": rounded_up(torch.cat(positions))[None]}
    return Row({**row, "packing": packing}, slots)


def rounded_up(tokens: torch.Tensor) -> torch.Tensor:
    """With zeros up to a length that many rows have."""
    return functional.pad(tokens, (0, -len(tokens) % _TOKENS))


class _Spread(torch.autograd.Function):
    """Tokens to their places in the padded batch. Padding takes part in nothing, so its gradient is left out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Back from the places. Each token has one, so its gradient need not be summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        zeros = grads[0].new_zeros(ctx.rows, *grads[0].shape[1:])
        return zeros.index_copy_(0, places, grads[0]), None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    packing: Sequence[Sequences],
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sequence to itself and its prefix.

    Args:
        module: The attention layer.
        query: [1, heads, T, d].
        key: [1, key heads, T, d], a divisor of the heads.
        value: [1, key heads, T, d'].
        attention_mask: Not used: the layout says it.
        scaling: Of the scores.
        packing: The layout, in the row's order.
        dropout: Of the attention weights.
        softcap: Not known here, as is `s_aux`.

    Returns:
        [1, T, heads, d'], and no weights.

    Raises:
        ValueError: the layer asks for a kind of attention that is not this.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("packed attention knows no soft cap and no sinks")
    sizes = [len(item.places) for item in packing]
    sizes.append(query.shape[2] - sum(sizes))  # what belongs to no sequence
    *parts, rest = zip(*(torch.split(x[0].transpose(0, 1), sizes) for x in (query * scaling, key, value)), strict=True)
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    found = []
    for item, (q, k, v) in zip(packing, parts, strict=True):
        places = [bias.shape[0] * bias.shape[1] for bias in item.biases]
        spread = (torch.split(_Spread.apply(x, item.slots, item.places), places) for x in (q, k, v))
        shared = before if item.prefix else None
        dropped = dropout if module.training else 0.0
        out = [
            _padded(bias, *group, before=shared, dropout=dropped)
            for bias, group in zip(item.biases, zip(*spread, strict=True), strict=True)
        ]
        found.append(_Gather.apply(torch.cat(out), item.places))
        before = k, v
    found.append(rest[2].new_zeros(len(rest[2]), query.shape[1], rest[2].shape[-1]))
    return torch.cat(found)[None], None


def _padded(
    bias: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of a padded group, [n * width, heads, d'], of its places [n * width, heads or key heads, d].

    Args:
        bias: [n, width, keys].
        query: Already scaled.
        key: As many places.
        value: As many places.
        before: Keys and values of the prefix that all stand behind, [prefix, key heads, d].
        dropout: Of the attention weights.
    """
    rows, width, keys = bias.shape
    heads, groups = query.shape[1], key.shape[1]
    share = heads // groups  # of query heads that one key head serves
    query, key, value = (x.view(rows, width, *x.shape[1:]) for x in (query, key, value))
    if before is not None:
        key, value = (
            torch.cat([old.expand(rows, *old.shape), new], dim=1) for old, new in zip(before, (key, value), strict=True)
        )
    # One product a sequence and key head, the query heads it serves side by side.
    q = query.view(rows, width, groups, share, -1).transpose(1, 2).reshape(rows * groups, width * share, -1)
    k = key.permute(0, 2, 3, 1).reshape(rows * groups, -1, keys)
    v = value.transpose(1, 2).reshape(rows * groups, keys, -1)
    scores = torch.bmm(q, k).view(rows, groups, width, share, keys) + bias[:, None, :, None]
    weights = functional.dropout(scores.softmax(dim=-1), dropout).view(len(q), -1, keys)
    out = torch.bmm(weights.to(v.dtype), v).view(rows, groups, width, share, -1).transpose(1, 2)
    return out.reshape(rows * width, heads, -1)


AttentionInterface.register(ATTENTION, attend)


def is_packed(model: torch.nn.Module) -> bool:
    """Whether a model's attention takes packed rows now."""
    config: Any = getattr(model, "module", model).config  # what DDP wraps has it
    return str(config.get_text_config()._attn_implementation) == ATTENTION


@contextmanager
def attention(model: PeftModel | PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention function for a while."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
