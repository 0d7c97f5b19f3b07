"""The search over the recipe: its points, its front, and trials that are not made twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nest_rs.search import SPACE, front, points, table
from test_cli import FAST, succeed


def trial(attack: float, refusal: float) -> dict[str, Any]:
    return {"attack_success": {"rate": attack}, "over_refusal": {"rate": refusal}}


def test_points_lie_in_the_space_and_depend_on_the_seed_alone() -> None:
    found = points(8, 0)
    assert found == points(8, 0) != points(8, 1)
    assert len(points(3, 0)) == 3
    assert points(0, 0) == []
    for name, (low, high, _) in SPACE.items():
        values = [point[name] for point in found]
        assert all(low <= value <= high for value in values)
        assert len(set(values)) == 8
        middle = (low * high) ** 0.5 if SPACE[name][2] else (low + high) / 2
        assert sum(value < middle for value in values) == 4  # balanced


def test_the_front_holds_what_nothing_beats() -> None:
    trials = [trial(0.2, 0.1), trial(0.1, 0.2), trial(0.2, 0.2), trial(0.3, 0.05), trial(0.1, 0.2), trial(0.4, 0.05)]
    assert front(trials) == [0, 1, 3, 4]


@pytest.mark.parametrize("more", [3])
def test_a_search_shows_its_front_and_goes_on(more: int, tiny: Path, prompt_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "search"
    common = ["tune", tiny, "--prompts", prompt_file, *FAST, "--limit", 3, "--out", out]
    found = succeed(*common, "--search", 2)
    assert len(found["trials"]) == 2
    assert found["trials"][0]["settings"]["learning_rate"] == 0.05  # the recipe as given
    assert found["best"] in found["front"]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("trial.json")}
    probes = [path.stat().st_ino for path in sorted(out.rglob("activations.safetensors"))]
    assert len(probes) == 2
    assert len(set(probes)) == 1
    assert not list(out.rglob("merged"))
    again = succeed(*common, "--search", more)
    assert len(again["trials"]) == more
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert json.loads((out / "search.json").read_text()) == again
    assert table(again).row_count == more
