"""What the model learns to answer: refusals to harmful requests, its own words to all others."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nest_rs.errors import NestError
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_apology, is_refusal
from nest_rs.files import read_json, write_json
from nest_rs.models import Base, cache_dir
from nest_rs.prompts import Prompt, encode, fitting, refusals, render
from nest_rs.train import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def own_answers(
    base: Base,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str | None]:
    """The base's greedy answers, from the cache where the same base has answered the same prompts before."""
    key = hashlib.sha256(
        "\0".join(
            [base.fingerprint(), str(model.dtype), str(max_new_tokens), *(item.prompt for item in prompts)]
        ).encode()
    ).hexdigest()
    path = cache_dir() / "answers" / f"{key[:32]}.json"
    if path.is_file():
        cached: list[str | None] = read_json(path)
        return cached
    texts = [item.prompt for item in prompts]
    answers = generate(
        model, tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=batch_size, label="base answers"
    )
    write_json(path, answers)
    return answers


def choose_benign(prompts: Sequence[Prompt], count: int, twin_share: float, seed: int) -> list[Prompt]:
    """Pick harmless training requests: `twin_share` of them twins as far as there are enough, the rest ordinary."""
    rng = random.Random(seed)
    ordinary = [item for item in prompts if item.kind == "benign"]
    twins = [item for item in prompts if item.kind == "twin"]
    wanted = min(len(twins), round(count * twin_share))
    chosen = rng.sample(twins, wanted) + rng.sample(ordinary, min(len(ordinary), count - wanted))
    return sorted(chosen, key=lambda item: item.id)


def refusal_examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, room: int, seed: int
) -> list[Example]:
    """Harmful requests, each with its own response or one of the refusal texts."""
    rng = random.Random(seed)
    texts = refusals()
    answers = [item.response or rng.choice(texts) for item in prompts]
    return _examples(tokenizer, prompts, answers, room=room, ended=True)


def helpful_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str | None],
    *,
    room: int,
    max_tokens: int,
) -> list[Example]:
    """Harmless requests with helpful answers; those to which the base itself refused or apologised are left out."""
    helpful = [
        (item, answer)
        for item, answer in zip(prompts, answers, strict=True)
        if answer and not is_refusal(answer) and not is_apology(answer)
    ]
    log.info("%d of %d harmless requests have a helpful answer of the base", len(helpful), len(prompts))
    if not helpful:
        raise NestError("the base refuses every harmless request", mend="give prompts with a `response` of their own")
    kept, texts = zip(*helpful, strict=True)
    examples = _examples(tokenizer, kept, texts, room=room, ended=False)
    return [Example(example.prompt, example.answer[:max_tokens]) for example in examples]


def _examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str], *, room: int, ended: bool
) -> list[Example]:
    asked = encode(tokenizer, [render(tokenizer, item.prompt) for item in prompts])
    told = encode(tokenizer, answers)
    end = [tokenizer.eos_token_id] if ended else []
    fit = fitting(asked, [item.id for item in prompts], room)
    return [Example(asked[index], told[index] + end) for index in fit]
