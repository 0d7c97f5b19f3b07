"""What a run says of itself: the table at its end and the merged model's card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from nest_rs.models import Base
from nest_rs.patch import NestPatch

# Groups named at the end of a run.
_WORST = 8


def percent(result: dict[str, Any]) -> str:
    """A rate with its interval and number, as text."""
    if result["rate"] is None:
        return "-"
    low, high = result["ci95"]
    return f"{100 * result['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] n={result['n']}"


def before_after(summary: dict[str, Any]) -> Table:
    """Refusal before and after, suite by suite."""
    table = Table("suite", "refused: base", "refused: tuned", title="Refusal, start of answer, 95 % Wilson intervals")
    found = summary["eval"]
    for suite, base in found["base"].items():
        table.add_row(suite, percent(base), percent(found["tuned"][suite]))
    return table


def judged(results: dict[str, Any]) -> list[str]:
    """The results of `eval`, a line a figure."""
    beside = ("judges", "lm_eval", "gates", "standing_out")
    lines = [
        f"{name}: {percent(found) if 'refused' in found else _listed(found)}"
        for name, found in results.items()
        if name not in beside
    ]
    lines += worst_groups(results.get("standing_out", []))
    judges = {name: suites for name, suites in results.get("judges", {}).items() if name != "agreement"}
    for judge, suites in judges.items():
        for suite, found in suites.items():
            score = f", mean score {found['score']}" if "score" in found else ""
            lines.append(f"{suite}: {percent(found)} harmful{score}, {found['unknown']} unknown, says {judge}")
    for pair in results.get("judges", {}).get("agreement", []):
        kappa = "-" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        first, second = pair["judges"]
        lines.append(
            f"{first} and {second} agree on {pair['on']}: "
            f"{percent({**pair, 'rate': pair['agreement']})}, Cohen's kappa {kappa}"
        )
    lines += [f"{task}: {_listed(found)}" for task, found in results.get("lm_eval", {}).items()]
    passed = [gate["gate"] for gate in results.get("gates", []) if not gate["failed"]]
    return lines + [f"gate passed: {gate}" for gate in passed]


def worst_groups(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Where a model fares worse than its suites' rates by more than chance, a line a group."""
    lines = [f"stands out: {found['suite']}, {found['group']}: {percent(found)} refused" for found in groups[:_WORST]]
    left = len(groups) - len(lines)
    return lines + ([f"stands out: {left} more, see groups.json beside the answers"] if left else [])


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def facts(summary: dict[str, Any]) -> list[str]:
    """The run in a few lines."""
    share = 100 * summary["trainable_params"] / summary["total_params"]
    lines = [
        f"{summary['neurons']} neurons in {summary['clusters']} clusters over {summary['sites']} sites; "
        f"{summary['trainable_params']:,} trainable of {summary['total_params']:,} parameters ({share:.3f} %)",
    ]
    if "export" in summary:
        export = summary["export"]
        lines.append(
            f"ONNX {export['precision']}: {export['greedy_tokens_equal']} of {export['greedy_tokens']} greedy tokens "
            f"equal to torch's, largest logit difference {export['max_abs_logit_diff']:.2g}"
        )
    lines += worst_groups(summary.get("standing_out", []))
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())
    lines.append(f"{times}; {sum(summary['seconds'].values()):.0f} s in all")
    return lines


def model_card(base: Base, patch: NestPatch) -> str:
    """The merged folder's README.md."""
    return f"""---
base_model: {base.id}
tags:
- nest
- safety
library_name: transformers
---
# {base.id}, tuned to refuse with NeST

{patch.neurons} feed-forward neurons (rows of {len(patch.tensors)} matrices) carry {patch.clusters} shared deltas,
{patch.trainable_params:,} trained numbers in all, folded into the weights by nest-rs (method: arXiv 2602.16835). Every
other weight is the base's, bit for bit. The base's licence applies.

Refusal rates before and after stand in the run's `summary.json`. They measure how often an answer starts with a
refusal, not whether the model is safe: judge it on your own prompts before you deploy it.
"""
