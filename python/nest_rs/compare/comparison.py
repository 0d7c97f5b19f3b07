"""The rows of a comparison, one after the other, each kept as soon as it is there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nest_rs.compare.bench import Bench, Tuned
from nest_rs.compare.methods import BASELINES, METHODS
from nest_rs.compare.rates import choose_rate
from nest_rs.compare.restore import read_tasks, restore
from nest_rs.compare.stress import STRESSES
from nest_rs.compare.table import markdown, summarise
from nest_rs.config import TuneConfig
from nest_rs.errors import NestError, listed
from nest_rs.evaluate.attacks import with_attacks
from nest_rs.evaluate.suites import load_suites
from nest_rs.evaluate.utility import check_utility
from nest_rs.files import read_json, replacing, write_json
from nest_rs.models import resolve
from nest_rs.prompts import load_prompts

log = logging.getLogger(__name__)

Row = dict[str, Any]


def compare(
    config: TuneConfig,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    benign: list[str],
    attacks: Sequence[str] = (),
    attack_limit: int | None = None,
    rates: dict[str, float] | None = None,
    trial_share: float = 0.4,
    stress: bool = False,
    fine_tunes: bool = False,
    tasks: Path | None = None,
) -> dict[str, Any]:
    """Make, judge and tabulate each method on each seed.

    Args:
        config: The settings that all share; `suite` are the harmful suites, `out` the comparison's folder.
        methods: Names from `METHODS` and `BASELINES`.
        seeds: Of the data's order, the start of LoRA, and what else is random. The base has one row.
        benign: Suites that should not be refused.
        attacks: Names or .jsonl files in which the requests of all suites are also wrapped.
        attack_limit: Wrap the first requests of each suite only.
        rates: Learning rates that are given, not chosen.
        trial_share: Of the steps, for each trial of a learning rate.
        stress: Add each tuned model under each of `STRESSES`.
        fine_tunes: Add the rows of `restore`.
        tasks: A .jsonl file of tasks to fine-tune on; without it the base sets itself some.

    Returns:
        `folder`, `rows` (a dictionary a row and seed) and `table` (a dictionary a row, over seeds).

    Raises:
        NestError: an unknown method, bad input, or a folder that holds a comparison of other settings.
    """
    unknown = [name for name in methods if name not in METHODS and name not in BASELINES]
    if unknown:
        raise NestError(f"no such method: `{unknown[0]}`", mend=f"use {listed([*METHODS, *BASELINES], 10)}")
    if not seeds or not methods:
        raise NestError("nothing to compare", mend="name --methods and --seeds")
    # What is named is looked at before anything is trained.
    with_attacks(load_suites([*config.suite, *benign], config.limit), attacks, attack_limit)
    check_utility(config.utility)
    load_prompts(config.prompts)
    if fine_tunes and tasks is not None:
        read_tasks(tasks)
    folder = config.out or Path("runs") / resolve(config.model).slug / "compare"
    own = {"out", "resume", "seed", "threads", "export", "precision", "parity_prompts"}
    settings = {**config.model_dump(mode="json", exclude=own), "benign": benign, "trial_share": trial_share}
    settings |= {"attacks": list(attacks), "attack_limit": attack_limit}
    settings |= {f"rates of {method}": rate for method, rate in (rates or {}).items()}
    if fine_tunes:
        settings["tasks"] = tasks and str(tasks)
    _same_settings(folder / "settings.json", settings)
    rows: list[Row] = []
    given = dict(rates or {})
    for seed in dict.fromkeys(seeds):
        bench = Bench(folder / f"seed{seed}", config.model_copy(update={"seed": seed}), benign, attacks, attack_limit)
        for method in dict.fromkeys(methods):
            if method == "base" and seed != seeds[0]:
                continue
            rows += _rows(bench, method, given, folder / "rates", trial_share, stress)
            _write(folder, rows)
        if fine_tunes:
            rows += restore(bench, tasks)
    return _write(folder, rows)


def _write(folder: Path, rows: list[Row]) -> dict[str, Any]:
    table = summarise(rows)
    result = {"folder": str(folder), "rows": rows, "table": table}
    write_json(folder / "comparison.json", result)
    with replacing(folder / "comparison.md") as scratch:
        scratch.write_text(markdown(table), encoding="utf-8")
    return result


def _same_settings(path: Path, now: dict[str, Any]) -> None:
    """Rows of other settings do not belong in one table."""
    before = {"attacks": [], "attack_limit": None, **read_json(path)} if path.is_file() else {}
    changed = [name for name in now if name in before and now[name] != before[name]]
    if changed:
        raise NestError(
            f"the comparison in `{path.parent}` was started with another `{changed[0]}` (`{before[changed[0]]}`)",
            mend="go on with the same settings, or start a new one with --out",
        )
    write_json(path, {**before, **now})


def _rows(
    bench: Bench, method: str, rates: dict[str, float], tried: Path, trial_share: float, stress: bool
) -> list[Row]:
    """The method's row, and those of its model under stress; what is there is read."""
    folder = bench.folder / method
    names = [method]
    if stress and method != "base":
        # What was not selected row by row has nothing to prune.
        names += [f"{method}+{name}" for name in STRESSES if name != "pruned" or method not in BASELINES]
    files = {name: bench.row(name) for name in names}
    tuned: Tuned | None = None
    for name, path in files.items():
        if path.is_file():
            continue
        if tuned is None:
            log.info("%s, seed %d ...", method, bench.config.seed)
            if method in BASELINES:
                if method not in rates:
                    rates[method] = choose_rate(bench, method, trial_share, tried / f"{method}.json")
                tuned = BASELINES[method](bench, rates[method], 1.0)
            else:
                tuned = METHODS[method](bench)
        if name == method:
            bench.save_row(name, tuned, learning_rate=rates.get(method))
        else:
            with STRESSES[name.partition("+")[2]](bench, tuned.model, folder):
                bench.save_row(name, Tuned(tuned.model), keep_answers=False)
    return [read_json(path) for path in files.values()]
