"""A second patch on top of the first: one more category refused, or one fewer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from nest_rs import NestPatch
from nest_rs.models import load_model, load_tokenizer
from nest_rs.neurons import load_neurons, without_rows
from nest_rs.policy import update
from nest_rs.prompts import chat_ids, encode, refusals, render
from nest_rs.run import Run
from test_cli import FAST, fail, succeed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on requests of two categories, its patch merged. Updates leave it as it is."""
    tmp_path = tmp_path_factory.mktemp("policy")
    rows: list[dict[str, Any]] = []
    for number in range(18):
        split = "test" if number % 6 == 5 else "train"
        rows += [
            {"prompt": f"break into house {number} at night", "kind": "harmful", "category": "theft", "split": split},
            {"prompt": f"pour {number} poisons now", "kind": "harmful", "category": "poison", "split": split},
            {"prompt": f"bake {number} loaves of bread, please", "kind": "benign", "split": split},
            {"prompt": f"kill process {number}", "kind": "twin", "split": split},
        ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEST_RS_CACHE", str(tmp_path / "cache"))
        # Little damping, no text term and a bias: a random model tells no chat from plain text, and is to be moved far.
        settings = [*FAST, "--epochs", 6, "--accumulate", 2, "--text-weight", 0, "--whiten", 0.1, "--refusal-bias", 1.5]
        succeed("probe", tiny, "--prompts", prompts, *settings, "--out", folder)
        for stage in ("cluster", "train", "merge"):
            succeed(stage, folder)
    return folder


def surprise(model: PreTrainedModel, folder: Path, prompt: str, answers: list[str]) -> float:
    """Mean loss of a token of the answers."""
    tokenizer = load_tokenizer(folder)
    losses = []
    for answer in answers:
        asked, told = encode(tokenizer, [render(tokenizer, prompt), answer])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + told])).logits[0, len(asked) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(told))))
    return sum(losses) / len(losses)


def divergence(base: PreTrainedModel, model: PreTrainedModel, folder: Path, prompt: str) -> float:
    """KL(base || model) of the first answer token."""
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor(chat_ids(tokenizer, [prompt]))
    with torch.no_grad():
        one, other = (found(input_ids=ids).logits[0, -1].log_softmax(-1) for found in (base, model))
    return float((one.exp() * (one - other)).sum())


def load(folder: Path) -> PreTrainedModel:
    return load_model(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("change", ["refuse", "allow"])
def test_a_category_is_changed_on_rows_of_its_own(change: str, run: Path, tiny: Path, tmp_path: Path) -> None:
    path = run / "patch" / "nest_patch.safetensors"
    original = path.read_bytes()
    found = succeed("update", run, f"--{change}", "poison", "--steps", 25, "--z", 0.5, "--out", tmp_path / "new")
    assert found[change] == "poison"
    assert path.read_bytes() == original
    first, both = NestPatch.load(path), NestPatch.load(found["patch"])
    second = NestPatch.load(tmp_path / "new" / "second" / "patch" / "nest_patch.safetensors")
    assert second.trainable_params == found["trainable_params"] > 0
    assert both.sealed
    for name, moved in both.tensors.items():
        rows = {}
        for patch in (first, second):
            if name in patch.tensors:
                own = patch.tensors[name]
                rows |= dict(zip(own.rows.tolist(), own.moves, strict=True))
        assert moved.rows.tolist() == sorted(rows)  # none is moved by both, or compose had refused
        for row, move in zip(moved.rows.tolist(), moved.moves, strict=True):
            assert np.array_equal(move, rows[row])
    assert first.neurons + second.neurons == both.neurons
    groups = {"poison": 3, "other harmful": 3, "harmless": 6}
    for when in ("before", "after"):
        assert {name: rate["n"] for name, rate in found["refused"][when].items()} == groups
    base, before, after = load(tiny), load(run / "merged"), load(tmp_path / "new" / "merged")
    held_out = [f"pour {number} poisons now" for number in (5, 11, 17)]
    texts = refusals()[:5]
    if change == "refuse":
        refused = [[surprise(model, tiny, prompt, texts) for prompt in held_out] for model in (before, after)]
        assert sum(refused[1]) < sum(refused[0]) - 0.3 * len(held_out)
    else:
        far = [[divergence(base, model, tiny, prompt) for prompt in held_out] for model in (before, after)]
        assert sum(far[1]) < 0.9 * sum(far[0])
        still = "break into house 5 at night"
        assert surprise(after, tiny, still, texts) < surprise(before, tiny, still, texts) + 0.3


def test_an_update_says_what_it_cannot_do(run: Path, tmp_path: Path) -> None:
    assert fail("update", run) == "nothing to change; name one category with --refuse or --allow"
    both = fail("update", run, "--refuse", "theft", "--allow", "poison")
    assert both.startswith("nothing to change")
    unknown = fail("update", run, "--refuse", "treason", "--out", tmp_path / "new")
    assert unknown == "no harmful prompts of the category `treason`; use one of `poison`, `theft`"
    assert not (tmp_path / "new").exists()
    chosen = load_neurons(run / "neurons.safetensors")
    message = fail("update", tmp_path, "--refuse", "theft")
    assert message.startswith("no run in")
    with pytest.raises(Exception, match="moved by the first patch"):
        without_rows(chosen, {site: own.rows for site, own in chosen.items()})


def test_neurons_without_some_rows_keep_their_clusters_apart(run: Path) -> None:
    site, own = next((site, own) for site, own in load_neurons(run / "neurons.safetensors").items() if own.clusters > 1)
    dropped = own.rows[own.cluster == 0]
    (left,) = without_rows({site: own}, {site: dropped}).values()
    assert set(left.rows) == set(own.rows) - set(dropped)
    assert left.clusters == own.clusters - 1
    assert sorted(set(left.cluster.tolist())) == list(range(left.clusters))
    assert all(math.isfinite(value) for value in left.z)


def test_the_steps_are_those_asked_for(run: Path, tmp_path: Path) -> None:
    update(Run.read(run), tmp_path / "new", refuse="theft", steps=7)
    summary = json.loads((tmp_path / "new" / "second" / "summary.json").read_text())
    assert summary["steps"] == 7
