"""The Gauss-Newton step against gradients taken one request at a time, and against scikit-learn's ridge."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from sklearn.linear_model import Ridge

from conftest import write_prompts, write_tiny_model
from nest_rs import newton
from nest_rs.config import build_config
from nest_rs.models import load_model
from nest_rs.newton import newton_step
from nest_rs.patch import NestPatch
from nest_rs.prefix import behind, prefix_cache
from nest_rs.run import Run
from nest_rs.teacher import refusal_odds
from nest_rs.train import Batch, Example, Steps, collate, training_attention
from nest_rs.tuner import NestConfig

PAD = 0
REFUSING = torch.tensor([50, 52])
CHOSEN = {"rows": [1, 4, 6, 9, 11], "cluster": [0, 1, 0, 1, 1]}


def requests(count: int, prefix: list[int]) -> list[Example]:
    """Requests of uneven lengths behind a prefix."""
    rng = np.random.default_rng(0)
    return [Example([*prefix, *rng.integers(10, 90, 1 + n % 7).tolist()], [50, 51]) for n in range(count)]


def steps_of(asked: list[Example], texts: list[Example]) -> Steps:
    refused = [Example(item.prompt, [50 + 2 * (n % 2), 51]) for n, item in enumerate(asked)]
    kept = [Example([*item.prompt, 77], [60, 61]) for item in asked]
    return Steps(refused, kept, texts, batch_size=4, steps=3, seed=0, pad=PAD)


def adapted(folder: Path, learn_ties: bool = True) -> PeftModel:
    """A tiny model with deltas that are not zero, and learned ties that are not one-hot."""
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    sites = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up")]
    config = NestConfig(neurons=dict.fromkeys(sites, CHOSEN), learn_ties=learn_ties, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for layer in newton._layers(model, None):
        torch.nn.init.normal_(layer.delta, std=0.05)
        if learn_ties:
            layer.tie.add_(torch.randn_like(layer.tie), alpha=0.3)
    return model


@pytest.fixture(params=["packed", "padded"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeftModel:
    if request.param == "padded":
        monkeypatch.setattr("nest_rs.train._packs", lambda *_: False)
    return adapted(write_tiny_model(tmp_path / "tiny"))


def whitenings(model: PeftModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "nest_delta"):
            width = module.nest_delta["default"].shape[1]
            square = torch.randn(width, width, generator=generator) / width
            found[name.removeprefix("base_model.model.")] = square @ square.T + torch.eye(len(square))
    return found


def one_by_one(
    model: PeftModel, asked: list[Example], a: dict[str, torch.Tensor], prefix: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the odds in V by autograd, nothing flowing through the prefix; and the odds."""
    named = {name: p for name, p in model.named_parameters() if ".nest_delta." in name}
    rows, values = [], []
    for item in asked:
        with torch.no_grad():
            cache = prefix_cache(model, torch.tensor([prefix], dtype=torch.long))
        own = torch.tensor([item.prompt[len(prefix) :]])
        odds = refusal_odds(model(input_ids=own, **behind(cache, 1)).logits[:, -1], REFUSING)
        found = torch.autograd.grad(odds.sum(), list(named.values()))
        whitened = [g @ next(w for path, w in a.items() if path in name) for name, g in zip(named, found, strict=True)]
        rows.append(torch.cat([gradient.flatten() for gradient in whitened]))
        values.append(odds.detach())
    return torch.stack(rows), torch.cat(values)


@pytest.mark.parametrize("prefix", [[], [5, 6, 7, 8]])
def test_each_request_has_its_own_gradient(model: PeftModel, prefix: list[int]) -> None:
    asked, a = requests(9, prefix), whitenings(model)
    wanted, odds = one_by_one(model, asked, a, prefix)
    layers = list(newton._layers(model, a))
    assert len(layers) == 4
    with training_attention(model, steps_of(asked, [])):
        batch = collate([Example(item.prompt, item.answer[:1]) for item in asked], PAD, prefix)
        found, values = newton._gradients(model, layers, batch, partial(refusal_odds, refusing=REFUSING))
    assert values.numpy() == pytest.approx(odds.numpy(), abs=1e-4)
    assert found.numpy() == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-4 * float(wanted.abs().max()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(20, 70), (70, 20)])
