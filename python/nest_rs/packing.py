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


@dataclass(frozen=True)
class Sequences:
    """Sequences of one padded batch, whose tokens follow each other in the row.

    Attributes:
        slots: For each place of the padded batch, whose width is rounded up on the left, the token there, counted from
            the first of these sequences; for padding any token. int64 [n * width].
        places: For each token its place in the padded batch, int64 [tokens].
        bias: What is added to attention scores: 0 where a place sees a key, else minus infinity, [n, width, keys].
        prefix: How many tokens, just before these sequences, all of them stand behind.
    """

    slots: torch.Tensor
    places: torch.Tensor
    bias: torch.Tensor
    prefix: int

    @classmethod
    def of(cls, mask: torch.Tensor, dtype: torch.dtype, prefix: int = 0) -> Sequences:
        """From a padding mask, bool [n, width]."""
        mask = functional.pad(mask, (-mask.shape[1] % _WIDTH, 0))
        rows, width = mask.shape
        places = mask.flatten().nonzero()[:, 0]
        slots = places.new_zeros(mask.numel())
        slots[places] = torch.arange(len(places), device=mask.device)
        seen = mask[:, None, :] & mask.new_ones(width, width).tril()
        # Nobody reads what padding computes; it sees all, so that it is finite.
        seen = torch.cat([mask.new_ones(rows, width, prefix), seen | ~mask[:, :, None]], dim=2)
        bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, -torch.inf)
        return cls(slots, places, bias, prefix)


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
        slots.append(packing[-1].slots.view(len(mask), -1)[:, -mask.shape[1] :] + start + prefix)
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
    heads, groups = query.shape[1], key.shape[1]
    share = heads // groups  # of query heads that one key head serves
    sizes = [len(item.places) for item in packing]
    sizes.append(query.shape[2] - sum(sizes))  # what belongs to no sequence
    *parts, rest = zip(*(torch.split(x[0].transpose(0, 1), sizes) for x in (query * scaling, key, value)), strict=True)
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    found = []
    for item, (q, k, v) in zip(packing, parts, strict=True):
        rows, width, keys = item.bias.shape
        spread = [_Spread.apply(x, item.slots, item.places).view(rows, width, *x.shape[1:]) for x in (q, k, v)]
        if item.prefix and before is not None:
            spread[1:] = [
                torch.cat([old.expand(rows, *old.shape), new], dim=1)
                for old, new in zip(before, spread[1:], strict=True)
            ]
        before = k, v
        # One product a sequence and key head, the query heads it serves side by side.
        q = spread[0].view(rows, width, groups, share, -1).transpose(1, 2).reshape(rows * groups, width * share, -1)
        k = spread[1].permute(0, 2, 3, 1).reshape(rows * groups, -1, keys)
        v = spread[2].transpose(1, 2).reshape(rows * groups, keys, -1)
        scores = torch.bmm(q, k).view(rows, groups, width, share, keys) + item.bias[:, None, :, None]
        weights = functional.dropout(scores.softmax(dim=-1), dropout, module.training).view(q.shape[0], -1, keys)
        out = torch.bmm(weights.to(v.dtype), v).view(rows, groups, width, share, -1).transpose(1, 2)
        found.append(_Gather.apply(out.reshape(rows * width, heads, -1), item.places))
    found.append(rest[2].new_zeros(len(rest[2]), heads, rest[2].shape[-1]))
    return torch.cat(found)[None], None


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
