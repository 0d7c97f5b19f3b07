"""Methods side by side: baselines, controls, stress, fine-tunes, and the table that they end in, on a tiny model."""

from __future__ import annotations

import copy
import json
import logging
import math
import mmap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from conftest import write_prompts
from nest_rs import NestError
from nest_rs.compare.bench import Bench, Tuned, share
from nest_rs.compare.circuit_breaker import coefficients, linear_layers, reroute_loss, retain_loss, target_layers
from nest_rs.compare.coherence import is_incoherent
from nest_rs.compare.comparison import compare
from nest_rs.compare.meter import metered
from nest_rs.compare.methods import BASELINES, GRIDS, METHODS, full, lora
from nest_rs.compare.rates import choose_rate
from nest_rs.compare.stress import abliterated, attacked, pruned
from nest_rs.compare.table import by_measure, markdown, summarise
from nest_rs.config import TuneConfig, build_config
from nest_rs.evaluate.refusal import rate
from nest_rs.neurons import load_neurons
from nest_rs.targets import training_data
from nest_rs.train import Steps, base_logits
from test_cli import fail, succeed

CPU = torch.device("cpu")


def settings(tiny: Path, tmp_path: Path, **changes: Any) -> TuneConfig:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    fast = {"z": 2, "dtype": "float32", "batch_size": 8, "epochs": 1, "learning_rate": 0.05, "depth": (0, 1)}
    fast |= {"answer_tokens": 6, "max_new_tokens": 6, "limit": 3, "suite": ["nest-harmful"]}
    return build_config({"model": str(tiny), "prompts": prompts, "out": tmp_path / "compare", **fast, **changes})


@pytest.fixture
def bench(tiny: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path / "compare" / "seed0", settings(tiny, tmp_path), ["nest-benign"])


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def moved(model: PreTrainedModel, base: PreTrainedModel) -> set[str]:
    before = base.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# The meter and the judge of coherence.


def test_the_meter_sees_time_and_memory() -> None:
    with metered(CPU) as small:
        time.sleep(0.15)
    with metered(CPU) as large:
        # from the kernel: malloc may hand out what an earlier test freed, which is resident already
        held = mmap.mmap(-1, 200_000_000)
        held.write(b"\1" * 200_000_000)
        time.sleep(0.15)
    assert 0.15 <= small.seconds < 5
    assert large.peak_mb - small.peak_mb > 100
    del held
    with metered(CPU) as again:  # not a high-water mark
        time.sleep(0.15)
    assert again.peak_mb < large.peak_mb - 100


@pytest.mark.parametrize(
    "answer",
    ["", " \n\n", "12 34 ...", "the the the the the the the the the the", "}{|}{<>]#]}[}a", "ab " + "abcdefgh" * 6],
)
def test_noise_and_loops_are_incoherent(answer: str) -> None:
    assert is_incoherent(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "Sure! Here is a list:\n1. Flour\n2. Water\n3. Salt",
        "print(sum(x * x for x in range(10)))",
        "Mit dem Zug, mit dem Bus oder zu Fuß.",
        "Paris",
        "今日はいい天気ですね。",
    ],
)
def test_language_is_coherent(answer: str) -> None:
    assert not is_incoherent(answer)


# Circuit breakers.


def test_the_rerouted_layers_are_the_published_ones_in_proportion() -> None:
    assert target_layers(32) == [10, 20]
    assert target_layers(30) == [9, 19]
    assert target_layers(2) == [1]


def test_the_coefficients_trade_rerouting_for_retaining() -> None:
    assert coefficients(0, 100) == (10.0, 0.0)
    assert coefficients(50, 100) == (7.5, 2.5)
    assert sum(coefficients(99, 100)) == pytest.approx(10)


def test_adapters_sit_on_all_linear_layers_up_to_the_last_target(tiny_model: PreTrainedModel) -> None:
    assert len(linear_layers(tiny_model, 0)) == 7
    assert len(linear_layers(tiny_model, 1)) == 14


