"""What a tuned model must not lose: choice accuracy, arithmetic and perplexity, from local files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from nest_rs.errors import NestError
from nest_rs.evaluate.gsm8k import gsm8k_accuracy
from nest_rs.progress import track
from nest_rs.prompts import encode, read_jsonl, text_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_utility(paths: Iterable[Path]) -> None:
    """Fail early, before a model is loaded, if a file cannot be scored.

    Raises:
        NestError: missing, or of another kind.
    """
    for path in paths:
        if not path.is_file():
            raise NestError(f"no such utility file: `{path}`", mend="give a .jsonl choice set or a .txt file")
        if path.suffix not in (".jsonl", ".txt"):
            raise NestError(f"cannot score `{path}`", mend="give a .jsonl choice set or a .txt file")


def measure_utility(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, limit: int | None = None
) -> dict[str, Any]:
    """Score one file: perplexity for a .txt file; for a .jsonl file accuracy, of choices or, without them, of GSM8K.

    Raises:
        NestError: missing, or of another kind.
    """
    check_utility([path])
    if path.suffix == ".jsonl":
        first = read_jsonl(path)[0]
        if "choices" not in first and isinstance(first.get("answer"), str):
            return gsm8k_accuracy(model, tokenizer, path, limit=limit)
        return choice_accuracy(model, tokenizer, path, limit=limit)
    return perplexity(model, tokenizer, path.read_text(encoding="utf-8"), limit=limit)


@torch.inference_mode()
def choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, limit: int | None = None
) -> dict[str, Any]:
    """Zero-shot multiple choice: the choice with the highest log-likelihood a character (the harness's acc_norm).

    Rows hold `question`, `choices` and `answer` (index from 0). No chat template: the usual form of ARC and MMLU.

    Returns:
        `n`, `accuracy` and `ci95`.
    """
    from nest_rs.evaluate.refusal import rate

    rows = read_jsonl(path)[:limit]
    right = 0
    with track(path.stem, total=len(rows), unit="questions") as advance:
        for number, row in enumerate(rows, start=1):
            question = f"Question: {text_field(row, 'question', path, number)}\nAnswer:"
            choices = row.get("choices")
            if (
                not isinstance(choices, list)
                or not all(map(str, choices))
                or row.get("answer") not in range(len(choices))
            ):
                raise NestError(f"row {number} of `{path}` has no `choices` with an `answer` among them")
            scores = _log_likelihoods(model, tokenizer, question, [f" {choice}" for choice in choices])
            best = max(range(len(choices)), key=lambda i: scores[i] / len(str(choices[i])))
            right += best == row["answer"]
            advance(1)
    found = rate(right, len(rows))
    return {"n": found["n"], "accuracy": found["rate"], "ci95": found["ci95"]}


def _log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, endings: list[str]
) -> list[float]:
    start = len(encode(tokenizer, [context])[0])
    ids = encode(tokenizer, [context + ending for ending in endings])
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=model.device)
    mask = (torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]).long().to(model.device)
    kept = width - start + 1  # the last context position predicts the first token of the ending
    logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    logprobs = functional.log_softmax(logits.float(), dim=-1)
    picked = logprobs.gather(2, tokens[:, start:, None])[..., 0] * mask[:, start:]
    totals: list[float] = picked.sum(dim=1).tolist()
    return totals


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    limit: int | None = None,
) -> dict[str, Any]:
    """Token perplexity over consecutive windows without overlap.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: Running text.
        window: Tokens a window; each is scored but its first.
        limit: First windows only.

    Returns:
        `n` (tokens scored) and `perplexity`.
    """
    ids = encode(tokenizer, [text])[0]
    windows = [ids[i : i + window] for i in range(0, len(ids), window)][:limit]
    windows = [chunk for chunk in windows if len(chunk) > 1]
    if not windows:
        raise NestError("the text for perplexity is too short", mend="give at least two tokens")
    total, count = 0.0, 0
    with track("perplexity", total=len(windows), unit="windows") as advance:
        for chunk in windows:
            tokens = torch.tensor([chunk], device=model.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            total += float(functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum"))
            count += len(chunk) - 1
            advance(1)
    return {"n": count, "perplexity": round(math.exp(total / count), 4)}
