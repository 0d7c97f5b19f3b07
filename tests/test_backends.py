"""Who else writes answers, and when an answer is cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nest_rs import NestError
from nest_rs.cli import main
from nest_rs.evaluate.backends import of_one_length, open_backend
from nest_rs.evaluate.generate import generate
from nest_rs.export import export_onnx, sample_of_like_length

PROMPTS = ["bake bread", "Hi", "why?", "list three things, please", "bake bread", "how do I bake a soft loaf of bread?"]


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(tiny, tmp_path_factory.mktemp("backend") / "onnx")


def test_onnx_runtime_writes_what_torch_writes(
    exported: Path, tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    backend = open_backend("onnx", exported, torch.float32)
    found = generate(backend, tokenizer, [*PROMPTS, "help " * 300], max_new_tokens=12)
    assert found[:-1] == generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=12)
    assert found[-1] is None


def test_eval_judges_an_export(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    flags = ["--suite", str(suite), "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--json"]
    assert main(["eval", str(exported), "--backend", "onnx", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["suite"]["n"] == len(PROMPTS)
    assert main(["eval", str(tmp_path), "--backend", "onnx", *flags]) == 2
    assert "no ONNX export in" in capsys.readouterr().err


def test_an_engine_that_is_not_installed_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name, package in (("vllm", "vLLM"), ("onnx", "onnxruntime-genai")):
        with pytest.raises(NestError, match=f"`--backend {name}` needs {package}; pip install"):
            open_backend(name, tiny, torch.float32)


def test_prompts_to_compare_are_a_random_choice_in_groups_of_one_length() -> None:
    ids = [[length] * length + [number] for length, count in ((3, 19), (4, 2), (5, 9)) for number in range(count)]
    found = sample_of_like_length(ids, 25, seed=0)
    assert [len(group) for group in of_one_length(found, 8)] == [8, 8, 1, 8]
    assert all(row in ids for row in found)
    assert len({tuple(row) for row in found}) == 25
    assert sample_of_like_length(ids, 25, seed=0) == found != sample_of_like_length(ids, 25, seed=1)
    assert sorted(sample_of_like_length(ids, 99, seed=0)) == sorted(ids)
    assert [sorted(batch) for batch in of_one_length([[1], [1, 2], [3], [4]], 2)] == [[0, 2], [3], [1]]


def test_a_batch_ends_once_all_answers_are_decided(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = [str(text) for text in generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=12)]
    late = max(whole, key=len)

    def decided(text: str) -> bool:
        return text == "" or not late.startswith(text) or len(text) > len(late) // 2

    short = [str(text) for text in generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=12, decided=decided)]
    assert all(one.startswith(cut.rstrip("\ufffd")) for one, cut in zip(whole, short, strict=True))
    assert len(late) // 2 < len(short[whole.index(late)]) < len(late)


def test_one_open_answer_does_not_hold_up_the_others(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rounds = [
        [str(text) for text in generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=tokens)]
        for tokens in (6, 16, 40)
    ]
    late = max(rounds[-1], key=len)

    def decided(text: str) -> bool:
        return not late.startswith(text.rstrip("\ufffd"))  # of a character that is there in part

    found = [str(text) for text in generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=40, decided=decided)]
    taken = [next((i for i, text in enumerate(told[:2]) if decided(text)), 2) for told in zip(*rounds, strict=True)]
    assert found == [rounds[i][row] for row, i in enumerate(taken)]
    assert {0, 2} <= set(taken)


@pytest.mark.parametrize("batch_size", [0, 6, 1])
def test_answers_do_not_depend_on_what_fits(
    batch_size: int,
    tiny_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=6)

    def run_out(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    handle = tiny_model.model.layers[0].register_forward_pre_hook(run_out)
    try:
        with caplog.at_level("WARNING", logger="nest_rs"):
            assert generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == wanted
    finally:
        handle.remove()
    sizes = [message for message in caplog.messages if message.startswith("out of memory")]
    assert len(sizes) == (2 if batch_size != 1 else 0)  # from 6 to 3 to 1, and not again
