"""What goes into some modules while the base reads prompts, up to the last of them and no further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nest_rs.prefix import behind, behind_prefix, budgeted, prefix_cache, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EnoughError(Exception):
    """All that was wanted has been read: the rest of the forward pass is not needed."""


@torch.no_grad()
def read_inputs(
    model: PreTrainedModel,
    modules: Sequence[str],
    ids: Sequence[list[int]],
    visit: Callable[[str, torch.Tensor, torch.Tensor, list[int]], None],
    *,
    pad: int,
    batch_tokens: int = 4096,
) -> None:
    """Run prompts through a model, shortest first, and show what reaches some of its modules.

    Args:
        model: The base, in eval mode.
        modules: Paths of modules that each take one tensor, once a forward pass.
        ids: Token ids of each prompt. The opening that all share is not shown.
        visit: Called with a module's path, its input [n, tokens, d_in], which tokens are no padding (bool [n, tokens]),
            and the numbers of the prompts [n].
        pad: Padding token.
        batch_tokens: Tokens a batch may hold, padding included.
    """
    prefix = shared_prefix(ids)
    cache = prefix_cache(model, torch.tensor([prefix], device=model.device))
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    mask = torch.empty(0)
    rows: list[int] = []
    waiting: set[str] = set()

    def read(module: str, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        visit(module, inputs[0], mask, rows)
        waiting.discard(module)
        if not waiting:
            raise EnoughError

    handles = [model.get_submodule(module).register_forward_pre_hook(partial(read, module)) for module in modules]
    try:
        for batch in budgeted([ids[number] for number in order], batch_tokens):
            rows, order = order[: len(batch)], order[len(batch) :]
            waiting.update(modules)
            tokens, mask, attended = behind_prefix(batch, prefix, pad, model.device)
            with suppress(EnoughError):
                model(input_ids=tokens, attention_mask=attended, **behind(cache, len(batch)), logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
