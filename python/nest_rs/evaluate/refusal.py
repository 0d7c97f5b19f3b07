"""Refusal rates of a model on suites of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from nest_rs.evaluate.early import verdict_stands
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.evaluate.suites import Suite
from nest_rs.files import read_json, write_json, write_jsonl
from nest_rs.prompts import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nest_rs.evaluate.backends import Backend

# Rates by group of a suite, beside the results.
GROUPS = "groups.json"


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


def by_group(suite: Suite, verdicts: Sequence[bool | None]) -> dict[str, dict[str, Any]]:
    """The rate of each group of a suite, given who was refused; None where nothing was judged. Empty for one group."""
    found: dict[str, list[bool]] = {}
    for group, verdict in zip(suite.groups, verdicts, strict=False):
        if group and verdict is not None:
            found.setdefault(group, []).append(verdict)
    return {group: rate(sum(told), len(told)) for group, told in found.items()} if len(found) > 1 else {}


def standing_out(suites: Sequence[Suite], results: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """The groups that fare worse than their suite by more than chance: where to look first.

    Args:
        suites: With their kinds; one without a kind has no worse side.
        results: What `evaluate_refusal` returned.
        out: What it filled.

    Returns:
        `suite`, `group`, and its rate, of each group whose 95 % interval lies below the rate of its harmful suite or
        above that of its benign one; the furthest first.
    """
    groups: dict[str, dict[str, Any]] = read_json(out / GROUPS)
    worse = []
    for suite in suites:
        sign = {"harmful": 1, "benign": -1}.get(suite.kind or "", 0)
        for group, found in groups.get(suite.name, {}).items():
            nearest = found["ci95"][1 if sign > 0 else 0]
            if sign * (results[suite.name]["rate"] - nearest) > 0:
                distance = abs(results[suite.name]["rate"] - found["rate"])
                worse.append((distance, {"suite": suite.name, "group": group, **found}))
    return [row for _, row in sorted(worse, key=lambda item: -item[0])]


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

    Writes `results.json`, `groups.json` (the same by group of a suite) and `samples.jsonl` (every request, answer and
    verdict) under `out`. Of an answer whose opening was given, only what the model wrote itself is judged. With
    `early`, a batch of answers ends where no verdict can change any more: the same verdicts in less time, on shorter
    answers.

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
    groups: dict[str, dict[str, Any]] = {}
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
        groups[suite.name] = by_group(suite, verdicts)
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "results.json", results)
    write_json(out / GROUPS, {name: found for name, found in groups.items() if found})
    return results


def _sent(request: Request) -> dict[str, Any]:
    """What a model was sent: the user's message, and what else there was."""
    return {
        "prompt": request.prompt,
        **({"goal": request.goal} if request.goal != request.prompt else {}),
        **({"messages": list(request.messages)} if len(request.messages) > 1 else {}),
        **({"prefill": request.prefill} if request.prefill else {}),
    }