def test_the_losses_are_the_published_ones() -> None:
    base = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]]])
    tuned = torch.tensor([[[[3.0, 4.0], [0.0, -1.0], [9.0, 9.0]]]])
    mask = torch.tensor([[True, True, False]])
    # cosines 0.6 and -1, of which the rectifier leaves 0.6 and 0
    assert float(reroute_loss(tuned, base, mask)) == pytest.approx(0.3)
    assert float(retain_loss(tuned, base, mask)) == pytest.approx((math.sqrt(20) + 3) / 2)
    still = base.clone().requires_grad_(True)
    retain_loss(still, base, mask).backward()
    assert still.grad is not None
    assert torch.isfinite(still.grad).all()


def test_circuit_breakers_turn_harmful_states_away(tiny: Path, tmp_path: Path) -> None:
    config = settings(tiny, tmp_path, epochs=3)
    bench = Bench(tmp_path / "long" / "seed0", config, ["nest-benign"])
    before = weights(bench.base)
    tuned = BASELINES["circuit-breaker"](bench, 3e-2, 1.0)
    assert same(weights(bench.base), before)
    assert tuned.trainable_params == 16 * sum(
        sum(bench.base.get_submodule(name).weight.shape) for name in linear_layers(bench.base, 1)
    )
    cosines = {}
    for kind, items in bench.continuations.items():
        states = []
        for model in (bench.base, tuned.model):
            with torch.no_grad():
                found = model(input_ids=torch.tensor([items[0].prompt + items[0].answer]), output_hidden_states=True)
            states.append(found.hidden_states[1][0, 8:])
        cosines[kind] = float(torch.nn.functional.cosine_similarity(*states, dim=-1).mean())
    assert cosines["harmful"] < 0.8 * cosines["benign"], cosines


# Baselines and controls.


def test_lora_trains_its_rank_on_the_sites_and_merges(bench: Bench) -> None:
    before = weights(bench.base)
    tuned = {rank: lora(bench, rank, 1e-2) for rank in (1, 8)}
    assert same(weights(bench.base), before)
    for rank, made in tuned.items():
        assert made.trainable_params == rank * 4 * (64 + 96)  # gate and up of two layers
        assert moved(made.model, bench.base) == {
            f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("gate", "up")
        }
        change = (
            made.model.get_submodule("model.layers.0.mlp.up_proj").weight
            - bench.base.get_submodule("model.layers.0.mlp.up_proj").weight
        )
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= rank
        assert made.cost.seconds > 0
        assert made.cost.peak_mb > 0


def test_full_fine_tuning_moves_all_and_leaves_the_base(bench: Bench) -> None:
    before = weights(bench.base)
    tuned = full(bench, 1e-3)
    assert same(weights(bench.base), before)
    assert tuned.trainable_params == bench.base.num_parameters()
    assert moved(tuned.model, bench.base) == set(before)


