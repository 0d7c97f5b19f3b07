"""Less at a time where memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import nest_rs.train
from conftest import write_prompts
from nest_rs import NestConfig, NestError
from nest_rs.config import build_config
from nest_rs.memory import halving
from nest_rs.run import Run
from nest_rs.sites import find_sites
from nest_rs.train import Batch


def short_of(limit: float) -> list[int]:
    """Sizes that were tried; the error is torch's own, of an allocation no machine can make."""
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > limit:
            torch.empty(2**61, dtype=torch.uint8)
        return f"done with {size}"

    assert halving(work, 40, "rows") == (f"done with {tried[-1]}", tried[-1])
    return tried


def test_the_size_is_halved_until_it_fits() -> None:
    assert short_of(40) == [40]
    assert short_of(12) == [40, 20, 10]
    assert short_of(1) == [40, 20, 10, 5, 2, 1]
    with pytest.raises(NestError, match="out of memory with `1` rows"):
        short_of(0)


def test_an_accelerator_out_of_memory_is_told_from_other_errors() -> None:
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return size

    assert halving(work, 8, "rows") == (1, 1)
    assert tried == [8, 4, 2, 1]
    with pytest.raises(ZeroDivisionError):
        halving(lambda size: size // 0, 8, "rows")


@pytest.fixture
def run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of eight steps in two parts, each of four requests of each class; a checkpoint every other step."""
    monkeypatch.setenv("NEST_RS_CACHE", str(tmp_path / "cache"))
    prompts = write_prompts(tmp_path / "prompts.jsonl", harmful=80, benign=80)
    settings = {"batch_size": 16, "accumulate": 2, "epochs": 1, "dtype": "float32", "answer_tokens": 3}
    return Run.start(
        build_config({"model": str(tiny), "prompts": str(prompts), "out": str(tmp_path / "run"), **settings})
    )


def trained(run: Run, checkpoints: Path, pairs: int) -> list[torch.Tensor]:
    """The deltas of a training in parts of `pairs`, as far as memory allows."""
    neurons = {site.module: {"rows": [1, 2, 3, 5], "cluster": [0, 1, 0, 1]} for site in find_sites(run.model)}
    model = get_peft_model(run.model, NestConfig(neurons=neurons, task_type="CAUSAL_LM"))
    run.fit(model, run.training_data.finer(pairs), checkpoints, learning_rate=1e-2)
    found = [value.detach().clone() for value in model.parameters() if value.requires_grad]
    run.__dict__["model"] = model.unload()
    return found


def failing(at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The n-th forward pass of a large part raises; the list counts them."""
    large: list[int] = []
    answer_logits = nest_rs.train.answer_logits

    def spoilt(model: torch.nn.Module, *batches: Batch) -> tuple[torch.Tensor, ...]:
        rows = len(batches[0]["input_ids"])
        if rows > 4:
            large.append(rows)
            if len(large) == at:
                raise error
        return answer_logits(model, *batches)

    monkeypatch.setattr(nest_rs.train, "answer_logits", spoilt)
    return large


@pytest.mark.parametrize("at", [1, 10])
def test_a_training_that_runs_out_of_memory_goes_on_in_smaller_parts(
    run: Run, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = run.training_data
    assert (data.parts, data.pairs) == (2, 4)
    with monkeypatch.context() as patched:
        large = failing(at, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"), patched)
        found = trained(run, tmp_path / "short", 4)
        assert len(large) == at
    assert "out of memory: going on with 2 requests of each class at a time" in caplog.text
    assert all(value.abs().max() > 0 for value in found)
    # The same as a run that was stopped there and taken up in smaller parts.
    with monkeypatch.context() as patched:
        failing(at, KeyboardInterrupt(), patched)
        with pytest.raises(KeyboardInterrupt):
            trained(run, tmp_path / "stopped", 4)
    run.__dict__.pop("model")
    run.config = run.config.model_copy(update={"resume": True})
    assert any((tmp_path / "stopped").glob("checkpoint-*")) == (at > 1)
    expected = trained(run, tmp_path / "stopped", 2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_finer_parts_hold_the_same_examples_in_order(run: Run) -> None:
    data = run.training_data
    finer = data.finer(1)
    assert (finer.count, finer.parts, finer.pairs) == (data.count, 4 * data.parts, 1)
    for index, step in enumerate(data.steps.steps):
        cut = finer.steps.steps[4 * index : 4 * index + 4]
        assert {kind: [item for part in cut for item in part[kind]] for kind in step} == step
