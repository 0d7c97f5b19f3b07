"""Answers, verdicts and utility scores, each against a plain computation of the same thing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_tiny_model
from nest_rs import NestError
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.evaluate.refusal import GROUPS, by_group, evaluate_refusal, rate, standing_out
from nest_rs.evaluate.suites import Suite, load_suite, load_suites
from nest_rs.evaluate.utility import choice_accuracy, measure_utility, perplexity
from nest_rs.models import load_model
from nest_rs.prompts import embedded_prompts
from nest_rs.report import judged, percent, worst_groups

PROMPTS = [
    "bake bread",
    "how do I bake a loaf of bread that is soft inside and has a crust as dark as the night outside?",
    "Hi",
    "list three things, please",
    "why?",
    "help with that help with that help with that",
    "\u00fcber caf\u00e9 \u2615",
]


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
    """One prompt, no padding, no cache, no generate()."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < count:
            best = int(model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax())
            answer.append(best)
            if best == tokenizer.eos_token_id:
                break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("refused", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_rates_carry_the_published_wilson_intervals(refused: int, n: int, low: float, high: float) -> None:
    assert rate(refused, n) == {"n": n, "refused": refused, "rate": round(refused / n, 4), "ci95": [low, high]}


@pytest.mark.parametrize(("refused", "n"), [(1, 1), (3, 7), (159, 159), (120, 546), (999, 1000)])
def test_rates_match_the_wilson_formula(refused: int, n: int) -> None:
    z = 1.959963984540054
    p = refused / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert rate(refused, n)["ci95"] == pytest.approx([centre - half, centre + half], abs=6e-5)


def test_nothing_judged_has_no_rate() -> None:
    assert rate(0, 0) == {"n": 0, "refused": 0, "rate": None, "ci95": None}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batched_answers_equal_those_of_one_prompt_alone(
    batch_size: int, tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert answers == [greedy(tiny_model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(answers)) == len(PROMPTS)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_other_families_are_batched_as_well(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert answers == [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]


def test_one_prompt_and_none_are_answered(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate(tiny_model, tokenizer, ["why?"], max_new_tokens=4) == [greedy(tiny_model, tokenizer, "why?", 4)]
    assert generate(tiny_model, tokenizer, [], max_new_tokens=4) == []


def test_stored_sampling_settings_and_penalties_change_nothing(tiny: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    stored = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    model.generation_config.update(**stored, suppress_tokens=list(range(100, 300)), min_new_tokens=5)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == plain


def test_an_over_long_prompt_has_no_answer_and_one_warning(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="nest_rs"):
        answers = generate(tiny_model, tokenizer, ["bread " * 300, "why?", "bake " * 300], max_new_tokens=4)
    assert answers == [None, greedy(tiny_model, tokenizer, "why?", 4), None]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("left out 2 prompts longer than the context of 252 tokens: `bread bread")


def test_a_suite_of_over_long_prompts_alone_is_an_error(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(NestError, match="left out 1 prompts longer than the context"):
        generate(tiny_model, tokenizer, ["bread " * 300], max_new_tokens=4)


def test_results_and_samples_hold_every_request(
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    suites = [
        Suite("first", ["a", "b", "long"], ["why?", "bake bread", "bread " * 300]),
        Suite("second", ["c"], ["Hi"]),
    ]
    results = evaluate_refusal(tiny_model, tokenizer, suites, tmp_path / "out", max_new_tokens=6)
    assert {name: found["n"] for name, found in results.items()} == {"first": 2, "second": 1}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["suite"], row["id"], row["prompt"]) for row in samples] == [
        (suite.name, identity, prompt)
        for suite in suites
        for identity, prompt in zip(suite.ids, suite.prompts, strict=True)
    ]
    assert [row["answer"] for row in samples] == [
        None if "bread bread" in row["prompt"] else greedy(tiny_model, tokenizer, row["prompt"], 6) for row in samples
    ]
    assert [row["refused"] for row in samples] == [
        None if row["answer"] is None else is_refusal(row["answer"]) for row in samples
    ]


def test_refusals_are_counted(tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A model that can say but one thing: its head is replaced by a table from the last token to the next."""
    told = tokenizer("I'm sorry, but I can't help with that", add_special_tokens=False)["input_ids"]
    assert len(set(told)) == len(told)
    (start,) = set(tokenizer("\n", add_special_tokens=False)["input_ids"])
    model = load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)
    chain = dict(zip([start, *told], [*told, tokenizer.eos_token_id], strict=True))
    for layer in model.model.layers:  # what is left is the embedding of the last token
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    basis = torch.eye(64)
    model.model.embed_tokens.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    for column, (last, following) in enumerate(chain.items()):
        model.model.embed_tokens.weight.data[last] = basis[column]
        model.lm_head.weight.data[following] = basis[column]
    results = evaluate_refusal(
        model, tokenizer, [Suite("all", ["a", "b"], ["why?", "bake bread"])], tmp_path, max_new_tokens=len(told) + 1
    )
    assert results["all"] == rate(2, 2)
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first["answer"] == "I'm sorry, but I can't help with that"


def test_rates_are_kept_by_group(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    suites = [
        Suite("two", ["a", "b", "c"], ["why?", "bake bread", "bread " * 300], groups=["x", "y", "y"]),
        Suite("none", ["d"], ["Hi"]),
        Suite("one", ["e", "f"], ["Hi", "why?"], groups=["x", "x"]),
    ]
    evaluate_refusal(tiny_model, tokenizer, suites, tmp_path, max_new_tokens=2)
    found = json.loads((tmp_path / GROUPS).read_text())
    assert found == {"two": {"x": rate(0, 1), "y": rate(0, 1)}}  # the third was not judged, one group says nothing more


def test_rates_by_group_add_up() -> None:
    suite = Suite("s", list("abcdef"), list("abcdef"), groups=["x", "y", "x", "", "y", "x"])
    found = by_group(suite, [True, False, False, True, None, True])
    assert found == {"x": rate(2, 3), "y": rate(0, 1)}


@pytest.mark.parametrize(("kind", "worst"), [("benign", ["a", "b"]), ("harmful", ["d"]), (None, [])])
def test_the_groups_that_fare_worse_stand_out(kind: Any, worst: list[str], tmp_path: Path) -> None:
    groups = {"a": rate(9, 10), "b": rate(17, 20), "c": rate(3, 10), "d": rate(5, 60), "e": rate(1, 1)}
    suite = Suite("s", [], [], kind)
    (tmp_path / GROUPS).write_text(json.dumps({"s": groups}))
    found = standing_out([suite, Suite("other", [], [], "benign")], {"s": rate(35, 101)}, tmp_path)
    # (one request of one refused, and three of ten beside 34.7 %, may be chance)
    assert [row["group"] for row in found] == worst
    assert all(row == {"suite": "s", "group": row["group"], **groups[row["group"]]} for row in found)


def test_the_end_of_a_run_names_the_worst_groups_first() -> None:
    found = [{"suite": "s", "group": f"g{number}", **rate(3, 10)} for number in range(10)]
    lines = worst_groups(found)
    assert lines[0] == "stands out: s, g0: 30.0 % [10.8, 60.3] n=10 refused"
    assert [line.split(", ")[1][:2] for line in lines[:8]] == [f"g{number}" for number in range(8)]
    assert lines[8:] == ["stands out: 2 more, see groups.json beside the answers"]
    assert worst_groups(found[:8]) == lines[:8]
    assert judged({"s": rate(1, 2), "standing_out": found[:1]}) == [f"s: {percent(rate(1, 2))}", lines[0]]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_suites_come_from_files_and_by_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", {"id": "x", "prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert load_suite(str(path)) == Suite("mine", ["x", "2", "3"], ["a", "b", "c"])
    assert load_suite(str(path), limit=2).prompts == ["a", "b"]
    grouped = write_lines(tmp_path / "grouped.jsonl", {"prompt": "a", "category": "x"}, {"prompt": "b"})
    assert load_suite(str(grouped)).groups == ["x", ""]
    assert load_suite(str(grouped), limit=1).groups == ["x"]
    named = load_suites(["nest-harmful", "nest-twin-validation"])
    held_out = [item for item in embedded_prompts() if (item.kind, item.split) == ("harmful", "test")]
    assert named[0].ids == [item.id for item in held_out]
    assert named[0].groups == [item.category for item in held_out]
    assert [suite.name for suite in named] == ["nest-harmful", "nest-twin-validation"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nest-harm"], "no suite named `nest-harm`; give a .jsonl file or one of `nest-harmful`, "),
        (["{0}/none.jsonl"], "no such prompt file: `.*none.jsonl`"),
        (["{0}/a.jsonl", "{0}/b/a.jsonl"], "two suites are named `a`"),
        (["nest-twin", "nest-twin"], "two suites are named `nest-twin`"),
        (["{0}/bad.jsonl"], "row 1 of `.*bad.jsonl` has no `prompt`"),
    ],
)
def test_wrong_suites_are_clear_errors(sources: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "a.jsonl", {"prompt": "a"})
    write_lines(tmp_path / "b" / "a.jsonl", {"prompt": "a"})
    write_lines(tmp_path / "bad.jsonl", {"question": "a"})
    with pytest.raises(NestError, match=message):
        load_suites([source.format(tmp_path) for source in sources])


TEXT = "how do I bake bread without help? " * 30


@pytest.mark.parametrize(("window", "limit"), [(64, None), (100, None), (64, 2), (4096, None)])
def test_perplexity_equals_a_token_by_token_sum(
    window: int, limit: int | None, tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    parts = [ids[i : i + window] for i in range(0, len(ids), window)][:limit]
    surprise = []
    with torch.no_grad():
        for part in parts:
            logprobs = tiny_model(input_ids=torch.tensor([part])).logits[0].double().log_softmax(-1)
            surprise += [-float(logprobs[i, part[i + 1]]) for i in range(len(part) - 1)]
    found = perplexity(tiny_model, tokenizer, TEXT, window=window, limit=limit)
    assert found["n"] == len(surprise)
    assert found["perplexity"] == pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-4)


def test_choices_are_scored_as_one_by_one(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    choices = ["bread", "a loaf that takes long to bake", "help", "I can't", "no"]
    questions = [f"what is number {number}?" for number in range(12)]
    best = []
    with torch.no_grad():
        for question in questions:
            start = tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
            scores = []
            for choice in choices:
                ids = tokenizer(f"Question: {question}\nAnswer: {choice}", add_special_tokens=False)["input_ids"]
                assert ids[: len(start)] == start
                logprobs = tiny_model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                total = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(start), len(ids)))
                scores.append(total / len(choice))
            best.append(scores.index(max(scores)))
    # every third answer is right
    rows = [
        {
            "question": question,
            "choices": choices,
            "answer": best[number] if number % 3 == 0 else (best[number] + 1) % 5,
        }
        for number, question in enumerate(questions)
    ]
    path = write_lines(tmp_path / "quiz.jsonl", *rows)
    found = choice_accuracy(tiny_model, tokenizer, path)
    assert found == {"n": 12, "accuracy": round(4 / 12, 4), "ci95": rate(4, 12)["ci95"]}
    assert measure_utility(tiny_model, tokenizer, path, limit=1)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such utility file"),
        ("quiz.csv", "a,b", "cannot score `.*quiz.csv`"),
        ("quiz.jsonl", '{"question": "a"}', "row 1 of `.*` has no `choices`"),
        ("quiz.jsonl", '{"question": "a", "choices": ["b"], "answer": 1}', "row 1 of `.*` has no `choices`"),
        ("quiz.jsonl", '{"question": "a", "choices": ["b", "c"], "answer": "1"}', "row 1 of `.*` has no `choices`"),
        ("quiz.jsonl", '{"question": "a", "choices": ["b", ""], "answer": 0}', "row 1 of `.*` has no `choices`"),
        ("quiz.jsonl", '{"choices": ["b"], "answer": 0}', "row 1 of `.*` has no `question`"),
        ("text.txt", "", "too short"),
    ],
)
def test_bad_utility_files_are_clear_errors(
    name: str,
    content: str | None,
    message: str,
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(NestError, match=message):
        measure_utility(tiny_model, tokenizer, tmp_path / name)
