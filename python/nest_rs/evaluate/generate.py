"""Greedy answers, in length-sorted batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nest_rs.models import head_inputs
from nest_rs.prefix import prefix_cache, repeated, shared_prefix
from nest_rs.progress import track
from nest_rs.prompts import Request, encode, fitting, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a prompt, template included, for which a batch may hold its full number.
_ORDINARY = 128


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Its token ids, the end token included where it ended.
        states: The final hidden state that led to each token, [tokens, d] in the model's dtype, if asked for.
    """

    tokens: list[int]
    states: torch.Tensor | None = None


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
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
        batch_size: Prompts decoded together, fewer where they are long; batches hold prompts of like length.
        label: What the progress bar says.

    Returns:
        An answer for each prompt, in order, without the opening it was given; None where the prompt does not fit the
        context.
    """
    answers = decode(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label=label, states=False
    )
    return _texts(tokenizer, answers)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "generate",
) -> list[str | None]:
    """As `generate`, from texts in which the chat format, if any, already stands."""
    answers = _decode(
        model,
        tokenizer,
        texts,
        [text[-40:] for text in texts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        label=label,
        states=False,
    )
    return _texts(tokenizer, answers)


def _texts(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer | None]) -> list[str | None]:
    return [
        None if answer is None else str(tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()
        for answer in answers
    ]


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    states: bool,
) -> list[Answer | None]:
    """As `generate`, but token ids and, with `states`, the hidden states the head read them from."""
    return _decode(
        model,
        tokenizer,
        [render(tokenizer, asked) for asked in prompts],
        [Request.of(asked).prompt[:40] for asked in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        label=label,
        states=states,
    )


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    states: bool,
) -> list[Answer | None]:
    from transformers import GenerationConfig

    ids = encode(tokenizer, texts)
    room = model.config.get_text_config().max_position_embeddings - max_new_tokens
    kept = fitting(ids, names, room)
    order = sorted(kept, key=lambda index: len(ids[index]))
    answers: list[Answer | None] = [None] * len(texts)
    if not kept:
        return answers
    stored = model.generation_config
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stored.eos_token_id if stored else tokenizer.eos_token_id,
    )
    ends = {greedy.eos_token_id} if isinstance(greedy.eos_token_id, int) else {*(greedy.eos_token_id or ())}
    prefix = shared_prefix([ids[index] for index in kept])
    with (
        track(label, total=len(order), unit="prompts") as advance,
        torch.inference_mode(),
        _without_stored_settings(model),
    ):
        cache = prefix_cache(model, torch.tensor([prefix], device=model.device))
        for batch in _batches(order, [len(row) for row in ids], batch_size):
            width = len(ids[batch[-1]])
            # The shared opening first, then padding, then the prompt's own tokens.
            pads = torch.tensor([width - len(ids[index]) for index in batch], device=model.device)[:, None]
            gaps = [[tokenizer.pad_token_id] * (width - len(ids[index])) for index in batch]
            rows = [prefix + gap + ids[index][len(prefix) :] for gap, index in zip(gaps, batch, strict=True)]
            tokens = torch.tensor(rows, device=model.device)
            columns = torch.arange(width, device=model.device) - len(prefix)
            with head_inputs(model) as seen:
                out = model.generate(
                    input_ids=tokens,
                    attention_mask=((columns < 0) | (columns >= pads)).long(),
                    past_key_values=repeated(cache, len(batch)),
                    generation_config=greedy,
                )
            read = torch.stack([state[:, -1] for state in seen], dim=1).cpu() if states else None
            for row, index in enumerate(batch):
                told = _until_end(out[row, width:].tolist(), ends)
                answers[index] = Answer(told, None if read is None else read[row, : len(told)].clone())
            advance(len(batch))
    return answers


def _batches(order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Runs of at most `size` prompts, in ascending length, and of no more tokens than as many of ordinary length."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == size or lengths[index] * (len(batch) + 1) > size * _ORDINARY):
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@contextmanager
def _without_stored_settings(model: PreTrainedModel) -> Iterator[None]:
    """generate() fills what a config leaves open from the model's own, and its penalties are not greedy."""
    from transformers import GenerationConfig

    stored, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
