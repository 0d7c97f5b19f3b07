"""Several judges of the same answers: their rates, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from nest_rs.evaluate.judges import REFUSAL, Judge, Verdict
from nest_rs.evaluate.refusal import rate
from nest_rs.evaluate.suites import Suite
from nest_rs.files import read_json, write_json, write_jsonl
from nest_rs.prompts import read_jsonl


def judge_answers(judges: Sequence[Judge], suites: Sequence[Suite], out: Path) -> dict[str, Any]:
    """Put the answers in `out/samples.jsonl` before further judges.

    Adds each verdict to its sample, and the summary to `out/results.json` under `judges`.

    Args:
        judges: Asked beside the refusal judge.
        suites: Those that were answered; their kinds say where an answer can be an attack's success.
        out: A folder filled by `evaluate_refusal`.

    Returns:
        By judge and suite `n` (verdicts that could be read), `harmful`, `rate`, `ci95`, `unknown` (those that could
        not), and with a scale the mean `score`; and `agreement`, see `agreement`.
    """
    samples = read_jsonl(out / "samples.jsonl")
    answered = [row for row in samples if row["answer"] is not None]
    asked = [row.get("goal", row["prompt"]) for row in answered]
    answers = [f"{row['prefill']} {row['answer']}" if "prefill" in row else row["answer"] for row in answered]
    found: dict[str, Any] = {}
    for judge in judges:
        verdicts = judge.judge(asked, answers)
        for row, verdict in zip(answered, verdicts, strict=True):
            row.setdefault("judges", {})[judge.name] = {
                key: value for key, value in vars(verdict).items() if value is not None or key == "harmful"
            }
        found[judge.name] = {
            suite.name: _summary(
                [verdict for row, verdict in zip(answered, verdicts, strict=True) if row["suite"] == suite.name]
            )
            for suite in suites
        }
    found["agreement"] = agreement(answered, {suite.name for suite in suites if suite.kind != "benign"})
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "results.json", {**read_json(out / "results.json"), "judges": found})
    return found


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    known = [verdict.harmful for verdict in verdicts if verdict.harmful is not None]
    share = rate(sum(known), len(known))
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return {
        "n": len(known),
        "harmful": sum(known),
        "rate": share["rate"],
        "ci95": share["ci95"],
        "unknown": len(verdicts) - len(known),
        **({"score": round(sum(scores) / len(scores), 4)} if scores else {}),
    }


def agreement(answered: Sequence[dict[str, Any]], attacked: set[str]) -> list[dict[str, Any]]:
    """How far each two judges agree, over the answers on which both have a verdict.

    On `success`: of answers to requests that should be refused, is this one an attack's success? The refusal judge says
    so where it sees no refusal, the others where they see harm. On `refused`: is the answer a refusal, for the judges
    that say.

    Args:
        answered: Samples with the verdicts in them.
        attacked: Suites whose requests should be refused.

    Returns:
        For each pair and question `n`, `agreement` (the share of equal verdicts), its Wilson `ci95`, and Cohen's
        `kappa` (None where one verdict is all that was given).
    """
    columns: dict[str, dict[str, list[bool | None]]] = {"success": {}, "refused": {}}
    harmful = [row for row in answered if row["suite"] in attacked]
    columns["success"][REFUSAL] = [not row["refused"] for row in harmful]
    columns["refused"][REFUSAL] = [row["refused"] for row in answered]
    for name in dict.fromkeys(name for row in answered for name in row.get("judges", {})):
        columns["success"][name] = [row["judges"][name]["harmful"] for row in harmful]
        columns["refused"][name] = [row["judges"][name].get("refused") for row in answered]
    pairs = []
    for question, given in columns.items():
        for one, other in combinations(given, 2):
            both = [(a, b) for a, b in zip(given[one], given[other], strict=True) if a is not None and b is not None]
            if both:
                pairs.append({"judges": [one, other], "on": question, **_agreed(both)})
    return pairs


def _agreed(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    n = len(pairs)
    share = rate(sum(a == b for a, b in pairs), n)
    first, second = (sum(pair[side] for pair in pairs) / n for side in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    equal = sum(a == b for a, b in pairs) / n
    kappa = None if chance == 1 else round((equal - chance) / (1 - chance), 4)
    return {"n": n, "agreement": share["rate"], "ci95": share["ci95"], "kappa": kappa}
