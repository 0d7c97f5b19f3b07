"""The paper's ablations on any model: how many neurons, how they are grouped, and on what.

    python benches/ablations.py                                    # the built-in model, hours on two cores
    python benches/ablations.py --epochs 0.5 --limit 50            # a glance
    python benches/ablations.py MODEL --suite harmful.jsonl --benign ordinary.jsonl --seeds 0,1,2 --json table.json

Each variant changes one setting of the recipe; all share one probe a seed, so seconds are those of clustering, training
and merging. Finished rows are kept under --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from nest_rs.compare.bench import Bench
from nest_rs.compare.methods import METHODS
from nest_rs.compare.table import markdown, summarise, terminal
from nest_rs.config import build_config
from nest_rs.errors import NestError
from nest_rs.files import read_json

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "z=2": {"z": 2.0},
    "z=3": {"z": 3.0},
    "z=4": {"z": 4.0},
    "weak: one cluster a site": {"clustering": "weak"},
    "strong: one cluster a neuron": {"clustering": "strong"},
    "clustered on standardised vectors": {"standardize": True},
    "k free": {"k_max": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--preset", choices=["default", "paper"], default="default")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--suite", nargs="+", default=["nest-harmful"], help="suites to refuse")
    parser.add_argument("--benign", nargs="+", default=["nest-benign"], help="suites to answer")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of all variants")
    parser.add_argument("--json", type=Path, help="write the table here too")
    given = parser.parse_args()

    common: dict[str, Any] = {"model": given.model, "preset": given.preset, "suite": given.suite}
    common |= {name: value for name in ("prompts", "epochs", "limit") if (value := getattr(given, name)) is not None}
    common |= {name: json.loads(value) for name, _, value in (item.partition("=") for item in given.set)}
    rows = []
    for seed in map(int, given.seeds.split(",")):
        recipe = build_config(common, {"seed": seed})
        first = Bench(given.out / f"seed{seed}" / "default", recipe, given.benign)
        for name in given.variants.split(","):
            config = build_config(common, VARIANTS[name], {"seed": seed})
            folder = given.out / f"seed{seed}" / name.partition(":")[0].replace(" ", "-")
            # A variant may be the recipe itself.
            bench = first if config == recipe else Bench(folder, config, given.benign)
            if not bench.row("nest").is_file():
                bench.run.take_probe(first.run)
                try:
                    bench.save_row("nest", METHODS["nest"](bench))
                except NestError as error:
                    print(f"{name}: {error}")
                    continue
            summary = bench.run.summary()
            sizes = {"neurons": summary["neurons"], "clusters": summary["clusters"]}
            rows.append({**read_json(bench.row("nest")), **sizes, "method": name})
    # One column the comparison's table has not: how many rows move.
    entries = summarise(rows)
    for entry in entries:
        own = [row for row in rows if row["method"] == entry["method"]]
        for size in ("neurons", "clusters"):
            entry[size] = round(sum(row[size] for row in own) / len(own))
    if given.json:
        given.json.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    (given.out / "ablations.md").write_text(markdown(entries), encoding="utf-8")
    console = Console()
    console.print(terminal(entries))
    for entry in entries:
        console.print(f"{entry['method']}: {entry['neurons']} neurons in {entry['clusters']} clusters")


if __name__ == "__main__":
    main()
