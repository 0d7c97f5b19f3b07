"""A whole run on a large model, stage by stage: seconds, and the most memory each stage holds.

Usage: python benches/stages.py [--shape 8b] [--device cuda] [--folder DIR] [--json] [SETTING=VALUE ...]

The model is random, of a shape of `gpu.py`, in bfloat16, with the tokenizer of the built-in model or of --tokenizer. It
says nothing about refusal; but it is read, probed, trained, folded and judged as a real one would be. Settings are
those of `nest-rs tune`, such as `epochs=0.1`. The folder has to hold the model twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpu import SHAPES, forget, make
from nest_rs.compare.meter import metered
from nest_rs.config import build_config
from nest_rs.models import load_tokenizer, resolve
from nest_rs.run import Run

STAGES = ("probe", "cluster", "train", "merge", "eval")
# A random model with tied embeddings would answer with the prompt's last token, a line's end.
UNTIED = [name for name, shape in SHAPES.items() if not shape[-1]]


def write_model(shape: str, device: torch.device, tokenizer: str, folder: Path) -> None:
    """A random model of a shape in a folder, with a tokenizer."""
    model, known = make(shape, device), load_tokenizer(resolve(tokenizer).folder)
    # What the tokenizer does not know is never the largest logit: the model's answers are text.
    model.get_output_embeddings().weight.data[len(known) :] = 0
    model.save_pretrained(folder)
    known.save_pretrained(folder)
    forget(device)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each stage's cost, and what the run says of itself."""
    device = torch.device(args.device)
    write_model(args.shape, device, args.tokenizer, folder / "model")
    given = dict(setting.split("=", 1) for setting in args.settings)
    config = build_config({"model": str(folder / "model"), "out": folder / "run", "device": args.device, **given})
    costs: dict[str, dict[str, float]] = {}

    def stage(name: str, work: Any) -> None:
        with metered(device) as cost:
            work()
        costs[name] = {"seconds": cost.seconds, "GB": round(cost.peak_mb / 1e3, 2)}
        print(f"{name:8} {cost.seconds:>9} s {costs[name]['GB']:>8} GB", file=sys.stderr, flush=True)

    started = time.perf_counter()
    run = Run.start(config)
    stage("load", lambda: run.model)
    for name in STAGES:
        stage(name, lambda name=name: run.stage(name))
    summary = run.summary()
    kept = ("total_params", "trainable_params", "prompts", "sites", "neurons", "steps")
    return {
        "stages": costs,
        "seconds": round(time.perf_counter() - started, 1),
        **{name: summary[name] for name in kept},
    }


def main() -> None:
    """Measure one run; its stages are told on stderr as they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of the run, as name=value")
    parser.add_argument("--shape", default="8b", choices=UNTIED)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="a model whose tokenizer is used")
    parser.add_argument("--folder", type=Path, help="where the models go for a while")
    parser.add_argument("--json", action="store_true", help="print all of it on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        found = measure(args, Path(scratch))
    if args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
