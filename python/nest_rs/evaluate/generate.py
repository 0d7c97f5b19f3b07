"""Greedy answers, in length-sorted batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nest_rs.evaluate.backends import Backend, until_end
from nest_rs.memory import halving
from nest_rs.models import head_inputs
from nest_rs.prefix import behind, prefix_cache, shared_prefix
from nest_rs.progress import track
from nest_rs.prompts import Request, chat_ids, encode, fitting, render

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of a prompt, template included, for which a batch may hold its full number.
_ORDINARY = 128
# Tokens after which the answers that are not yet decided are begun again, among themselves.
_ROUNDS = (6, 16)


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
    model: PreTrainedModel | Backend,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "generate",
    decided: Callable[[str], bool] | None = None,
) -> list[str | None]:
    """Answer each prompt greedily in the chat format.

    Args:
        model: A causal language model in eval mode, or another engine (`nest_rs.evaluate.backends`).
        tokenizer: Its tokenizer, with a chat template.
        prompts: User requests, without chat markup.
        max_new_tokens: Tokens an answer may take.
        batch_size: Prompts decoded together, fewer where they are long; batches hold prompts of like length. Halved,
            with a warning, where memory runs out; 0 starts with all that the memory might hold.
        label: What the progress bar says.
        decided: Says of an answer's beginning whether no more of it is needed. A batch ends once all are decided, and
            the few that are not after some tokens do not hold up the others.

    Returns:
        An answer for each prompt, in order, without the opening it was given; None where the prompt does not fit the
        context.
    """
    if isinstance(model, Backend):
        answers = answers_of(model, tokenizer, prompts, max_new_tokens=max_new_tokens, label=label)
        return _texts(tokenizer, answers)
    texts: list[str | None] = [None] * len(prompts)
    left = list(range(len(prompts)))
    for tokens in [*(few for few in _ROUNDS if decided and few < max_new_tokens), max_new_tokens]:
        answers = decode(
            model,
            tokenizer,
            [prompts[index] for index in left],
            max_new_tokens=tokens,
            batch_size=batch_size,
            label=label,
            states=False,
            decided=decided,
        )
        for index, text in zip(left, _texts(tokenizer, answers), strict=True):
            texts[index] = text
        # One that ended before the last token has no more to say.
        left = [
            index
            for index, answer in zip(left, answers, strict=True)
            if answer is not None and len(answer.tokens) == tokens and not (decided and decided(str(texts[index])))
        ]
    return texts


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
    answers = decode(
        model,
        tokenizer,
        texts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        label=label,
        states=False,
        chat=False,
    )
    return _texts(tokenizer, answers)


def _texts(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer | None]) -> list[str | None]:
    return [
        None if answer is None else str(tokenizer.decode(answer.tokens, skip_special_tokens=True)).strip()
        for answer in answers
    ]


def answers_of(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
    *,
    max_new_tokens: int,
    label: str,
) -> list[Answer | None]:
    """As `decode`, by another engine; it makes its own batches."""
    ids = chat_ids(tokenizer, prompts)
    kept = fitting(ids, [Request.of(asked).prompt[:40] for asked in prompts], backend.context - max_new_tokens)
    order = sorted(kept, key=lambda index: len(ids[index]))
    answers: list[Answer | None] = [None] * len(prompts)
    with track(label, total=len(order), unit="prompts") as advance:
        told = backend.answer([ids[index] for index in order], max_new_tokens, advance)
    for index, tokens in zip(order, told, strict=True):
        answers[index] = Answer(tokens)
    return answers


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    states: bool,
    decided: Callable[[str], bool] | None = None,
    chat: bool = True,
) -> list[Answer | None]:
    """As `generate`, but token ids and, with `states`, the hidden states the head read them from.

    Without `chat` the prompts are texts that stand as they are.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    texts = [render(tokenizer, asked) if chat else str(asked) for asked in prompts]
    # A text in a chat format ends with what tells it from others.
    names = [Request.of(asked).prompt[:40] if chat else str(asked)[-40:] for asked in prompts]
    ids = encode(tokenizer, texts)
    room = model.config.get_text_config().max_position_embeddings - max_new_tokens
    kept = fitting(ids, names, room)
    lengths = [len(row) for row in ids]
    order = sorted(kept, key=lambda index: lengths[index])
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

        def answer(batch: list[int]) -> list[Answer]:
            width = len(ids[batch[-1]])
            # The shared opening first, then padding, then the prompt's own tokens.
            pads = torch.tensor([width - len(ids[index]) for index in batch], device=model.device)[:, None]
            gaps = [[tokenizer.pad_token_id] * (width - len(ids[index])) for index in batch]
            rows = [prefix + gap + ids[index][len(prefix) :] for gap, index in zip(gaps, batch, strict=True)]
            tokens = torch.tensor(rows, device=model.device)
            columns = torch.arange(width, device=model.device) - len(prefix)
            stop = StoppingCriteriaList([_AllDecided(tokenizer, decided, width, ends)] if decided else [])
            with head_inputs(model) as seen:
                out = model.generate(
                    input_ids=tokens,
                    attention_mask=((columns < 0) | (columns >= pads)).long(),
                    **behind(cache, len(batch)),
                    generation_config=greedy,
                    stopping_criteria=stop,
                )
            read = torch.stack([state[:, -1] for state in seen], dim=1).cpu() if states else None
            told = [until_end(row[width:].tolist(), ends) for row in out]
            return [Answer(row, None if read is None else read[i, : len(row)].clone()) for i, row in enumerate(told)]

        start, size = 0, batch_size or len(order)
        while start < len(order):

            def take(size: int, start: int = start) -> list[Answer]:
                return answer(_batch(order[start:], lengths, size))

            told, size = halving(take, size, "answers at a time")
            for index, found in zip(order[start:], told, strict=False):
                answers[index] = found
            start += len(told)
            advance(len(told))
    return answers


def _batch(order: Sequence[int], lengths: Sequence[int], size: int) -> list[int]:
    """The first prompts, at most `size`, in ascending length and of no more tokens than as many of ordinary length."""
    room = size * _ORDINARY
    count = next((n for n, index in enumerate(order[:size]) if n and lengths[index] * (n + 1) > room), size)
    return list(order[:count])


class _AllDecided:
    """A stopping criterion of transformers: ends a batch when no answer needs another word."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decided: Callable[[str], bool], width: int, ends: Collection[int]
    ) -> None:
        self.tokenizer, self.decided, self.width, self.ends = tokenizer, decided, width, ends
        self.open: list[int] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        told = input_ids[:, self.width :].tolist()
        rows = range(len(told)) if self.open is None else self.open
        self.open = [row for row in rows if not self._is_decided(told[row])]
        return torch.full((len(told),), not self.open, device=input_ids.device)

    def _is_decided(self, told: list[int]) -> bool:
        if told[-1] in self.ends:
            return True
        return self.decided(str(self.tokenizer.decode(told, skip_special_tokens=True)).strip())


@contextmanager
def _without_stored_settings(model: PreTrainedModel) -> Iterator[None]:
    """generate() fills what a config leaves open from the model's own, and its penalties are not greedy."""
    from transformers import GenerationConfig

    stored, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored
