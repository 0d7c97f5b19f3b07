"""Refusal rates of a model on suites of requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from nest_rs.evaluate.early import verdict_stands
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.evaluate.suites import Suite
from nest_rs.files import write_json, write_jsonl
from nest_rs.prompts import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nest_rs.evaluate.backends import Backend


def rate(refused: int, n: int) -> dict[str, Any]:
    """A rate with its Wilson 95 % interval; both None where nothing was judged."""
    if n == 0:
        return {"n": 0, "refused": 0, "rate": None, "ci95": None}
    interval = binomtest(refused, n).proportion_ci(0.95, method="wilson")
    return {
        "n": n,
        "refused": refused,
        "rate": round(refused / n, 4),
        "ci95": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def evaluate_refusal(
    model: PreTrainedModel | Backend,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[Suite],
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    label: str = "judge",
    early: bool = False,
) -> dict[str, dict[str, Any]]:
    """Answer all suites greedily and judge each answer by its start.

    Writes `results.json` and `samples.jsonl` (every request, answer and verdict) under `out`. Of an answer whose
    opening was given, only what the model wrote itself is judged. With `early`, a batch of answers ends where no
    verdict can change any more: the same verdicts in less time, on shorter answers.

    Returns:
        By suite: `n` (judged), `refused`, `rate`, `ci95`; a prompt longer than the context is not judged.
    """
    prompts = [asked for suite in suites for asked in suite.prompts]
    answers = iter(
        generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            label=label,
            decided=verdict_stands if early else None,
        )
    )
    results: dict[str, dict[str, Any]] = {}
    samples = []
    for suite in suites:
        verdicts = []
        for identity, asked in zip(suite.ids, suite.prompts, strict=True):
            answer = next(answers)
            refused = None if answer is None else is_refusal(answer)
            verdicts.append(refused)
            samples.append(
                {"suite": suite.name, "id": identity, **_sent(Request.of(asked)), "answer": answer, "refused": refused}
            )
        judged = [verdict for verdict in verdicts if verdict is not None]
        results[suite.name] = rate(sum(judged), len(judged))
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "results.json", results)
    return results


def _sent(request: Request) -> dict[str, Any]:
    """What a model was sent: the user's message, and what else there was."""
    return {
        "prompt": request.prompt,
        **({"goal": request.goal} if request.goal != request.prompt else {}),
        **({"messages": list(request.messages)} if len(request.messages) > 1 else {}),
        **({"prefill": request.prefill} if request.prefill else {}),
    }
