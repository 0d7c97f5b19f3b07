"""A probe of the base says how harmful a request is, and the deltas learn to say it too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_prompts, write_tiny_model
from nest_rs.config import build_config
from nest_rs.errors import NestError
from nest_rs.models import load_model
from nest_rs.prefix import shared_prefix
from nest_rs.prompts import Prompt, chat_ids, load_prompts
from nest_rs.reading import read_inputs
from nest_rs.run import Run
from nest_rs.sites import find_sites
from nest_rs.targets import scored
from nest_rs.teacher import harm_scores, teacher_loss
from nest_rs.train import Example, Steps, train_deltas

PAD = 0


@pytest.fixture(scope="module")
def requests(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list]:
    """Token ids of requests of uneven lengths, and which are harmful."""
    prompts = load_prompts(write_prompts(tmp_path_factory.mktemp("requests") / "prompts.jsonl", 30, 40))
    texts = [item.prompt + " and then rest" * (number % 4) for number, item in enumerate(prompts)]
    return chat_ids(tokenizer, texts), [item.kind == "harmful" for item in prompts]


@pytest.mark.parametrize(("layers", "read"), [(2, [1]), (6, [2, 3, 4, 5]), (12, [4, 6, 8, 10])])
def test_scores_are_those_of_a_probe_on_the_means_of_what_four_depths_read(
    layers: int, read: list[int], requests: tuple[list, list], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "deep", num_hidden_layers=layers)
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    ids, harmful = requests
    skip = len(shared_prefix(ids))
    assert skip > 0
    seen: list[np.ndarray] = []
    for layer in read:
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0, skip:].mean(dim=0).numpy())
        )
    means = []
    for row in ids:  # one by one: no padding, no shared opening
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
        means.append(np.concatenate(seen))
    x = np.stack(means).astype(np.float64)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    theirs = LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000).fit(x, harmful).decision_function(x)
    found = harm_scores(load_model(folder, device=torch.device("cpu"), dtype=torch.float32), ids, harmful, pad=PAD)
    assert found.dtype == np.float32
    assert np.abs(found).mean() == pytest.approx(6)
    assert found == pytest.approx(6 * theirs / np.abs(theirs).mean(), abs=2e-3)
    assert (found > 0).tolist() == harmful


def test_states_that_are_not_finite_say_so(tiny: Path, requests: tuple[list, list]) -> None:
    model = load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("nan")
    site = "model.layers.1.mlp.gate_proj"
    with pytest.raises(NestError, match=f"the inputs of `{site}` teach nothing .*finite"):
        harm_scores(model, *requests, pad=PAD)


def test_reading_stops_behind_the_last_module_and_shows_every_prompt_once(
    tiny_model: PreTrainedModel, requests: tuple[list, list]
) -> None:
    ids, _ = requests
    read: list[tuple[str, list[int], list[int]]] = []
    beyond: list[object] = []
    handle = tiny_model.lm_head.register_forward_hook(lambda *_: beyond.append(1))
    modules = [site.module for site in find_sites(tiny_model)][:2]
    hooks = [len(tiny_model.get_submodule(module)._forward_pre_hooks) for module in modules]
    read_inputs(
        tiny_model,
        modules,
        ids,
        lambda module, x, mask, rows: read.append((module, rows, mask.sum(1).tolist())),
        pad=PAD,
        batch_tokens=128,
    )
    handle.remove()
    assert len(beyond) == 1  # the shared opening's own pass
    skip = len(shared_prefix(ids))
    for module in modules:
        numbers = [number for name, rows, _ in read if name == module for number in rows]
        assert sorted(numbers) == list(range(len(ids)))
        lengths = [length for name, _, counts in read if name == module for length in counts]
        assert lengths == sorted(len(ids[number]) - skip for number in numbers)
    assert len(read) > 2 * len(modules)
    assert [len(tiny_model.get_submodule(module)._forward_pre_hooks) for module in modules] == hooks


def test_the_loss_is_the_distance_of_greedy_odds_from_the_scores() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 3.0], [0.0, 5.0, 1.0, 1.0]])
    odds = [float(torch.tensor([1.0, 3.0]).logsumexp(0)) - 2, float(torch.tensor([0.0, 1.0]).logsumexp(0)) - 5]
    refusing = torch.tensor([0, 3])
    found = teacher_loss(logits, torch.tensor([odds[0] + 3, odds[1] - 0.5]), refusing)
    assert float(found) == pytest.approx(((3 - 0.5) + 0.5 * 0.5**2) / 2, rel=1e-5)  # far off linear, near by quadratic


@pytest.mark.parametrize(("gap", "score", "costs"), [(20, 9, False), (20, 7, True), (-20, -9, False), (-20, -7, True)])
def test_to_be_surer_than_the_largest_score_costs_nothing(gap: float, score: float, costs: bool) -> None:
    logits = torch.tensor([[0.0, gap, 0.0]], requires_grad=True)
    loss = teacher_loss(logits, torch.tensor([float(score)]), torch.tensor([1]))
    loss.backward()
    assert (loss.item() > 0) == costs
    assert logits.grad is not None
    assert bool(logits.grad.any()) == costs


def test_a_step_has_scores_where_all_its_examples_have() -> None:
    harmful = [Example([1, 40 + i, 41], [50, 51], score=float(i)) for i in range(6)]
    benign = [Example([1, 70 + i], [60, 61, 62], score=-float(i)) for i in range(6)]
    steps = Steps(harmful, benign, batch_size=4, steps=3, seed=0, pad=PAD)
    for index, step in enumerate(steps.steps):
        wanted = [item.score for kind in ("harmful", "benign") for item in step[kind]]
        assert steps[index]["scores"].tolist() == wanted
    mixed = Steps([replace(item, score=None) for item in harmful], benign, batch_size=4, steps=3, seed=0, pad=PAD)
    assert "scores" not in mixed[0]


def test_requests_are_scored_and_a_bias_is_added(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [
        Prompt(f"{n}", f"{'rob' if n % 2 else 'bake'} {n}", "harmful" if n % 2 else "twin", "", "", "train")
        for n in range(12)
    ]
    found = scored(tiny_model, tokenizer, prompts)
    assert list(found) == [item.id for item in prompts]
    asked = chat_ids(tokenizer, [item.prompt for item in prompts])
    wanted = harm_scores(tiny_model, asked, [item.kind == "harmful" for item in prompts], pad=tokenizer.pad_token_id)
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert all(found[item.id] > 0 for item in prompts if item.kind == "harmful")
    surer = scored(tiny_model, tokenizer, prompts, bias=1.5)
    assert [surer[name] - score for name, score in found.items()] == pytest.approx([1.5] * 12, abs=1e-4)


def test_training_comes_closer_to_the_teacher(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "more.jsonl", harmful=96, benign=96)
    config = build_config(
        {"model": str(tiny), "prompts": str(prompts), "dtype": "float32", "out": str(tmp_path / "run"), "epochs": 8}
    )
    gaps = {}
    for weight in (0.0, 3.0):
        run = Run(tmp_path / "run", config)
        data = run.training_data
        assert all(item.score is not None for item in (*data.harmful, *data.benign))
        model = run.model.requires_grad_(True)
        train_deltas(
            model,
            run.tokenizer,
            data.steps,
            output_dir=str(tmp_path / "trainer"),
            learning_rate=1e-3,
            benign_loss="sft",
            benign_weight=1.0,
            teacher_weight=weight,
            seed=0,
            save=False,
        )
        refusing = torch.unique(torch.tensor([item.answer[0] for item in data.harmful]))
        found = []
        with torch.no_grad():
            for item in (*data.harmful, *data.benign):
                logits = model(input_ids=torch.tensor([item.prompt])).logits[:, -1]
                found.append(float(teacher_loss(logits, torch.tensor([item.score]), refusing)))
        gaps[weight] = float(np.mean(found))
    assert gaps[3.0] < 0.5 * gaps[0.0]