def test_the_ridge_is_scikit_learns(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, wanted = torch.randn(shape), torch.randn(shape[0])
    alpha = 0.3 * float((rows**2).sum(dim=1).mean())
    theirs = Ridge(alpha=alpha, fit_intercept=False).fit(rows.numpy(), wanted.numpy()).coef_
    assert newton._ridge(rows, wanted, 0.3).numpy() == pytest.approx(theirs, abs=1e-5)


def test_a_step_comes_closer_to_clear_odds_and_with_more_damping_moves_less(tmp_path: Path) -> None:
    folder, asked = write_tiny_model(tmp_path / "tiny"), requests(40, prefix=[5, 6])
    texts = [Example([30 + n], [40 + n, 41, 42, 43]) for n in range(4)]
    wanted = [(item.prompt, number % 2 == 0) for number, item in enumerate(asked)]
    refuse = torch.tensor([side for _, side in wanted])
    left, moved = {}, {}
    for damping in (0.0, 0.1, 10.0):
        model = adapted(folder)
        start = [layer.delta.detach().clone() for layer in newton._layers(model, None)]
        if damping:
            read: list[int] = []
            whitening = whitenings(model)
            newton_step(
                model, steps_of(asked, texts), wanted, damping=damping, whitening=whitening, progress=read.append
            )
            assert sum(read) == len(asked)
        with torch.no_grad():
            odds = [refusal_odds(model(input_ids=torch.tensor([e.prompt])).logits[:, -1], REFUSING) for e in asked]
        left[damping] = float(newton._missing(torch.cat(odds), refuse, 0.0).square().mean())
        changes = [layer.delta - old for layer, old in zip(newton._layers(model, None), start, strict=True)]
        moved[damping] = float(torch.cat([change.flatten() for change in changes]).norm())
    assert moved[0.0] == 0
    assert 0 < moved[10.0] < 0.2 * moved[0.1]
    assert left[0.1] < left[10.0] < left[0.0]
    assert left[0.1] < 0.9 * left[0.0]


def test_where_memory_runs_out_it_reads_fewer_requests_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, asked = write_tiny_model(tmp_path / "tiny"), requests(40, prefix=[5, 6])
    wanted = [(item.prompt, number % 2 == 0) for number, item in enumerate(asked)]
    answer_logits, sizes = newton.answer_logits, []

    def spoilt(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        sizes.append(len(batch["attention_mask"]))
        if sizes[-1] > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return answer_logits(model, batch)

    found = []
    for limited in (False, True):
        monkeypatch.setattr(newton, "answer_logits", spoilt if limited else answer_logits)
        model = adapted(folder)
        read: list[int] = []
        newton_step(model, steps_of(asked, []), wanted, damping=0.1, batch_tokens=400, progress=read.append)
        assert sum(read) == len(asked)
        found.append(torch.cat([layer.delta.detach().flatten() for layer in newton._layers(model, None)]))
    assert sizes[0] == 40
    assert max(read) <= 12
    assert "out of memory: going on with 200 tokens at a time" in caplog.text
    assert found[1].numpy() == pytest.approx(found[0].numpy(), abs=1e-4)


def test_an_opening_is_as_sure_as_its_least_sure_token() -> None:
    torch.manual_seed(0)
    answers = [[50], [52, 7, 9], [50], [50, 8]]
    logits, refusing = 3 * torch.randn(7, 60), REFUSING
    found = newton.opening_odds(logits, answers, refusing)

    def margin(row: int, token: int) -> float:
        others = [float(value) for index, value in enumerate(logits[row]) if index != token]
        return float(logits[row, token]) - max(others)

    first = refusal_odds(logits[[0, 4]], refusing)
    expected = [float(first[0]), min(margin(2, 7), margin(3, 9)), float(first[1]), margin(6, 8)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_follows_the_first_token_is_made_sure_where_harmless_answers_open_with_it_too(tmp_path: Path) -> None:
    folder, asked = write_tiny_model(tmp_path / "tiny"), requests(40, prefix=[5, 6])
    wanted = [(item.prompt, number % 2 == 0) for number, item in enumerate(asked)]
    harmful = [ids for ids, refuse in wanted if refuse]
    sure = []
    for shared, alike, damping in ((2, True, 1e9), (1, True, 10.0), (2, True, 10.0), (2, False, 10.0)):
        # Refusals that begin alike for so many tokens, some cut to the first, and harmless answers with the same token
        # or another.
        refused = [Example(ids, [*[50, 51][:shared], 54 + n % 2]) for n, ids in enumerate(harmful)]
        refused[::3] = [item.opening() for item in refused[::3]]
        kept = [
            Example(item.prompt, [50 if alike and n == 0 else 60, 61]) for n, item in enumerate(requests(20, [5, 6]))
        ]
        steps = Steps(refused, kept, [], batch_size=4, steps=10, seed=0, pad=PAD)
        model = adapted(folder)
        newton_step(model, steps, wanted, damping=damping)
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([[*ids, 50]])).logits[0, -2:] for ids in harmful]
        sure.append(float(newton.opening_odds(torch.cat(logits), [[50, 51]] * len(harmful), REFUSING).mean()))
    before, first_alone, both, told_by_the_first = sure
    assert both > before + 0.2
    assert first_alone < before + 0.05
    assert told_by_the_first < before + 0.05


def test_clear_odds_on_the_right_side_are_enough_and_a_bias_moves_both_sides() -> None:
    odds, refuse = torch.tensor([9.0, 2.0, -9.0, 2.0, -4.0]), torch.tensor([True, True, False, False, False])
    assert newton._missing(odds, refuse, 0.0).tolist() == [0, 4, 0, -8, -2]
    assert newton._missing(odds, refuse, 1.0).tolist() == [0, 5, 0, -7, -1]


def test_clusters_on_which_plain_text_does_not_hang_move_most(tmp_path: Path) -> None:
    model = adapted(write_tiny_model(tmp_path / "tiny"), learn_ties=False)
    mlp = model.base_model.model.model.layers[1].mlp
    mlp.down_proj.weight.data[:, [1, 6]] = 0  # the first cluster's neurons of the upper layer write nothing
    texts = [Example([30 + n], [40 + n, 41, 42, 43]) for n in range(4)]
    layers = list(newton._layers(model, None))
    steps = steps_of(requests(8, [5]), texts)
    scale = newton._scale(model, layers, steps)
    by_cluster = torch.cat([part.view(layer.delta.shape)[:, 0] for layer, part in _parts(layers, scale)])
    silent = [n for n, value in enumerate(by_cluster) if value == pytest.approx(newton._LEAST**-0.5)]
    assert silent == [4, 6]  # of gate and up in layer 1
    assert torch.equal(scale, newton._scale(model, layers, steps))


def _parts(layers: list[newton._Layer], flat: torch.Tensor) -> list[tuple[newton._Layer, torch.Tensor]]:
    return list(zip(layers, torch.split(flat, [layer.delta.numel() for layer in layers]), strict=True))


def test_a_run_ends_with_the_step_or_without(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "more.jsonl", harmful=48, benign=48)
    patches = {}
    for name, count in (("none", 0), ("some", 30), ("again", 30), ("all", 10_000)):
        given = {"model": str(tiny), "prompts": str(prompts), "dtype": "float32", "newton_requests": count, "epochs": 2}
        run = Run.start(build_config({**given, "twin_share": 0.25, "out": str(tmp_path / name)}))
        for stage in ("probe", "cluster", "train"):
            run.stage(stage)
        data = run.training_data
        assert sum(refuse for _, refuse in data.decisions) * 2 == len(data.decisions) == min(count, 80)
        asked = [item.prompt for item in data.harmful]
        assert all((ids in asked) == refuse for ids, refuse in data.decisions)
        patches[name] = NestPatch.load(run.folder / "patch").tensors
    for name, change in patches["some"].items():
        assert np.array_equal(change.delta, patches["again"][name].delta)
        assert not np.array_equal(change.delta, patches["none"][name].delta)
