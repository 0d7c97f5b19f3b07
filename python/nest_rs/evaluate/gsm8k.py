"""Grade-school arithmetic: does the answer end in the right number?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_rs.errors import NestError
from nest_rs.evaluate.generate import generate
from nest_rs.prompts import read_jsonl, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ASK = "{question}\n\nThink step by step. End with a line that holds #### and the answer as a number."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> float | None:
    """The number behind the last `####`, or without one the last number of all; None without any.

    Commas between thousands, currency and unit signs are passed over.
    """
    marked = text.rpartition("####")[2] if "####" in text else ""
    found = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def gsm8k_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    limit: int | None = None,
    max_new_tokens: int = 320,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Exact match of the final number (Cobbe et al. 2021), zero-shot in the chat format, greedy.

    Rows hold `question` and `answer`, whose number stands behind `####` or last. A question that does not fit the
    context counts as wrong.

    Returns:
        `n`, `accuracy` and `ci95` (Wilson).

    Raises:
        NestError: a row without a question, or without a number in its answer.
    """
    from nest_rs.evaluate.refusal import rate

    rows = read_jsonl(path)[:limit]
    wanted, asked = [], []
    for number, row in enumerate(rows, start=1):
        asked.append(_ASK.replace("{question}", text_field(row, "question", path, number)))
        value = final_number(text_field(row, "answer", path, number))
        if value is None:
            raise NestError(f"row {number} of `{path}` has no number in its `answer`")
        wanted.append(value)
    answers = generate(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, label=path.stem)
    right = sum(final_number(answer or "") == value for answer, value in zip(answers, wanted, strict=True))
    found = rate(right, len(rows))
    return {"n": found["n"], "accuracy": found["rate"], "ci95": found["ci95"]}