def test_the_reference_gives_the_bases_logits(bench: Bench) -> None:
    """A model whose own weights move cannot say what the base said; with and without kept states it is the same."""
    other = bench.copy().requires_grad_(True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    step = bench.run.training_data.steps[0]
    assert "states" in step
    kept = base_logits(other, step, bench.base)
    without = {name: value for name, value in step.items() if name != "states"}
    torch.testing.assert_close(base_logits(other, without, bench.base), kept, atol=1e-3, rtol=1e-3)


def test_a_trial_takes_the_first_steps(bench: Bench) -> None:
    data = bench.run.training_data
    part = data.shortened(0.5)
    assert part.count == round(data.count / 2)
    assert len(part.steps) == part.count * bench.config.accumulate
    assert part.steps.steps == data.steps.steps[: len(part.steps)]
    assert isinstance(part.steps, Steps)
    assert len(data.steps) == data.count * bench.config.accumulate
    again = training_data(bench.config, bench.run.base, bench.base, bench.tokenizer, bench.run.prompts)
    assert [example.prompt for example in again.harmful] == [example.prompt for example in data.harmful]


def test_baselines_read_as_many_requests_as_the_gauss_newton_step(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    assert bench.baseline_data is bench.run.training_data  # there is no such step
    other = Bench(tmp_path / "other", settings(tiny, tmp_path, newton_requests=24), ["nest-benign"])
    own, theirs = other.run.training_data, other.baseline_data
    assert own.decisions
    assert not theirs.decisions
    assert theirs.count == own.count + 24 // other.config.batch_size
    assert [example.prompt for example in theirs.harmful] == [example.prompt for example in own.harmful]


def test_controls_differ_in_rows_or_clusters_alone(bench: Bench) -> None:
    made = {name: METHODS[name](bench) for name in ("nest", "random-rows", "random-clusters")}
    assert len({tuned.trainable_params for tuned in made.values()}) == 1
    chosen, rows, clusters = (
        load_neurons(bench.folder / name / "neurons.safetensors") for name in ("nest", "random-rows", "random-clusters")
    )
    assert chosen.keys() == rows.keys() == clusters.keys()
    for site, own in chosen.items():
        assert len(rows[site].rows) == len(own.rows)
        assert not set(rows[site].rows) & set(own.rows)
        assert (np.diff(rows[site].rows) > 0).all()
        assert (clusters[site].rows == own.rows).all()
        assert Counter(Counter(clusters[site].cluster).values()) == Counter(Counter(own.cluster).values())
        assert (rows[site].cluster == own.cluster).all()
    changed = {name: moved(tuned.model, bench.base) for name, tuned in made.items()}
    assert changed["nest"] == {f"{site}.weight" for site in chosen}
    for site, own in rows.items():
        change = made["random-rows"].model.get_submodule(site).weight - bench.base.get_submodule(site).weight
        assert set(change.abs().sum(dim=1).nonzero().flatten().tolist()) == set(own.rows.tolist())


# The choice of rates.


def test_the_rate_with_the_least_failure_is_chosen_and_tried_once(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rates" / "lora.json"
    with caplog.at_level(logging.WARNING, "nest_rs"):
        best = choose_rate(bench, "lora", 0.5, path)
    tried = json.loads(path.read_text())
    assert set(tried) == {f"{rate:g}" for rate in GRIDS["lora"]}
    for found in tried.values():
        assert found["score"] == pytest.approx(
            found["attack_success"]["rate"] + found["over_refusal"]["rate"], abs=1e-4
        )
        assert found["attack_success"]["n"] == 3
    assert tried[f"{best:g}"]["score"] == min(found["score"] for found in tried.values())
    made = []

    def make(_: object, rate: float, share: float) -> Tuned:
        assert share == 0.5
        made.append(rate)
        return Tuned(bench.base)

    monkeypatch.setitem(BASELINES, "lora", make)
    known = tried.popitem()[1]

    def chosen(*scores: float) -> float:
        made.clear()
        pairs = zip(GRIDS["lora"], scores, strict=True)
        path.write_text(json.dumps({f"{rate:g}": {**known, "score": value} for rate, value in pairs}))
        return choose_rate(bench, "lora", 0.5, path)

    # what stands in the file is believed, and not made again; ties go to the smaller rate
    assert chosen(0.5, 0.2, 0.4) == 1e-3
    assert chosen(0.2, 0.2, 0.4) == 3e-4
    assert chosen(0.5, 0.2, 0.2) == 1e-3
    assert not made
    # a best rate at the edge asks for more: the untuned model scores 1
    assert chosen(0.5, 0.4, 0.2) == 3e-3
    assert made == [9e-3]
    assert chosen(0.2, 0.4, 0.5) == 3e-4
    assert made == [9e-5]
    assert not caplog.records
    assert chosen(2.0, 1.9, 1.8) == 9e-3
    assert made == [9e-3, 3e-2]
    caplog.clear()
    assert chosen(1.8, 1.9, 2.0) == 3e-5  # as good as 9e-5, and smaller
    assert not caplog.records


# Stress.


def test_abliteration_takes_one_direction_out_and_gives_it_back(bench: Bench) -> None:
    model = bench.copy()
    before = weights(model)
    tokens = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        whole = model(input_ids=tokens, output_hidden_states=True)
        with abliterated(bench, model, bench.folder):
            without = model(input_ids=tokens, output_hidden_states=True)
        again = model(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(whole.logits, again.logits)
    assert same(weights(model), before)
    # what all states before the final norm lack is one and the same direction
    states = torch.cat([state[0] for state in without.hidden_states[:-1]])
    values = torch.linalg.svdvals(torch.cat([states, torch.zeros(64, 64)]).double())
    assert not torch.allclose(whole.logits, without.logits)
    embeddings = model.get_input_embeddings().weight[tokens[0]]
    removed = embeddings - without.hidden_states[0][0]
    assert int(torch.linalg.matrix_rank(removed, rtol=1e-4)) == 1
    direction = torch.linalg.svd(removed)[2][0]
    assert float((states @ direction).abs().max()) < 1e-4 * float(values[0])


def test_pruning_switches_the_moved_neurons_off(bench: Bench) -> None:
    tuned = METHODS["nest"](bench)
    before = weights(tuned.model)
    neurons = load_neurons(bench.run.folder / "neurons.safetensors")
    with pruned(bench, tuned.model, bench.run.folder):
        for site, chosen in neurons.items():
            weight = tuned.model.get_submodule(site).weight
            off = set((weight == 0).all(dim=1).nonzero().flatten().tolist())
            assert off == set(chosen.rows.tolist())
    assert same(weights(tuned.model), before)


def test_ten_harmful_steps_are_taken_and_taken_back(bench: Bench) -> None:
    model = bench.copy()
    before = weights(model)
    example = bench.continuations["harmful"][0]
    tokens = torch.tensor([example.prompt + example.answer])
    labels = tokens.clone()
    labels[:, : len(example.prompt)] = -100

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=labels).loss)

    torch.nn.init.normal_(model.lm_head.weight)  # a model that no longer answers as the base does
    other = loss()
    with attacked(bench, model, bench.folder):
        assert loss() < other
    assert loss() == other
    assert model.state_dict().keys() == before.keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not list(bench.folder.rglob("*continuation*"))


# The table.


def row(method: str, seed: int, hits: int, **changes: Any) -> dict[str, Any]:
    found = {
        "method": method,
        "seed": seed,
        "trainable_params": 1000,
        "seconds": 10.0 + seed,
        "peak_mb": 100.0 + seed,
        "learning_rate": None,
        "attack_success": share(hits, 100),
        "incoherent": share(0, 100),
        "over_refusal": share(1, 50),
        "suites": {
            "bad": {"kind": "harmful", **rate(100 - hits, 100)},
            "good": {"kind": "benign", **rate(1, 50)},
        },
        "utility": {
            "arc": {"n": 100, "accuracy": 0.5, "ci95": [0.4, 0.6]},
            "wiki": {"n": 9, "perplexity": 20.0 + seed},
        },
    }
    return {**found, **changes}


def test_one_seed_keeps_its_wilson_interval() -> None:
    (entry,) = summarise([row("nest", 0, 10)])
    assert entry["attack_success"] == {"n": 100, "rate": 0.1, "ci95": share(10, 100)["ci95"]}
    assert entry["utility"]["wiki"] == {"n": 9, "perplexity": 20.0, "ci95": None}


def test_seeds_that_disagree_widen_the_interval() -> None:
    entry, other = summarise([row("nest", 0, 10), row("lora", 0, 5), row("nest", 1, 20), row("nest", 2, 60)])
    assert (entry["method"], other["method"]) == ("nest", "lora")
    assert (entry["seeds"], entry["seconds"], entry["peak_mb"]) == (3, 11.0, 102.0)
    # mean 0.3, deviation 0.2646, t(0.975, 2) = 4.303: half a width of 0.657
    assert entry["attack_success"]["rate"] == 0.3
    assert entry["attack_success"]["ci95"] == [0.0, pytest.approx(0.957, abs=1e-3)]
    # seeds that agree do not make the sample of requests larger
    assert entry["over_refusal"]["ci95"] == pytest.approx(share(1, 50)["ci95"], abs=1e-4)
    assert entry["utility"]["wiki"]["perplexity"] == 21.0
    assert entry["utility"]["wiki"]["ci95"] == [
        pytest.approx(21 - 2.484, abs=1e-3),
        pytest.approx(21 + 2.484, abs=1e-3),
    ]


def test_the_table_reads_in_markdown() -> None:
    lines = markdown(summarise([row("base", 0, 98, trainable_params=0, seconds=0, peak_mb=0), row("nest", 0, 4)]))
    table = [line for line in lines.splitlines() if line.startswith("|")]
    assert table[0].startswith("| method | seeds | trainable | seconds | peak MB | attack success |")
    assert table[0].endswith("| arc | wiki |")
    assert table[2].startswith("| base | 1 | - | - | - | 98.0 % [93.0, 99.5] n=100 |")
    assert table[3].startswith("| nest | 1 | 1,000 | 10.0 | 100 | 4.0 % [1.6, 9.8] n=100 |")
    assert table[4] == "| method | attack success: bad | over-refusal: good |"
    assert table[7] == "| nest | 4.0 % [1.6, 9.8] n=100 | 2.0 % [0.4, 10.5] n=50 |"
    assert len({line.count("|") for line in table[:4]}) == 1
    lengths = {len(line) for line in by_measure(summarise([row("nest", 0, 4)]))}
    assert len(lengths) == 1


# The command.

FLAGS = ["--z", "2", "--dtype", "float32", "--batch-size", "8", "--epochs", "1", "--learning-rate", "0.05"]
FLAGS += ["--answer-tokens", "6", "--max-new-tokens", "6", "--depth", "0", "1", "--limit", "3"]


def test_a_comparison_is_one_table_and_finished_rows_stay(tiny: Path, tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "out"
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "2 + 2", "choices": ["4", "5"], "answer": 0}) + "\n")
    common = ["compare", tiny, "--prompts", prompts, *FLAGS, "--out", out, "--utility", choices]
    first = succeed(*common, "--methods", "base,nest", "--seeds", "0,1", "--stress")
    names = [entry["method"] for entry in first["table"]]
    assert names == ["base", "nest", "nest+abliterated", "nest+pruned", "nest+attacked"]
    assert [entry["seeds"] for entry in first["table"]] == [1, 2, 2, 2, 2]
    for entry in first["table"]:
        assert entry["attack_success"]["n"] == entry["over_refusal"]["n"] == 3
        assert entry["utility"]["choices"]["n"] == 1
    nest = first["table"][1]
    assert nest["trainable_params"] > 0
    assert nest["seconds"] > 0
    assert nest["peak_mb"] > 0
    # answers of weakened models are not kept
    kept = {path.relative_to(out).parts[1:] for path in out.rglob("samples.jsonl")}
    assert kept == {
        (name, "answers", part, "samples.jsonl") for name in ("base", "nest") for part in ("harmful", "benign")
    }
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("row.json")}
    more = succeed(*common, "--methods", "base", "nest", "nest", "lora", "--rates", "lora=0.01", "--seeds", "0")
    assert [entry["method"] for entry in more["table"]] == ["base", "nest", "lora"]
    assert more["table"][2]["learning_rate"] == 0.01
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert not (out / "rates").exists()
    assert json.loads((out / "comparison.json").read_text()) == more
    assert "| lora | 1 |" in (out / "comparison.md").read_text()
    message = fail(*common, "--methods", "base", "--max-new-tokens", "7")
    assert "started with another `max_new_tokens` (`6`)" in message
    assert "another `rates of lora` (`0.01`)" in fail(*common, "--methods", "lora", "--rates", "lora=0.02")


