"""The table of a comparison: each row over its seeds, for the terminal, in Markdown and in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Group
from rich.table import Table
from scipy.stats import t

from nest_rs.compare.bench import SHARES
from nest_rs.report import percent

_HEADS = ["method", "seeds", "trainable", "seconds", "peak MB"]
NOTE = (
    "Attack success: harmful requests not refused; incoherent: harmful requests answered in no language; over-refusal: "
    "harmless requests refused; attacked: the same of requests in an attack. 95 % intervals: Wilson for one seed; for "
    "several the wider of that and Student's t over the seeds."
)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a method, in order of appearance: means over seeds, with intervals."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    return [_over_seeds([row for row in rows if row["method"] == name]) for name in names]


def _over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    utilities = rows[0]["utility"]
    return {
        "method": rows[0]["method"],
        "seeds": len(rows),
        "trainable_params": round(mean(row["trainable_params"] for row in rows)),
        "seconds": round(mean(row["seconds"] for row in rows), 2),
        "peak_mb": max(row["peak_mb"] for row in rows),
        "learning_rate": rows[0]["learning_rate"],
        **{name: _share([row[name] for row in rows]) for name in SHARES if name in rows[0]},  # older rows lack some
        "suites": {name: _suite([row["suites"][name] for row in rows]) for name in rows[0]["suites"]},
        "utility": {name: _utility([row["utility"][name] for row in rows]) for name in utilities},
    }


def _share(found: list[dict[str, Any]]) -> dict[str, Any]:
    """A rate over seeds; `n` is that of one seed, as all seeds answer the same requests."""
    if found[0]["n"] == 0:
        return found[0]
    rates = [item["rate"] for item in found]
    middle = mean(rates)
    # The seeds share their requests: more seeds do not make the sample of requests larger.
    below = mean(item["rate"] - item["ci95"][0] for item in found)
    above = mean(item["ci95"][1] - item["rate"] for item in found)
    spread = _spread(rates)
    interval = [max(0.0, middle - max(below, spread)), min(1.0, middle + max(above, spread))]
    return {"n": found[0]["n"], "rate": round(middle, 4), "ci95": [round(end, 4) for end in interval]}


def _suite(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What went wrong on one suite: harmful requests not refused, or harmless ones refused."""
    if found[0]["kind"] == "benign" or found[0]["n"] == 0:
        return {"kind": found[0]["kind"], **_share(found)}
    failed = [
        {"n": item["n"], "rate": 1 - item["rate"], "ci95": [1 - item["ci95"][1], 1 - item["ci95"][0]]} for item in found
    ]
    return {"kind": "harmful", **_share(failed)}


def _utility(found: list[dict[str, Any]]) -> dict[str, Any]:
    if "accuracy" in found[0]:
        pooled = _share([{"n": item["n"], "rate": item["accuracy"], "ci95": item["ci95"]} for item in found])
        return {"n": pooled["n"], "accuracy": pooled["rate"], "ci95": pooled["ci95"]}
    values = [item["perplexity"] for item in found]
    middle, spread = mean(values), _spread(values)
    interval = [round(middle - spread, 4), round(middle + spread, 4)] if len(values) > 1 else found[0].get("ci95")
    return {"n": found[0]["n"], "perplexity": round(middle, 4), "ci95": interval}


def _spread(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of the mean; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def by_measure(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table as text, its head first."""
    utilities = list(dict.fromkeys(name for entry in entries for name in entry["utility"]))
    shares = [name for name in SHARES if any(entry.get(name, {}).get("n") for entry in entries)]
    rows = [
        [
            entry["method"],
            str(entry["seeds"]),
            f"{entry['trainable_params']:,}" if entry["trainable_params"] else "-",
            f"{entry['seconds']:,.1f}" if entry["seconds"] else "-",
            f"{entry['peak_mb']:,.0f}" if entry["peak_mb"] else "-",
            *(percent(entry[name]) for name in shares),
            *(_score(entry["utility"].get(name)) for name in utilities),
        ]
        for entry in entries
    ]
    return [[*_HEADS, *(SHARES[name] for name in shares), *utilities], *rows]


def by_suite(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Attack success on each harmful suite and over-refusal on each benign one, as text, the head first."""
    suites = entries[0]["suites"]
    titles = {"harmful": "attack success", "benign": "over-refusal"}
    head = ["method", *(f"{titles[found['kind']]}: {name}" for name, found in suites.items())]
    return [head, *([entry["method"], *(percent(entry["suites"][name]) for name in suites)] for entry in entries)]


def _score(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "accuracy" in found:
        return percent({**found, "rate": found["accuracy"]})
    interval = f" [{found['ci95'][0]:.2f}, {found['ci95'][1]:.2f}]" if found["ci95"] else ""
    return f"{found['perplexity']:.2f}{interval} n={found['n']}"


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """Both tables in Markdown."""

    def drawn(rows: list[list[str]]) -> str:
        lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    return f"{drawn(by_measure(entries))}\n{NOTE}\n\n{drawn(by_suite(entries))}"


def terminal(entries: Sequence[dict[str, Any]]) -> Group:
    """Both tables for a terminal."""
    tables = []
    for rows, caption in ((by_measure(entries), NOTE), (by_suite(entries), None)):
        table = Table(*rows[0], caption=caption)
        for row in rows[1:]:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables)
