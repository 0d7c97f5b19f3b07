"""A small search over the recipe: what each trial gives up in helpfulness for what it gains in safety.

Trial 0 is the recipe as given, the others are points of a scrambled Sobol sequence over `SPACE`. All share one probe,
and each is trained in full and judged on the embedded validation split. The answer is a front, not a winner: trials
that no other beats in both attack success and over-refusal. Where one must be taken, it is the one with the least sum.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy.stats import qmc

from nest_rs.compare.bench import Bench
from nest_rs.compare.methods import nest
from nest_rs.config import TuneConfig
from nest_rs.files import read_json, write_json
from nest_rs.models import resolve
from nest_rs.report import percent

log = logging.getLogger(__name__)

# Setting: lowest value, highest value, whether it is searched on a logarithmic scale.
SPACE: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (1e-3, 1e-2, True),
    "z": (1.5, 3.0, False),
    "first_weight": (0.2, 0.8, False),
    "benign_weight": (1.0, 16.0, True),
    "teacher_weight": (0.5, 8.0, True),
    "refusal_bias": (-2.0, 4.0, False),
}


def points(count: int, seed: int) -> list[dict[str, float]]:
    """`count` settings of `SPACE`, the same for the same seed."""
    if count == 0:
        return []
    # Sobol sequences are balanced in powers of two only.
    unit = qmc.Sobol(len(SPACE), scramble=True, rng=seed).random_base2(math.ceil(math.log2(count)))[:count]
    found = []
    for row in unit.tolist():
        point = {}
        for share, (name, (low, high, logarithmic)) in zip(row, SPACE.items(), strict=True):
            value = low * (high / low) ** share if logarithmic else low + (high - low) * share
            point[name] = float(f"{value:.3g}")
        found.append(point)
    return found


def front(trials: Sequence[dict[str, Any]]) -> list[int]:
    """Numbers of the trials that no other beats: none is as good in both rates and better in one."""
    scores = [(trial["attack_success"]["rate"], trial["over_refusal"]["rate"]) for trial in trials]
    return [
        number
        for number, (attack, refusal) in enumerate(scores)
        if not any(a <= attack and r <= refusal and (a, r) != (attack, refusal) for a, r in scores)
    ]


def search(config: TuneConfig, count: int) -> dict[str, Any]:
    """Try `count` recipes; finished trials are read, so that a search cut short goes on.

    Args:
        config: The recipe of trial 0, and all that is not in `SPACE`; `out` is the folder the trials go to.
        count: Trials, the first included.

    Returns:
        `folder`, `trials` (settings and validation rates), `front` (their numbers, least attack success first) and
        `best` (the number with the least sum of the two rates).
    """
    folder = config.out or Path("runs") / resolve(config.model).slug / f"search-seed{config.seed}"
    own = {name: getattr(config, name) for name in SPACE}
    trials: list[dict[str, Any]] = []
    first: Bench | None = None
    for number, point in enumerate([own, *points(count - 1, config.seed)]):
        place = folder / f"trial{number:02}"
        log.info(
            "trial %d of %d: %s", number + 1, count, ", ".join(f"{name} {value:g}" for name, value in point.items())
        )
        bench = Bench(place, config.model_copy(update=point), [])
        first = first or bench
        path = place / "trial.json"
        if not path.is_file():
            bench.run.take_probe(first.run)
            tuned = nest(bench)
            found = bench.judge(tuned.model, None, f"trial {number}", bench.validation)
            rates = {name: found[name] for name in ("attack_success", "over_refusal")}
            write_json(path, {"settings": point, "trainable_params": tuned.trainable_params, **rates})
            shutil.rmtree(bench.run.folder / "merged")
        trials.append(read_json(path))
    order = sorted(front(trials), key=lambda number: trials[number]["attack_success"]["rate"])
    best = min(
        range(len(trials)), key=lambda i: sum(trials[i][name]["rate"] for name in ("attack_success", "over_refusal"))
    )
    result = {"folder": str(folder), "trials": trials, "front": order, "best": best}
    write_json(folder / "search.json", result)
    return result


def table(result: dict[str, Any]) -> Table:
    """The trials for a terminal, the front first."""
    shown = Table("trial", *SPACE, "attack success", "over-refusal", title="Validation split; * on the front")
    rest = [number for number in range(len(result["trials"])) if number not in result["front"]]
    for number in [*result["front"], *rest]:
        trial = result["trials"][number]
        mark = ("*" if number in result["front"] else "") + (" least sum" if number == result["best"] else "")
        settings = [f"{trial['settings'][name]:g}" for name in SPACE]
        shown.add_row(f"{number} {mark}", *settings, percent(trial["attack_success"]), percent(trial["over_refusal"]))
    return shown