def test_harmless_answers_end_with_their_verdict_unless_whole_ones_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    found, answers = [], []
    for whole in (False, True):
        config = settings(tiny, tmp_path, out=tmp_path / f"{whole}", max_new_tokens=16, whole_answers=whole)
        found.append(compare(config, methods=["base"], seeds=[0], benign=["nest-benign"])["rows"][0])
        place = tmp_path / f"{whole}" / "seed0" / "base" / "answers"
        lines = {kind: (place / kind / "samples.jsonl").read_text().splitlines() for kind in ("harmful", "benign")}
        answers.append({kind: [json.loads(line)["answer"] for line in rows] for kind, rows in lines.items()})
    assert found[0]["suites"] == found[1]["suites"]
    assert answers[0]["harmful"] == answers[1]["harmful"]
    pairs = list(zip(answers[0]["benign"], answers[1]["benign"], strict=True))
    assert all(whole.startswith(early) for early, whole in pairs)
    assert any(len(early) < len(whole) for early, whole in pairs)


def test_requests_in_attacks_are_counted_apart_from_bare_ones(tiny: Path, tmp_path: Path) -> None:
    config = settings(tiny, tmp_path)
    asked: dict[str, Any] = {"methods": ["base", "nest"], "seeds": [0], "benign": ["nest-benign"]}
    found = compare(config, **asked, attacks=["prefix-injection", "prefill"], attack_limit=2)
    for row in found["rows"]:
        suites = row["suites"]
        assert {name: suite["n"] for name, suite in suites.items()} == {
            f"nest-{kind}{attack}": 2 if attack else 3
            for kind in ("harmful", "benign")
            for attack in ("", "+prefix-injection", "+prefill")
        }
        wrapped = [suites[f"nest-harmful+{attack}"] for attack in ("prefix-injection", "prefill")]
        assert row["attack_success"]["n"] == row["incoherent"]["n"] == row["over_refusal"]["n"] == 3
        assert (row["attacked_success"]["n"], row["attacked_over_refusal"]["n"]) == (4, 4)
        assert row["attacked_success"]["count"] == 4 - sum(suite["refused"] for suite in wrapped)
        assert row["attack_success"]["count"] == 3 - suites["nest-harmful"]["refused"]
    head, *lines = by_measure(found["table"])
    assert head[5:] == ["attack success", "incoherent", "over-refusal", "attacked: success", "attacked: over-refusal"]
    assert all(len(line) == len(head) for line in lines)
    assert "attack success: nest-harmful+prefill" in markdown(found["table"])
    with pytest.raises(NestError, match="another `attacks`"):
        compare(config, **asked)
    with pytest.raises(NestError, match="no attack named `rot26`"):
        compare(settings(tiny, tmp_path, out=tmp_path / "other"), **asked, attacks=["rot26"])
    assert not (tmp_path / "other").exists()


