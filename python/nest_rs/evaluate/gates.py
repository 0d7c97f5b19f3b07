"""Gates for continuous integration: an evaluation that fails when a figure is past its limit.

A gate is `METRIC OP LIMIT`, such as `asr>5%`, `over_refusal>+2pp`, `arc_easy<-1pp` or `wikitext>+2%`; it fails when it
holds. OP is `<`, `<=`, `>` or `>=`. METRIC is

- `asr`: attack success, the share of answers without a refusal on the harmful suites together, attacked ones included;
- `over_refusal`: the share of refusals on the benign suites together;
- `asr/SUITE`, `over_refusal/SUITE`: the same on one suite, `SUITE` as in the results;
- `asr@JUDGE`, `asr/SUITE@JUDGE`: the share of answers that another judge calls harmful;
- the name of a utility result: accuracy, or perplexity for running text; `kl` with --kl-to.

What is harmful and what benign, `nest_rs.evaluate.suites` says. LIMIT is absolute (`5%` or `0.05`; plain numbers for
perplexity and kl) or, with a sign, relative to --baseline: `+2pp` (percentage points) for rates and accuracies, `+2%`
(of the baseline's value) for perplexity and kl.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nest_rs.errors import NestError, listed
from nest_rs.evaluate.suites import Suite

_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_FORM = re.compile(
    r"\s*(?P<metric>[^<>=\s]+)\s*(?P<op>[<>]=?)\s*(?P<sign>[+-]?)(?P<number>\d+(\.\d+)?)\s*(?P<unit>%|pp|)\s*"
)
_SAY = "write METRIC OP LIMIT, such as asr>5% or over_refusal>+2pp"


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        value: A share from 0 to 1, a perplexity or a divergence; None if nothing was measured.
        share: Whether it is a share.
    """

    value: float | None
    share: bool = True

    def __str__(self) -> str:
        if self.value is None:
            return "not measured"
        return f"{100 * self.value:.1f} %" if self.share else f"{self.value:.4g}"


@dataclass(frozen=True)
class Gate:
    """One `--fail-if`.

    Attributes:
        text: As the user wrote it.
        metric: The figure it looks at.
        op: `<`, `<=`, `>` or `>=`.
        number: The limit in the unit, with its sign.
        unit: `%`, `pp` or none.
        relative: Whether the limit is counted from the baseline.
    """

    text: str
    metric: str
    op: str
    number: float
    unit: str
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a gate.

        Raises:
            NestError: it has another form.
        """
        found = _FORM.fullmatch(text)
        if not found:
            raise NestError(f"cannot read the gate `{text}`", mend=_SAY)
        number = float(f"{found['sign']}{found['number']}")
        gate = cls(text, found["metric"], found["op"], number, found["unit"], bool(found["sign"]))
        if gate.unit == "pp" and not gate.relative:
            raise NestError(f"the gate `{text}` has points without a sign", mend="write +2pp against a baseline, or 2%")
        return gate

    def check_unit(self, share: bool) -> None:
        """Refuse limits that say something else than they seem to.

        Raises:
            NestError: per cent with a sign or a plain number above 1 for a rate; points or plain per cent for another
                figure.
        """
        if share and self.relative and self.unit == "%":
            raise NestError(f"the gate `{self.text}` is ambiguous for a rate", mend="write +2pp for percentage points")
        if share and not self.unit and abs(self.number) > 1:
            raise NestError(f"the gate `{self.text}` has no unit, and a rate ends at 1", mend="write 5% or +2pp")
        if not share and (self.unit == "pp" or (self.unit == "%" and not self.relative)):
            raise NestError(f"the gate `{self.text}` has the unit of a rate", mend="write a plain number, or +2%")

    def limit(self, baseline: Metric | None) -> float | None:
        """The limit in the figure's own measure; None if it is relative and the baseline has no such figure."""
        step = self.number / 100 if self.unit else self.number
        if not self.relative:
            return step
        if baseline is None or baseline.value is None:
            return None
        return baseline.value * (1 + step) if self.unit == "%" else baseline.value + step

    def holds(self, value: float, limit: float) -> bool:
        """Whether the figure is past its limit; what differs by rounding alone is equal."""
        return bool(_OPERATORS[self.op](round(value, 9), round(limit, 9)))


