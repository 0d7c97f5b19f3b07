"""Greedy answers, in length-sorted batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

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
        batch_size: Prompts decoded together; batches hold prompts of like length, padded on the left.
        label: What the progress bar says.

    Returns:
        An answer for each prompt, in order; None where the prompt does not fit the context.
    """
    from transformers import GenerationConfig

    ids = encode(tokenizer, [render(tokenizer, prompt) for prompt in prompts])
    room = model.config.get_text_config().max_position_embeddings - max_new_tokens
    kept = fitting(ids, [prompt[:40] for prompt in prompts], room)
    order = sorted(kept, key=lambda index: len(ids[index]))
    # A config of its own: a model's stored one may carry sampling settings and penalties, which are not greedy.
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id,
    )
    answers: list[str | None] = [None] * len(prompts)
    with track(label, total=len(order), unit="prompts") as advance, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(ids[index]) for index in batch)
            pads = [width - len(ids[index]) for index in batch]
            rows = [[tokenizer.pad_token_id] * pad + ids[index] for pad, index in zip(pads, batch, strict=True)]
            tokens = torch.tensor(rows, device=model.device)
            mask = torch.arange(width, device=model.device) >= torch.tensor(pads, device=model.device)[:, None]
            out = model.generate(input_ids=tokens, attention_mask=mask.long(), generation_config=greedy)
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
            advance(len(batch))
    return answers
