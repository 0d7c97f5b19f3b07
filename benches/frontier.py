"""Attack success against over-refusal for each method: the points of a frontier plot.

    python benches/frontier.py COMPARISON --methods nest,lora,full,circuit-breaker --rates lora=3e-3,full=3e-5

A method is one point in a table, and where two methods stop on their own frontiers is a matter of taste. So each is
made once, and its change of the weights is scaled: W = base + s (tuned - base). Writes `frontier.csv` and
`frontier.json` to COMPARISON, the folder of a comparison whose settings are taken, and whose rates where none are
given; with matplotlib installed, `frontier.svg` too.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nest_rs.compare.bench import Bench
from nest_rs.compare.methods import BASELINES, METHODS
from nest_rs.compare.rates import choose_rate
from nest_rs.config import TuneConfig, build_config
from nest_rs.files import read_json, write_json


@torch.no_grad()
def scaled(base: PreTrainedModel, tuned: PreTrainedModel, into: PreTrainedModel, scale: float) -> None:
    """Write base + scale (tuned - base) into a third model, in float32, rounded once."""
    rows = zip(base.parameters(), tuned.parameters(), into.parameters(), strict=True)
    for before, after, target in rows:
        target.copy_((before.float() + scale * (after.float() - before.float())).to(target.dtype))


def points(
    bench: Bench, method: str, scales: list[float], rates: dict[str, float], share: float
) -> list[dict[str, Any]]:
    """One point a scale; finished ones are read."""
    path = bench.folder / "frontier" / f"{method}.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    missing = [scale for scale in scales if f"{scale:g}" not in found]
    if missing:
        if method in BASELINES:
            tried = bench.folder.parent / "rates" / f"{method}.json"
            rate = rates[method] if method in rates else choose_rate(bench, method, share, tried)
            tuned = BASELINES[method](bench, rate, 1.0)
        else:
            tuned = METHODS[method](bench)
        model = bench.copy()
        for scale in missing:
            scaled(bench.base, tuned.model, model, scale)
            judged = bench.judge(model, None, f"{method} x {scale:g}")
            found[f"{scale:g}"] = {name: judged[name] for name in ("attack_success", "incoherent", "over_refusal")}
            write_json(path, found)
    return [{"method": method, "scale": scale, **found[f"{scale:g}"]} for scale in scales]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        axes.plot(
            [100 * row["over_refusal"]["rate"] for row in own],
            [100 * row["attack_success"]["rate"] for row in own],
            marker="o",
            label=method,
        )
    axes.set(xlabel="over-refusal, %", ylabel="attack success, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="folder of nest-rs compare")
    parser.add_argument("--methods", default="nest,lora,full,circuit-breaker,random-rows")
    parser.add_argument("--scales", default="0.25,0.5,0.75,1,1.25,1.5")
    parser.add_argument("--rates", default="", help="method=rate,...")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    settings = read_json(given.comparison / "settings.json")
    config = build_config(
        {name: value for name, value in settings.items() if name in TuneConfig.model_fields}, {"seed": given.seed}
    )
    # Bare requests alone: each method is judged at many scales.
    bench = Bench(given.comparison / f"seed{given.seed}", config, settings["benign"])
    rates = {name: float(rate) for name, _, rate in (item.partition("=") for item in given.rates.split(",") if item)}
    rows = [
        point
        for method in given.methods.split(",")
        for point in points(bench, method, [float(s) for s in given.scales.split(",")], rates, settings["trial_share"])
    ]
    (given.comparison / "frontier.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (given.comparison / "frontier.csv").open("w", newline="") as file:
        table = csv.writer(file)
        measures = ("attack_success", "incoherent", "over_refusal")
        table.writerow(["method", "scale", *(f"{name}{part}" for name in measures for part in ("", "_low", "_high"))])
        for row in rows:
            values = [value for name in measures for value in (row[name]["rate"], *row[name]["ci95"])]
            table.writerow([row["method"], row["scale"], *values])
    plot(rows, given.comparison / "frontier.svg")
    print((given.comparison / "frontier.csv").read_text(), end="")


if __name__ == "__main__":
    main()
