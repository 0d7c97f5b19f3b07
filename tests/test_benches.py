"""The benches run, on models too small to say anything of speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import write_prompts

BENCHES = Path(__file__).parent.parent / "benches"


def run(script: str, *arguments: object) -> Any:
    command = [sys.executable, str(BENCHES / script), *map(str, arguments), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_bench_of_one_accelerator_runs_on_a_processor() -> None:
    arguments = ["--device", "cpu", "--shapes", "tiny", "--requests", 4, "--tokens", 16, "--probed", 8, "--repeats", 1]
    rows = run("gpu.py", *arguments)["tiny"]
    assert list(rows) == ["nest", "lora", "frozen", "full", "forward", "probe"]
    assert all(row["tokens/s"] > 0 for row in rows.values())


def test_the_bench_of_a_whole_run_runs_on_a_processor(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shape = ["--shape", "tiny", "--device", "cpu", "--tokenizer", tiny, "--folder", scratch]
    found = run("stages.py", *shape, f"prompts={prompts}", "limit=2", "epochs=1", "batch_size=8")
    assert list(found["stages"]) == ["load", "probe", "cluster", "train", "merge", "eval"]
    assert all(row["GB"] > 0 for row in found["stages"].values())
    assert found["steps"] == 5
    assert 0 < found["trainable_params"] < found["total_params"]
    assert not list(scratch.iterdir())  # models of 8B are not left behind


@pytest.mark.parametrize(("part", "rows"), [("probe", 2), ("train", 5)])
def test_the_bench_of_the_engine_runs(part: str, rows: int, tiny: Path) -> None:
    found = run("engine.py", part, "--model", tiny, "--threads", 1, "--repeats", 1, "--prompts", 12)[part]
    assert len(found) == rows
    assert all(row["tokens/s"] > 0 for row in found)


def test_the_bench_of_what_states_tell_apart_runs(tiny: Path) -> None:
    found = run("ceiling.py", "--model", tiny, "--tuned", tiny, "--layers", 1, 2, "--limit", 8)
    assert list(found) == ["last token", "mean", "last token and mean", str(tiny), "together"]
    suites = [f"nest-{kind}-validation" for kind in ("harmful", "benign", "twin")]
    for rows in found.values():
        assert list(rows) == [*suites, "harmful together"]
        # of eight ordinary requests one lies above the quantile of 2 %, of eight twins two above that of 20 %
        assert rows["nest-benign-validation"] == 12.5 or rows["nest-twin-validation"] == 25
        assert rows["nest-benign-validation"] <= 12.5
        assert rows["nest-twin-validation"] <= 25
        assert rows["harmful together"] == rows["nest-harmful-validation"]


def test_a_bound_on_no_harmless_suite_is_one_line(tiny: Path) -> None:
    arguments = ["--model", tiny, "--suites", "nest-harmful-validation", "--most", "ordinary=0.1"]
    command = [sys.executable, str(BENCHES / "ceiling.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "ceiling.py: error: --most bounds `ordinary` requests alone, and no suite is harmless; name one with --suites"
    )