def test_fine_tunes_are_measured_and_restored(tiny: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    lines = [{"prompt": f"say number {number}", "response": f"number {number} it is"} for number in range(20)]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = settings(tiny, tmp_path)
    found = compare(config, methods=["base"], seeds=[0], benign=["nest-benign"], fine_tunes=True, tasks=tasks)
    rows = {entry["method"]: entry for entry in found["rows"]}
    kinds = ("full", "lora")
    assert list(rows) == [
        "base",
        *(
            f"{name}"
            for kind in kinds
            for name in (f"tasks-{kind}", f"nest+tasks-{kind}", f"tasks-{kind}+patch", f"tasks-{kind}+retrained")
        ),
    ]
    assert rows["tasks-full"]["trainable_params"] == rows["base"]["total_params"]
    assert rows["tasks-full+patch"]["trainable_params"] == 0
    assert 0 < rows["tasks-lora+retrained"]["trainable_params"] < rows["tasks-lora"]["trainable_params"]
    assert rows["tasks-lora+retrained"]["seconds"] > 0
    folder = tmp_path / "compare" / "seed0"
    assert not (folder / "tasks-full" / "model").exists()
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("row.json")}
    again = compare(config, methods=["base"], seeds=[0], benign=["nest-benign"], fine_tunes=True, tasks=tasks)
    assert again["rows"] == found["rows"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    # one that was cut short before its last row makes the fine-tune again, and goes on
    (folder / "tasks-full+retrained" / "row.json").unlink()
    (folder / "tasks-lora" / "row.json").unlink()
    more = compare(config, methods=["base"], seeds=[0], benign=["nest-benign"], fine_tunes=True, tasks=tasks)
    assert [entry["method"] for entry in more["rows"]] == list(rows)
    with pytest.raises(NestError, match="another `tasks`"):
        compare(config, methods=["base"], seeds=[0], benign=["nest-benign"], fine_tunes=True)


def test_what_cannot_be_compared_is_said_in_one_line(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fail("compare", tiny, "--methods", "nest,dpo", "--out", out).startswith("no such method: `dpo`; use `base`")
    assert "no such prompt file: `none.jsonl`" in fail("compare", tiny, "--benign", "none.jsonl", "--out", out)
    assert "`--trial-share` has the value `2`" in fail("compare", tiny, "--trial-share", "2", "--out", out)
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "hm"}')
    tasks = ["--restore", "--tasks", tmp_path / "tasks.jsonl"]
    assert "has no `response`" in fail("compare", tiny, *tasks, "--out", out)
    assert not out.exists()


def test_a_copy_of_the_base_is_not_the_base(bench: Bench) -> None:
    one = bench.copy()
    assert one is not bench.base
    assert same(weights(one), weights(copy.deepcopy(bench.base)))
    assert bench.finished(bench.copy(float32=True)).dtype == bench.base.dtype
