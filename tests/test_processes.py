"""Two processes do what one does: the same neurons to the bit, the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import write_prompts
from nest_rs.patch import NestPatch

ONE = ["-m", "nest_rs"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ONE]


def tune(launcher: list[str], tiny: Path, prompts: Path, out: Path, *flags: str) -> dict[str, object]:
    settings = "--batch-size 8 --dtype float32 --z 1 --limit 4 --max-new-tokens 4 --no-export --json"
    settings += " --epochs 1 --newton-requests 60"
    command = [sys.executable, *launcher, "tune", str(tiny), "--prompts", str(prompts), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, *settings.split(), *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary: dict[str, object] = json.loads(done.stdout)
    return summary


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "loss"]


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process; two; two that find their parts too few, as each must have one."""
    folder = tmp_path_factory.mktemp("processes")
    prompts = write_prompts(folder / "prompts.jsonl", harmful=180, benign=180)
    os.environ["NEST_RS_CACHE"] = str(folder / "cache")
    tune(ONE, tiny, prompts, folder / "one", "--accumulate", "2")
    for name, parts in (("two", "2"), ("lifted", "1")):
        tune(TWO, tiny, prompts, folder / name, "--accumulate", parts)
    return {name: folder / name for name in ("one", "two", "lifted")}


@pytest.mark.parametrize("name", ["probe/activations.safetensors", "probe/probes.safetensors", "neurons.safetensors"])
def test_two_processes_find_the_same_bits(name: str, runs: dict[str, Path]) -> None:
    assert (runs["one"] / name).read_bytes() == (runs["two"] / name).read_bytes()


@pytest.mark.parametrize("name", ["two", "lifted"])
def test_two_processes_train_along_the_same_curve(name: str, runs: dict[str, Path]) -> None:
    one, two = losses(runs["one"]), losses(runs[name])
    assert len(one) >= 5
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("name", ["two", "lifted"])
def test_two_processes_end_at_the_same_deltas(name: str, runs: dict[str, Path]) -> None:
    one, two = (NestPatch.load(runs[run] / "patch").tensors for run in ("one", name))
    for tensor, change in one.items():
        assert two[tensor].delta == pytest.approx(change.delta, rel=1e-2, abs=1e-2 * float(abs(change.delta).max()))


def test_only_the_first_process_writes(runs: dict[str, Path]) -> None:
    listed = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (runs["one"], runs["two"])]
    assert listed[0] == listed[1]
    lines = [len((run / "run.jsonl").read_text().splitlines()) for run in (runs["one"], runs["two"])]
    assert lines[0] == lines[1]


def test_a_model_sharded_by_fsdp2_takes_the_same_steps(tiny: Path) -> None:
    script = str(Path(__file__).with_name("sharded.py"))
    found = []
    for launcher in ([], TWO[: -len(ONE)]):
        done = subprocess.run(
            [sys.executable, *launcher, script, str(tiny)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    one, two = found
    assert one["losses"][-1] < one["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    torch.testing.assert_close(torch.tensor(two["deltas"]), torch.tensor(one["deltas"]), atol=1e-4, rtol=1e-3)
