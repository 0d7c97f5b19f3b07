"""How far a tuned model's words are from its base's, where they should not have moved: on ordinary requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import t
from torch.nn import functional

from nest_rs.errors import NestError
from nest_rs.evaluate.generate import decode
from nest_rs.progress import track
from nest_rs.prompts import Request, chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def kl_to_base(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Request],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> dict[str, Any]:
    """KL(base || model) of the next token, in nats, along the base's own greedy answers.

    Args:
        model: The tuned model.
        base: What it was tuned from, on the same device.
        tokenizer: Of both.
        prompts: Requests that the tune should leave alone.
        max_new_tokens: Tokens of the base's answers.
        batch_size: Answers decoded together.

    Returns:
        `n` (answers), `tokens`, `kl` (mean over tokens), `ci95` (t interval over answers, each weighed by its tokens;
        None for a single one) and `first` (mean over the first tokens, where a refusal begins).

    Raises:
        NestError: the models have different vocabularies.
    """
    if model.config.get_text_config().vocab_size != base.config.get_text_config().vocab_size:
        raise NestError("the model and the base of --kl-to have different vocabularies", mend="name the model's base")
    answers = decode(
        base, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, label="base", states=False
    )
    asked = chat_ids(tokenizer, prompts)
    told = [(ids, answer.tokens) for ids, answer in zip(asked, answers, strict=True) if answer is not None]
    per_answer: list[list[float]] = []
    with track("kl", total=len(told), unit="answers") as advance:
        for ids, tokens in told:
            row = torch.tensor([ids + tokens], device=base.device)
            kept = len(tokens) + 1  # the last prompt token predicts the first of the answer
            ours, theirs = (
                functional.log_softmax(
                    side(input_ids=row, logits_to_keep=kept, use_cache=False).logits[0, :-1].float(), dim=-1
                )
                for side in (model, base)
            )
            per_answer.append(functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1).tolist())
            advance(1)
    tokens_in_all = sum(map(len, per_answer))
    mean = sum(map(sum, per_answer)) / tokens_in_all
    return {
        "n": len(per_answer),
        "tokens": tokens_in_all,
        "kl": round(mean, 6),
        "ci95": _interval(per_answer, mean),
        "first": round(sum(values[0] for values in per_answer) / len(per_answer), 6),
    }


def _interval(per_answer: list[list[float]], mean: float) -> list[float] | None:
    """The ratio estimator's interval: tokens of one answer are not independent, answers are."""
    n = len(per_answer)
    if n < 2:
        return None
    size = sum(map(len, per_answer)) / n
    spread = sum((sum(values) - mean * len(values)) ** 2 for values in per_answer) / (n - 1)
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(spread / n) / size
    return [round(max(0.0, mean - half), 6), round(mean + half, 6)]
