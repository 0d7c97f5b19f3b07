"""Gates: what they mean, what they refuse, and what they count."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nest_rs import NestError
from nest_rs.evaluate.gates import Gate, Metric, apply_gates, check_baseline, check_gates, expected, measured
from nest_rs.evaluate.refusal import rate
from nest_rs.evaluate.suites import Suite

HARMFUL = [Suite("a", ["1"], ["x"], "harmful"), Suite("a+rot13", ["1"], ["x"], "harmful")]
BENIGN = [Suite("b", ["1"], ["x"], "benign"), Suite("c", ["1"], ["x"], "benign")]
RESULTS: dict[str, Any] = {
    "a": rate(90, 100),
    "a+rot13": rate(20, 50),
    "b": rate(3, 100),
    "c": rate(9, 200),
    "odd": rate(50, 50),
    "arc": {"n": 500, "accuracy": 0.49, "ci95": [0.45, 0.53]},
    "wiki": {"n": 1000, "perplexity": 30.0},
    "kl": {"n": 10, "tokens": 80, "kl": 0.02, "ci95": None, "first": 0.01},
    "judges": {
        "guard:g": {
            "a": {"n": 80, "harmful": 4, "rate": 0.05, "ci95": [0, 1], "unknown": 20},
            "a+rot13": {"n": 20, "harmful": 1, "rate": 0.05, "ci95": [0, 1], "unknown": 30},
            "b": {"n": 100, "harmful": 50, "rate": 0.5, "ci95": [0, 1], "unknown": 0},
        },
        "agreement": [{"judges": ["refusal", "guard:g"], "on": "success", "n": 100, "agreement": 0.5}],
    },
}


def tried(text: str, baseline: dict[str, Any] | None = None) -> dict[str, Any]:
    """One gate, through all of its checks."""
    suites = [*HARMFUL, *BENIGN, Suite("odd", ["1"], ["x"])]
    gates = [Gate.parse(text)]
    check_gates(gates, expected(suites, ["guard:g"], {"arc": True, "wiki": False, "kl": False}))
    before = measured(baseline or {}, suites)
    if baseline is not None:
        check_baseline(gates, before)
    (found,) = apply_gates(gates, measured(RESULTS, suites), before)
    return found


@pytest.mark.parametrize(
    ("text", "value", "failed"),
    [
        ("asr>25%", 40 / 150, True),  # 10 of 100 and 30 of 50 answered: over all answers, not over suites
        ("asr>27%", 40 / 150, False),
        ("asr > 0.25", 40 / 150, True),
        ("asr/a>10%", 0.1, False),
        ("asr/a>=10%", 0.1, True),
        ("asr/a+rot13>50%", 0.6, True),
        ("asr@guard:g>4%", 0.05, True),  # 5 of the 100 verdicts that could be read
        ("asr/a@guard:g<=5%", 0.05, True),
        ("over_refusal>3.9%", 12 / 300, True),
        ("over_refusal>4%", 12 / 300, False),
        ("over_refusal/b<3%", 0.03, False),
        ("arc<50%", 0.49, True),
        ("wiki>31", 30.0, False),
        ("wiki>=30", 30.0, True),
        ("kl>0.01", 0.02, True),
    ],
)
def test_absolute_gates(text: str, value: float, failed: bool) -> None:
    found = tried(text)
    assert found["value"] == pytest.approx(value)
    assert found["failed"] is failed
    assert (found["line"] is not None) is failed


BEFORE: dict[str, Any] = {
    "a": rate(10, 100),
    "a+rot13": rate(5, 50),
    "b": rate(1, 100),
    "c": rate(5, 200),
    "arc": {"n": 500, "accuracy": 0.5, "ci95": [0.46, 0.54]},
    "wiki": {"n": 1000, "perplexity": 29.0},
}


@pytest.mark.parametrize(
    ("text", "limit", "failed"),
    [
        ("over_refusal>+2pp", 6 / 300 + 0.02, False),  # exactly two points more
        ("over_refusal>=+2pp", 6 / 300 + 0.02, True),
        ("over_refusal>+1.9pp", 6 / 300 + 0.019, True),
        ("over_refusal>+0.01", 6 / 300 + 0.01, True),
        ("over_refusal/c>+2pp", 0.045, False),
        ("asr>-60pp", 135 / 150 - 0.6, False),
        ("asr>-70pp", 135 / 150 - 0.7, True),
        ("arc<-1pp", 0.49, False),
        ("arc<-0.5pp", 0.495, True),
        ("wiki>+2%", 29.58, True),
        ("wiki>+4%", 30.16, False),
        ("wiki>+0.5", 29.5, True),
    ],
)
def test_relative_gates(text: str, limit: float, failed: bool) -> None:
    found = tried(text, BEFORE)
    assert found["limit"] == pytest.approx(limit)
    assert found["failed"] is failed


def test_a_failed_gate_says_why_in_one_line() -> None:
    assert tried("asr>5%")["line"] == "gate failed: asr>5%: asr is 26.7 %"
    assert tried("wiki>+2%", BEFORE)["line"] == "gate failed: wiki>+2%: wiki is 30, baseline 29"


def test_what_was_not_measured_fails_its_gate() -> None:
    nothing = {"asr": Metric(None)}
    (found,) = apply_gates([Gate.parse("asr>5%")], nothing, {})
    assert (found["failed"], found["line"]) == (True, "gate failed: asr>5%: asr is not measured")
    (found,) = apply_gates([Gate.parse("asr>+5pp")], {"asr": Metric(0.0)}, nothing)
    assert found["line"] == "gate failed: asr>+5pp: asr is 0.0 %, baseline not measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the gate ``; write METRIC OP LIMIT, such as asr>5% or over_refusal>+2pp"),
        ("asr", "cannot read the gate `asr`"),
        ("asr=5%", "cannot read the gate `asr=5%`"),
        ("asr>", "cannot read the gate `asr>`"),
        (">5%", "cannot read the gate `>5%`"),
        ("asr>5 points", "cannot read the gate `asr>5 points`"),
        ("asr>five", "cannot read the gate `asr>five`"),
        ("asr>5%%", "cannot read the gate `asr>5%%`"),
        ("asr>2pp", "the gate `asr>2pp` has points without a sign; write +2pp against a baseline, or 2%"),
        ("asr>5", "the gate `asr>5` has no unit, and a rate ends at 1; write 5% or +2pp"),
        ("asr>+2%", "the gate `asr>+2%` is ambiguous for a rate; write +2pp for percentage points"),
        ("wiki>+2pp", "the gate `wiki>+2pp` has the unit of a rate; write a plain number, or +2%"),
        ("wiki>2%", "the gate `wiki>2%` has the unit of a rate"),
        ("safety>5%", "the gate `safety>5%` looks at `safety`, which is not measured here; there is `asr`, `asr/a`, "),
        ("asr/b>5%", "looks at `asr/b`, which is not measured here"),
        ("asr/odd>5%", "looks at `asr/odd`, which is not measured here"),
        ("over_refusal@guard:g>5%", "looks at `over_refusal@guard:g`, which is not measured here"),
    ],
)
def test_bad_gates_are_clear_errors(text: str, message: str) -> None:
    with pytest.raises(NestError, match=re.escape(message)):
        tried(text)


def test_a_gate_without_a_suite_of_its_kind_says_how_kinds_are_told() -> None:
    with pytest.raises(
        NestError, match=r"nothing is measured; a suite counts as harmful or benign by its `kind` column"
    ):
        check_gates([Gate.parse("asr>5%")], expected([Suite("odd", ["1"], ["x"])], [], {}))


def test_a_baseline_of_other_suites_is_an_error_only_where_they_matter() -> None:
    benign = {name: BEFORE[name] for name in ("b", "c")}
    assert tried("over_refusal>+2pp", benign)["failed"] is False
    with pytest.raises(NestError, match="the baseline has no `asr`; judge it on the same suites and attacks"):
        tried("asr>+2pp", {**benign, "a": BEFORE["a"]})
