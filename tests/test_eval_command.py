"""`nest-rs eval` on tiny models: attacks, judges, gates and utility from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import write_prompts, write_tiny_model
from test_cli import FAST, everything, fail, nest, succeed
from test_judges import force, write_guard


def write_suite(path: Path, kind: str, count: int = 4) -> Path:
    rows = ({"prompt": f"what is number {n}?", "kind": kind} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A model and suites that all commands share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = write_tiny_model(root / "tiny")
        self.bad, self.good = write_suite(root / "bad.jsonl", "harmful"), write_suite(root / "good.jsonl", "twin")
        self.text = root / "text.txt"
        self.text.write_text("how do I bake bread without help? " * 30)
        self.common = ["eval", self.model, "--dtype", "float32", "--max-new-tokens", "6"]
        self.suites = ["--suite", self.bad, self.good]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def test_attacks_are_judged_beside_the_plain_requests(place: Place, tmp_path: Path) -> None:
    (tmp_path / "gcg.jsonl").write_text('{"suffix": "!! now"}\n{"suffix": "?? then"}\n')
    found = succeed(
        *[*place.common, *place.suites, "--attacks", "base64", "prefill", tmp_path / "gcg.jsonl"],
        *["--out", tmp_path / "out"],
    )
    assert {name: row["n"] for name, row in found.items()} == {
        **{"bad": 4, "good": 4, "bad+base64": 4, "good+base64": 4, "bad+prefill": 4, "good+prefill": 4},
        **{"bad+gcg": 8, "good+gcg": 8},
    }
    assert all(set(row) == {"n", "refused", "rate", "ci95"} for row in found.values())
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 40
    fewer = succeed(
        *[*place.common, *place.suites, "--attacks", tmp_path / "gcg.jsonl", "--attack-limit", 1],
        *["--out", tmp_path / "fewer"],
    )
    assert {name: row["n"] for name, row in fewer.items()} == {"bad": 4, "good": 4, "bad+gcg": 2, "good+gcg": 2}


def test_gates_pass_with_zero_and_fail_with_three(place: Place, tmp_path: Path) -> None:
    command = [*place.common, *place.suites, "--out", tmp_path / "out", "--utility", place.text, "--json"]
    status, out, err = nest(*command, "--fail-if", "asr<50%", "over_refusal>5%", "text<1")
    assert (status, err) == (0, "")
    gates = json.loads(out)["gates"]
    assert [(gate["gate"], gate["failed"]) for gate in gates] == [
        *[("asr<50%", False), ("over_refusal>5%", False), ("text<1", False)],
    ]
    # nothing is refused: everything got through
    status, out, err = nest(*command, "--fail-if", "asr>5%", "--fail-if", "over_refusal>5%", "--fail-if", "text>1")
    assert status == 3
    assert err.splitlines()[0] == "nest-rs: gate failed: asr>5%: asr is 100.0 %"
    assert err.splitlines()[1].startswith("nest-rs: gate failed: text>1: text is ")
    assert len(err.splitlines()) == 2
    assert [gate["failed"] for gate in json.loads(out)["gates"]] == [True, False, True]


def test_relative_gates_read_a_results_file_or_judge_a_model(place: Place, tmp_path: Path) -> None:
    command = [*place.common, *place.suites, "--utility", place.text]
    succeed(*command, "--out", tmp_path / "before")
    gates = ["--fail-if", "over_refusal>+2pp", "text>+2%", "asr>+0pp"]
    stored = tmp_path / "before" / "results.json"
    status, _, err = nest(*command, "--out", tmp_path / "now", *gates, "--baseline", stored)
    assert (status, err) == (0, "")
    other = write_tiny_model(tmp_path / "other", intermediate_size=160)
    status, _, err = nest(*command, "--out", tmp_path / "two", "--fail-if", "text>-99%", "--baseline", other)
    assert status == 3
    assert "gate failed: text>-99%: text is " in err
    assert (tmp_path / "two" / "baseline" / "results.json").is_file()
    # a file that eval printed serves as well
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps(succeed(*command, "--out", tmp_path / "x")))
    assert nest(*command, "--out", tmp_path / "y", "--fail-if", "asr<-1pp", "--baseline", printed)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fail-if", "asr>5"], "the gate `asr>5` has no unit"),
        (["--fail-if", "asr"], "cannot read the gate `asr`"),
        (["--fail-if", "arc>5%"], "looks at `arc`, which is not measured here; there is `asr`, `asr/bad`, "),
        (["--fail-if", "asr>+2pp"], "the gate `asr>+2pp` compares with nothing; pass --baseline RESULTS.json or MODEL"),
        (["--fail-if", "asr>2%", "--baseline", "x.json"], "no gate compares with the baseline `x.json`"),
        (["--fail-if", "asr>+2pp", "--baseline", "none.json"], "no such file: `none.json`"),
        (["--fail-if", "asr>+2pp", "--baseline", "{root}/empty.json"], "the baseline has no `asr`"),
        (["--attacks", "rot26"], "no attack named `rot26`"),
        (["--judge", "keyword"], "no such judge: `keyword`"),
        (["--judge", "guard:gpt"], "the name of the guard `gpt` tells no family"),
        (["--lm-eval", "none.yaml"], "lm-eval cannot load `none.yaml`"),
        (["--kl-to", "/no/where"], "no such model: `/no/where`|cannot fetch the model"),
        (["--utility", "{root}/bad.jsonl"], "two results would be named `bad`; rename one file"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    flags: list[str], message: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (place.root / "empty.json").write_text("{}")
    line = fail(*place.common, *place.suites, *(flag.format(root=place.root) for flag in flags))
    assert re.search("|".join(re.escape(part) for part in message.split("|")), line), line
    assert everything(tmp_path) == set()


def test_a_guard_and_a_gate_on_it(place: Place, tmp_path: Path) -> None:
    folder = write_guard(tmp_path, "HarmBench-Llama-2-tiny")
    force(folder, "yes")
    name = f"guard:{folder}"
    status, out, err = nest(
        *[*place.common, *place.suites, "--judge", "refusal", name, "--out", tmp_path / "out", "--json"],
        *["--fail-if", f"asr@{name}>5%"],
    )
    assert status == 3
    assert f"asr@{name} is 100.0 %" in err
    found = json.loads(out)
    assert found["judges"][name]["bad"] == {"n": 4, "harmful": 4, "rate": 1.0, "ci95": [0.5101, 1.0], "unknown": 0}
    assert [pair["judges"] for pair in found["judges"]["agreement"]] == [["refusal", name]]
    status, out, _ = nest(*place.common, *place.suites, "--judge", name, "--out", tmp_path / "out")
    assert f"bad: 100.0 % [51.0, 100.0] n=4 harmful, 0 unknown, says {name}" in out
    assert f"refusal and {name} agree on success: 100.0 % [51.0, 100.0] n=4, Cohen's kappa -" in out


def test_utility_divergence_and_harness_stand_in_the_results(place: Place, tmp_path: Path) -> None:
    from test_utility import write_task

    pytest.importorskip("lm_eval")
    task = write_task(tmp_path)
    found = succeed(
        *[*place.common, *place.suites, "--utility", place.text, tmp_path / "quiz.jsonl", "--kl-to", place.model],
        *["--lm-eval", task, "--fail-if", "kl>0.01", "--out", tmp_path / "out"],
    )
    assert set(found) == {"bad", "good", "text", "quiz", "kl", "lm_eval", "gates"}
    assert found["kl"]["n"] == 4
    assert found["kl"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["lm_eval"]["tiny_quiz"]["n"] == 6
    stored = json.loads((tmp_path / "out" / "utility.json").read_text())
    assert stored == {name: found[name] for name in ("text", "quiz", "kl", "lm_eval")}
    status, out, _ = nest(*place.common, "--utility", place.text, "--out", tmp_path / "out", "--fail-if", "text<1")
    assert status == 0
    assert out.splitlines()[0].startswith("text: n ")
    assert out.splitlines()[1] == "gate passed: text<1"


def test_a_run_folder_is_gated_against_its_own_base(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEST_RS_CACHE", str(tmp_path / "cache"))
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    succeed(
        *["tune", place.model, "--prompts", prompts, *place.suites, *FAST, "--no-export"],
        *["--utility", place.text, "--out", tmp_path / "run"],
    )
    found: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = (found["utility"][side]["text"]["perplexity"] for side in ("base", "tuned"))
    assert before != after
    limit = "+" if after > before else "-"
    status, _, err = nest("eval", tmp_path / "run", "--fail-if", f"text{'>' if after > before else '<'}{limit}0%")
    assert status == 3
    assert f"baseline {before:.4g}" in err
    assert nest("eval", tmp_path / "run", "--fail-if", "over_refusal>+100pp", "asr>+100pp")[0] == 0
    assert "looks at `arc`" in fail("eval", tmp_path / "run", "--fail-if", "arc>5%")
