"""Greedy answers, in length-sorted batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nest_rs.prefix import prefix_cache, repeated, shared_prefix
from nest_rs.progress import track
from nest_rs.prompts import encode, fitting, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "generate",
) -> list[str | None]:
    """Answer each prompt greedily in the chat format.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        prompts: User requests, without chat markup.
        max_new_tokens: Tokens an answer may take.
        batch_size: Prompts decoded together; batches hold prompts of like length.
        label: What the progress bar says.

    Returns:
        An answer for each prompt, in order; None where the prompt does not fit the context.
    """
    from transformers import GenerationConfig

    ids = encode(tokenizer, [render(tokenizer, prompt) for prompt in prompts])
    room = model.config.get_text_config().max_position_embeddings - max_new_tokens
    kept = fitting(ids, [prompt[:40] for prompt in prompts], room)
    order = sorted(kept, key=lambda index: len(ids[index]))
    if not kept:
        return [None] * len(prompts)
    stored = model.generation_config
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stored.eos_token_id if stored else tokenizer.eos_token_id,
    )
    prefix = shared_prefix([ids[index] for index in kept])
    answers: list[str | None] = [None] * len(prompts)
    with (
        track(label, total=len(order), unit="prompts") as advance,
        torch.inference_mode(),
        _without_stored_settings(model),
    ):
        cache = prefix_cache(model, torch.tensor([prefix], device=model.device))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[index]) for index in batch)
            # The shared opening first, then padding, then the prompt's own tokens.
            pads = torch.tensor([width - len(ids[index]) for index in batch], device=model.device)[:, None]
            gaps = [[tokenizer.pad_token_id] * (width - len(ids[index])) for index in batch]
            rows = [prefix + gap + ids[index][len(prefix) :] for gap, index in zip(gaps, batch, strict=True)]
            tokens = torch.tensor(rows, device=model.device)
            columns = torch.arange(width, device=model.device) - len(prefix)
            out = model.generate(
                input_ids=tokens,
                attention_mask=((columns < 0) | (columns >= pads)).long(),
                past_key_values=repeated(cache, len(batch)),
                generation_config=greedy,
            )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
            advance(len(batch))
    return answers


@contextmanager
def _without_stored_settings(model: PreTrainedModel) -> Iterator[None]:
    """generate() fills what a config leaves open from the model's own, and its penalties are not greedy."""
    from transformers import GenerationConfig

    stored, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