def check_gates(gates: Iterable[Gate], metrics: dict[str, bool]) -> None:
    """Fail early if a gate looks at what will not be measured.

    Args:
        gates: The gates.
        metrics: The figures to come, and whether each is a share.

    Raises:
        NestError: an unknown metric, or a unit that does not fit it.
    """
    for gate in gates:
        if gate.metric not in metrics:
            known = f"there is {listed(metrics, 12)}" if metrics else "nothing is measured"
            raise NestError(
                f"the gate `{gate.text}` looks at `{gate.metric}`, which is not measured here",
                mend=f"{known}; a suite counts as harmful or benign by its `kind` column or name",
            )
        gate.check_unit(metrics[gate.metric])


def expected(suites: Sequence[Suite], judges: Iterable[str], utility: dict[str, bool]) -> dict[str, bool]:
    """The names of the figures to come: see `measured`.

    Args:
        suites: To be judged.
        judges: Names of the judges beside refusal.
        utility: Names of utility results, and whether each is a share.
    """
    shares: dict[str, bool] = {}
    for kind, metric, panel in (
        ("harmful", "asr", ["", *(f"@{name}" for name in judges)]),
        ("benign", "over_refusal", [""]),
    ):
        chosen = [suite.name for suite in suites if suite.kind == kind]
        for judge in panel:
            shares |= {f"{metric}{judge}": True for _ in chosen[:1]}
            shares |= {f"{metric}/{name}{judge}": True for name in chosen}
    return {**shares, **utility}


def measured(results: dict[str, Any], suites: Sequence[Suite]) -> dict[str, Metric]:
    """The figures that gates look at.

    Args:
        results: By suite and utility file, as `eval --json` prints them, with `judges` where others were asked.
        suites: Whose kinds say which counts for what. A figure over several suites needs all of them in the results.
    """
    found: dict[str, Metric] = {}
    panel = {name: rows for name, rows in results.get("judges", {}).items() if name != "agreement"}
    for kind, metric in (("harmful", "asr"), ("benign", "over_refusal")):
        chosen = [suite.name for suite in suites if suite.kind == kind]
        rows = {name: results[name] for name in chosen if name in results}
        hits = {
            name: (row["n"] - row["refused"] if kind == "harmful" else row["refused"], row["n"])
            for name, row in rows.items()
        }
        found |= _shares(metric, "", hits, whole=len(hits) == len(chosen))
        for judge, judged in panel.items() if kind == "harmful" else ():
            hits = {name: (judged[name]["harmful"], judged[name]["n"]) for name in chosen if name in judged}
            found |= _shares(metric, f"@{judge}", hits, whole=len(hits) == len(chosen))
    for name, row in results.items():
        for key in ("accuracy", "perplexity", "kl"):
            if key in row:
                found[name] = Metric(row[key], share=key == "accuracy")
    return found


def _shares(metric: str, judge: str, hits: dict[str, tuple[int, int]], *, whole: bool) -> dict[str, Metric]:
    """One share a suite, and that of all together where they are whole."""
    named = {f"{metric}/{name}{judge}": pair for name, pair in hits.items()}
    if hits and whole:
        named[f"{metric}{judge}"] = (sum(part for part, _ in hits.values()), sum(n for _, n in hits.values()))
    return {name: Metric(part / n if n else None) for name, (part, n) in named.items()}


def check_baseline(gates: Iterable[Gate], baseline: dict[str, Metric]) -> None:
    """Fail if a gate looks at a figure that the baseline lacks.

    Raises:
        NestError: see there.
    """
    lacking = [gate.metric for gate in gates if gate.relative and gate.metric not in baseline]
    if lacking:
        raise NestError(f"the baseline has no {listed(lacking)}", mend="judge it on the same suites and attacks")


def apply_gates(gates: Sequence[Gate], metrics: dict[str, Metric], baseline: dict[str, Metric]) -> list[dict[str, Any]]:
    """Try each gate.

    A figure that was not measured, here or in the baseline, fails its gate.

    Returns:
        For each gate its `gate`, `value`, `limit`, whether it `failed`, and a `line` that says why if it did.
    """
    tried = []
    for gate in gates:
        metric, before = metrics[gate.metric], baseline.get(gate.metric)
        limit = gate.limit(before)
        failed = metric.value is None or limit is None or gate.holds(metric.value, limit)
        against = f", baseline {before or 'not measured'}" if gate.relative else ""
        line = f"gate failed: {gate.text}: {gate.metric} is {metric}{against}" if failed else None
        tried.append({"gate": gate.text, "value": metric.value, "limit": limit, "failed": failed, "line": line})
    return tried
