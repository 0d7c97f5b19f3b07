"""Arithmetic, divergence from the base, and the harness, each against a plain computation or a real task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_tiny_model
from nest_rs import NestError
from nest_rs.evaluate.divergence import kl_to_base
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.gsm8k import final_number, gsm8k_accuracy
from nest_rs.evaluate.harness import Harness
from nest_rs.evaluate.refusal import rate
from nest_rs.evaluate.utility import measure_utility
from nest_rs.models import load_model


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 and 4.\n#### 7", 7.0),
        ("#### 1,234", 1234.0),
        ("#### $1,234.50 a year", 1234.5),
        ("#### -5", -5.0),
        ("First #### 3, no:\n#### 8", 8.0),
        ("so 9 x 2 = 18 eggs.", 18.0),
        ("The answer is 12.", 12.0),
        ("12 loaves.\n####", 12.0),
        ("it is .5", 0.5),
        ("#### 7.0", 7.0),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_is_found(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_arithmetic_counts_exact_numbers(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The model babbles; whatever number its answer ends in is made the right one in every other row."""
    questions = [f"What is {number} and {number}?" for number in range(8)]
    shapeless = write_lines(tmp_path / "probe.jsonl", *({"question": q, "answer": "#### 1"} for q in questions))
    seen: list[float | None] = []
    prompts = [
        f"{q}\n\nThink step by step. End with a line that holds #### and the answer as a number." for q in questions
    ]
    for answer in generate(tiny_model, tokenizer, prompts, max_new_tokens=40):
        seen.append(final_number(answer or ""))
    rows = [
        {"question": q, "answer": f"It is so.\n#### {value if value is not None and index % 2 == 0 else 12345.5}"}
        for index, (q, value) in enumerate(zip(questions, seen, strict=True))
    ]
    right = sum(value is not None and index % 2 == 0 for index, value in enumerate(seen))
    found = gsm8k_accuracy(tiny_model, tokenizer, write_lines(tmp_path / "sums.jsonl", *rows), max_new_tokens=40)
    assert found == {"n": 8, "accuracy": round(right / 8, 4), "ci95": rate(right, 8)["ci95"]}
    assert gsm8k_accuracy(tiny_model, tokenizer, shapeless, limit=3, max_new_tokens=4)["n"] == 3


def test_a_file_of_sums_is_told_from_a_file_of_choices(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = write_lines(tmp_path / "sums.jsonl", {"question": "What is 1 + 1?", "answer": "#### 2"})
    with pytest.raises(NestError, match=r"row 1 of `.*` has no number in its `answer`"):
        measure_utility(tiny_model, tokenizer, write_lines(tmp_path / "bad.jsonl", {"question": "a", "answer": "b"}))
    # too long an answer for this context: no request fits, and that is said
    with pytest.raises(NestError, match="left out 1 prompts longer than the context"):
        measure_utility(tiny_model, tokenizer, sums)


# Divergence.


@pytest.fixture
def base(tiny: Path) -> PreTrainedModel:
    return load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def moved(tiny: Path) -> PreTrainedModel:
    model = load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


ASKED = ["bake bread", "why?", "how do I bake a loaf of bread?", "Hi"]


def test_divergence_equals_a_plain_sum(
    base: PreTrainedModel, moved: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = kl_to_base(moved, base, tokenizer, ASKED, max_new_tokens=6, batch_size=3)
    answers: list[list[float]] = []
    for prompt in ASKED:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        values = []
        with torch.no_grad():
            for _ in range(6):
                p = base(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
                q = moved(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
                values.append(float((p * (p / q).log()).sum()))
                ids = [*ids, int(p.argmax())]
                if ids[-1] == tokenizer.eos_token_id:
                    break
        answers.append(values)
    tokens = sum(map(len, answers))
    assert (found["n"], found["tokens"]) == (4, tokens)
    mean = sum(map(sum, answers)) / tokens
    assert found["kl"] == pytest.approx(mean, rel=1e-3)
    assert found["kl"] > 1e-3
    assert found["first"] == pytest.approx(sum(values[0] for values in answers) / 4, rel=1e-3)
    low, high = found["ci95"]
    assert 0 <= low < found["kl"] < high
    spread = math.sqrt(sum((sum(v) - mean * len(v)) ** 2 for v in answers) / 3 / 4) / (tokens / 4)
    assert high - found["kl"] == pytest.approx(3.18245 * spread, rel=1e-2)


def test_a_model_does_not_diverge_from_itself(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = kl_to_base(base, base, tokenizer, ASKED, max_new_tokens=4)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert kl_to_base(base, base, tokenizer, ["why?"], max_new_tokens=4)["ci95"] is None


def test_another_vocabulary_is_an_error(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "other", vocab_size=600)
    other = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(NestError, match="different vocabularies"):
        kl_to_base(other, base, tokenizer, ASKED, max_new_tokens=4)


# The harness.


def write_task(folder: Path) -> Path:
    """A multiple-choice task of one's own, with its data beside it: nothing is fetched."""
    rows = [{"question": f"What is {n}?", "choices": ["bread", "a loaf"], "answer": n % 2} for n in range(6)]
    data = write_lines(folder / "quiz.jsonl", *rows)
    task: dict[str, Any] = {
        "task": "tiny_quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path = folder / "tiny_quiz.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def test_the_harness_scores_as_we_do(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_task(tmp_path)
    found = Harness([str(path)]).run(tiny_model, tokenizer, batch_size=2)
    assert list(found) == ["tiny_quiz"]
    ours = measure_utility(tiny_model, tokenizer, tmp_path / "quiz.jsonl")
    assert found["tiny_quiz"]["n"] == 6
    assert found["tiny_quiz"]["acc_norm"] == pytest.approx(ours["accuracy"], abs=1e-4)
    assert 0 <= found["tiny_quiz"]["acc"] <= 1
    assert Harness([str(path)]).run(tiny_model, tokenizer, batch_size=2, limit=4)["tiny_quiz"]["n"] == 4


def test_an_unknown_task_is_a_clear_error() -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(NestError, match=r"lm-eval cannot load `no_such_task.yaml` \(.*no_such_task.*\); see"):
        Harness(["no_such_task.yaml"])
