"""Public suites by name: the loader of `datasets` finds a folder of the dataset's name, so no network is needed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nest_rs import NestError
from nest_rs.evaluate.hub import HUB_SUITES
from nest_rs.evaluate.suites import load_suite

pytest.importorskip("datasets")


def write_dataset(root: Path, name: str, rows: list[dict[str, Any]], *, twist: str | None = None) -> None:
    """A folder that `datasets` takes for the dataset of a suite: rows as they are at home, a card with its configs."""
    suite = HUB_SUITES[name]
    folder = root / suite.dataset
    folder.mkdir(parents=True, exist_ok=True)
    if suite.options:
        file = "data.tsv"
        with (folder / file).open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0], delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        file = "data.jsonl"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "config_name": suite.config or "default",
        "data_files": [{"split": twist or suite.split, "path": file}],
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")


def rows_of(name: str) -> list[dict[str, Any]]:
    """Two rows that the suite takes and, if it is part of a set, one that it does not."""
    suite = HUB_SUITES[name]
    kept: list[dict[str, Any]] = []
    for text in ("bake bread", "boil an egg"):
        row: dict[str, Any] = {suite.column: text, "category": "NA"}
        if name in ("sorry-bench", "mt-bench"):
            row[suite.column] = [text, "and then?"]
        if suite.where:
            row[suite.where[0]] = suite.where[1]
        kept.append(row)
    if suite.where:
        other = {**kept[0], suite.where[0]: "another"}
        return [kept[0], other, kept[1]]
    return kept


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize("name", list(HUB_SUITES))
def test_each_suite_of_the_table_is_read(name: str, at_home: Path) -> None:
    write_dataset(at_home, name, rows_of(name))
    suite = load_suite(name)
    assert suite.prompts == ["bake bread", "boil an egg"]
    assert suite.ids == [f"{name}-1", f"{name}-{3 if HUB_SUITES[name].where else 2}"]
    assert (suite.name, suite.kind) == (name, HUB_SUITES[name].kind)
    assert load_suite(name, limit=1).prompts == ["bake bread"]


def test_a_moved_column_is_a_clear_error(at_home: Path) -> None:
    write_dataset(at_home, "jbb", [{"Behaviour": "bake bread"}])
    with pytest.raises(
        NestError, match="`JailbreakBench/JBB-Behaviors` has no column `Goal` any more, but `Behaviour`"
    ):
        load_suite("jbb")


def test_a_missing_split_is_a_clear_error(at_home: Path) -> None:
    write_dataset(at_home, "jbb", [{"Goal": "bake bread"}], twist="other")
    with pytest.raises(NestError, match="cannot fetch the suite `jbb`"):
        load_suite("jbb")


def test_a_set_without_the_rows_asked_for_is_a_clear_error(at_home: Path) -> None:
    write_dataset(at_home, "xstest", [{"prompt": "bake bread", "label": "other"}])
    with pytest.raises(NestError, match="no row of `Paul/XSTest` has the `label` asked for"):
        load_suite("xstest")


def run_offline(tmp_path: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = (
    "from nest_rs.errors import NestError\n"
    "from nest_rs.evaluate.suites import load_suite\n"
    "try:\n    load_suite('advbench')\nexcept NestError as error:\n    print(error)\n"
)


def test_without_a_network_one_line_names_the_way_round(tmp_path: Path) -> None:
    out = run_offline(tmp_path, LOAD)
    (line,) = out.splitlines()
    assert line.startswith("cannot fetch the suite `advbench` (`walledai/AdvBench`) from the hub and it is not in the")
    assert line.endswith("or give a local .jsonl file with a `prompt` in each line")


def test_without_the_extra_one_line_names_it(tmp_path: Path) -> None:
    # None in sys.modules is how Python says that a module is not to be had.
    out = run_offline(tmp_path, f"import sys\nsys.modules['datasets'] = None\n{LOAD}")
    (line,) = out.splitlines()
    assert line.startswith("the suite `advbench` needs `datasets`, which is not installed; pip install 'nest-rs[hub]'")
