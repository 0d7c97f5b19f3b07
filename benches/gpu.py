"""Training and probing on one accelerator, on random models of the shapes of Llama 1B, 3B and 8B.

Usage: python benches/gpu.py [--device cuda] [--shapes 1b 3b 8b smollm2-135m] [--requests 32] [--tokens 128] [--json]

Weights are made on the device, in bfloat16. For each shape: a training step of NeST (`train_deltas`), of LoRA (r = 8 on
the same sites), of full fine-tuning (AdamW in bfloat16; left out where it does not fit) and of the frozen model
(forward, and backward to the first tuned layer), each with the peak of memory; and probing beside a plain forward pass
of the same batches. `smollm2-135m` stands for the built-in model itself. `--device cpu --shapes tiny` only shows
that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nest_rs.models import load_model, resolve
from nest_rs.packing import ATTENTION
from nest_rs.prefix import behind, behind_prefix, budgeted, prefix_cache, shared_prefix
from nest_rs.probe import collect_activations
from nest_rs.sites import find_sites
from nest_rs.train import Steps, on
from steps import frozen_step, plain_step, race, synthetic, timed, tokens_of, with_lora, with_nest

DEPTH = (0.33, 1.0)  # where a default run looks
# Hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (64, 128, 3, 4, 2, 512, False),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}


def make(shape: str, device: torch.device) -> Any:
    """A frozen model of a shape, in bfloat16."""
    if shape not in SHAPES:
        return load_model(resolve(shape).folder, device=device, dtype=torch.bfloat16)
    hidden, ffn, layers, heads, kv, vocab, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def forget(device: torch.device) -> None:
    """Let go of the last model, and let the peak of memory start anew."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peak(device: torch.device) -> float | None:
    """GiB at the peak; a processor does not count them."""
    return None if device.type == "cpu" else round(torch.accelerator.max_memory_allocated() / 2**30, 2)


def train(shape: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of one method on a fresh model, and its peak of memory."""
    device = torch.device(args.device)
    forget(device)
    model = make(shape, device)
    sites = find_sites(model, depth=DEPTH)
    vocab, width = model.get_input_embeddings().weight.shape
    half = args.requests // 2
    examples = [synthetic(half * 2, args.tokens, 8, vocab=vocab, width=width, dtype=torch.bfloat16) for _ in "ab"]
    steps = Steps(*examples, batch_size=args.requests, steps=args.repeats + 2, seed=0, pad=0)
    if method == "nest":
        row = race(with_nest(model, sites), steps, {}, warm_up=2)["nest"]
        return {**row, "GiB": peak(device)}
    model.set_attn_implementation(ATTENTION)  # the same rows as ours
    if method == "frozen":
        step = frozen_step(model, min(site.layer for site in sites))
    else:
        tuned = with_lora(model, sites) if method == "lora" else model.requires_grad_(True)
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        step = plain_step(tuned, torch.optim.AdamW(trained, lr=1e-4))
    batches = [on(steps[i], device) for i in range(len(steps))]
    laps = [timed(lambda batch=batch: step(batch), device) for batch in batches][2:]
    seconds = statistics.median(laps)
    tokens = statistics.mean(tokens_of(batch) for batch in batches[2:])
    return {"seconds": round(seconds, 4), "tokens/s": round(tokens / seconds, 1), "GiB": peak(device)}


def probe(shape: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of a plain forward pass and of the probe, in turn."""
    device = torch.device(args.device)
    forget(device)
    model = make(shape, device)
    sites = find_sites(model, depth=DEPTH)
    rng = random.Random(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    opening = rng.choices(range(3, vocab), k=args.tokens // 4)
    lengths = sorted(rng.randrange(4, args.tokens) for _ in range(args.probed))
    ids = [opening + rng.choices(range(3, vocab), k=length) for length in lengths]
    prefix = shared_prefix(ids)

    @torch.inference_mode()
    def forward() -> None:
        cache = prefix_cache(model, torch.tensor([prefix], device=device))
        for batch in budgeted(ids, args.batch_tokens):
            tokens, _, attended = behind_prefix(batch, prefix, 0, device)
            model(input_ids=tokens, attention_mask=attended, **behind(cache, len(batch)), logits_to_keep=1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.safetensors"
        work: dict[str, Callable[[], None]] = {
            "forward": forward,
            "probe": lambda: collect_activations(model, sites, ids, path, pad=0, batch_tokens=args.batch_tokens),
        }
        laps: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(args.repeats + 1):
            for name, call in work.items():
                laps[name].append(timed(call, device))
    tokens = sum(len(row) - len(prefix) for row in ids)
    medians = {name: statistics.median(found[1:]) for name, found in laps.items()}
    return {
        name: {"seconds": round(value, 4), "tokens/s": round(tokens / value, 1), "GiB": peak(device)}
        for name, value in medians.items()
    }


def measure(shape: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows of one shape."""
    rows: dict[str, dict[str, Any]] = {}
    for method in ("nest", "lora", "frozen", "full"):
        try:
            rows[method] = train(shape, method, args)
        except torch.OutOfMemoryError:
            rows[method] = {"seconds": None, "tokens/s": None, "GiB": "does not fit"}
    return rows | probe(shape, args)


def main() -> None:
    """Measure each shape and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["1b", "3b", "8b"], choices=[*SHAPES, "smollm2-135m"])
    parser.add_argument("--requests", type=int, default=32, help="a training step's, half of each class")
    parser.add_argument("--tokens", type=int, default=128, help="of a request")
    parser.add_argument("--probed", type=int, default=512, help="prompts to be probed")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a batch of the probe")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {shape: measure(shape, args) for shape in args.shapes}
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'shape':14} {'work':8} {'seconds':>10} {'tokens/s':>12} {'GiB':>14}")
    for shape, rows in found.items():
        for work, row in rows.items():
            cells = [str(row[key]) for key in ("seconds", "tokens/s", "GiB")]
            print(f"{shape:14} {work:8} {cells[0]:>10} {cells[1]:>12} {cells[2]:>14}")


if __name__ == "__main__":
    main()
