"""Probing, training and decoding beside what they should be compared with, on a processor.

Usage: python benches/engine.py [probe] [train] [onnx] [scaling] [--model NAME] [--threads 2] [--repeats 5] [--json]

- probe: reading the neurons, store written, beside a plain forward pass of the same batches.
- train: a step of `train_deltas`, of LoRA (r = 8) on the same sites, and of the frozen model (forward, and backward to
  the input of the first tuned layer), in turn on the same batches; the others in packed rows as ours, and padded.
- onnx: greedy decoding by onnxruntime-genai of the merged model, of the base, of the base with a LoRA adapter that is
  not merged, and by torch's generate, all in float32.
- scaling: seconds of probing and of a training step against prompts, tokens, layers and sites on random models, with
  the exponent fitted to them, and the memory of probing against the number of prompts.

What is compared runs in turn in one process; figures are medians. bfloat16 where the processor multiplies it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nest_rs.evaluate.generate import decode
from nest_rs.export import export_onnx
from nest_rs.fold import merge_folder
from nest_rs.models import load_model, load_tokenizer, pick_dtype, resolve
from nest_rs.packing import ATTENTION
from nest_rs.patch import NestPatch
from nest_rs.prefix import behind, behind_prefix, budgeted, prefix_cache, shared_prefix
from nest_rs.probe import collect_activations
from nest_rs.prompts import chat_ids, embedded_prompts, encode, refusals
from nest_rs.sites import find_sites
from nest_rs.train import Example, Steps
from steps import frozen_step, plain_step, race, synthetic, timed, with_lora, with_nest

CPU = torch.device("cpu")
DEPTH = (0.33, 1.0)  # where a default run looks
Rows = list[dict[str, Any]]


def in_turn(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turn, each round begun by another; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repeats + 1):
        first = number % len(work)
        for name in [*work][first:] + [*work][:first]:
            seconds[name].append(timed(work[name], CPU))
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def requests(tokenizer: Any, kinds: tuple[str, ...], count: int) -> list[list[int]]:
    """Every so-manieth training prompt of the project's own set, as token ids."""
    prompts = [item.prompt for item in embedded_prompts() if item.split == "train" and item.kind in kinds]
    step = max(1, len(prompts) // count)
    return chat_ids(tokenizer, prompts[::step][:count])


def bench_probe(args: argparse.Namespace) -> Rows:
    """Tokens a second of a plain forward pass and of the probe."""
    base = resolve(args.model)
    tokenizer = load_tokenizer(base.folder)
    model = load_model(base.folder, device=CPU, dtype=pick_dtype("auto", CPU))
    ids = sorted(requests(tokenizer, ("harmful", "benign", "twin"), args.prompts), key=len)
    prefix, pad = shared_prefix(ids), tokenizer.pad_token_id
    sites = find_sites(model, depth=DEPTH)

    @torch.inference_mode()
    def forward() -> None:
        cache = prefix_cache(model, torch.tensor([prefix]))
        for batch in budgeted(ids, 4096):
            tokens, _, attended = behind_prefix(batch, prefix, pad, CPU)
            model(
                input_ids=tokens,
                attention_mask=attended,
                **behind(cache, len(batch)),
                use_cache=cache is not None,
                logits_to_keep=1,
            )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.safetensors"
        found = in_turn(
            {
                "plain forward pass": forward,
                "probe, store written": lambda: collect_activations(model, sites, ids, path, pad=pad),
            },
            args.repeats,
        )
    tokens = sum(len(row) - len(prefix) for row in ids)
    plain = found["plain forward pass"]
    return [
        {"work": name, "seconds": round(value, 3), "tokens/s": round(tokens / value), "ratio": round(plain / value, 3)}
        for name, value in found.items()
    ]


def bench_train(args: argparse.Namespace) -> Rows:
    """Seconds of a training step of 16 requests."""
    base = resolve(args.model)
    tokenizer = load_tokenizer(base.folder)
    dtype = pick_dtype("auto", CPU)
    model = load_model(base.folder, device=CPU, dtype=dtype)
    sites = find_sites(model, depth=DEPTH)
    count = args.repeats + 3
    told = encode(tokenizer, refusals())
    harmful = [
        Example(row, [*told[number % len(told)], tokenizer.eos_token_id])
        for number, row in enumerate(requests(tokenizer, ("harmful",), 8 * count))
    ]
    prompts = [item.prompt for item in embedded_prompts() if item.split == "train" and item.kind == "benign"][
        : 8 * count
    ]
    answers = decode(model, tokenizer, prompts, max_new_tokens=8, batch_size=48, label="base answers", states=True)
    asked = chat_ids(tokenizer, prompts)
    benign = [
        Example(row, answer.tokens, answer.states)
        for row, answer in zip(asked, answers, strict=True)
        if answer is not None
    ]
    steps = Steps(harmful, benign, batch_size=16, steps=count, seed=0, pad=tokenizer.pad_token_id)
    first = min(site.layer for site in sites)
    others = {}
    # As a run does it, and as it is usually done: padded, with the attention that is faster in the backward pass.
    for name, suffix in ((ATTENTION, ""), ("eager", ", padded")):
        model.set_attn_implementation(name)
        lora = with_lora(copy.deepcopy(model), sites)
        trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
        others["lora" + suffix] = plain_step(lora, torch.optim.AdamW(trained, lr=1e-3))
        others["frozen" + suffix] = frozen_step(copy.deepcopy(model), first)
    found = race(with_nest(model, sites), steps, others)
    return [
        {"work": name, **row, "ratio": round(row["seconds"] / found["nest"]["seconds"], 3)}
        for name, row in found.items()
    ]


def bench_onnx(args: argparse.Namespace) -> Rows:
    """Tokens a second of greedy decoding, one prompt at a time."""
    import onnxruntime_genai as genai

    base = resolve(args.model)
    tokenizer = load_tokenizer(base.folder)
    model = load_model(base.folder, device=CPU, dtype=torch.float32)
    sites = find_sites(model, depth=DEPTH)
    ids = requests(tokenizer, ("benign",), args.decoded)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peft = with_nest(copy.deepcopy(model), sites)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=1e-3)
        patch = NestPatch.from_model(peft).seal(base.folder)
        merge_folder(base, patch, folder / "merged", card="")
        lora = with_lora(copy.deepcopy(model), sites)
        lora.save_pretrained(folder / "adapter")
        export_onnx(base.folder, folder / "base.onnx")
        export_onnx(folder / "merged", folder / "merged.onnx")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base.folder), "-p", "fp32"]
        command += ["-e", "cpu", "-o", str(folder / "adapter.onnx"), "-c", str(folder / "cache")]
        subprocess.run(
            [*command, "--extra_options", f"adapter_path={folder / 'adapter'}"], check=True, capture_output=True
        )
        names = {"merged": "merged.onnx", "base": "base.onnx", "base with a LoRA adapter": "adapter.onnx"}
        exported = {name: genai.Model(str(folder / path)) for name, path in names.items()}

        def by_onnx(name: str) -> None:
            for row in ids:
                params = genai.GeneratorParams(exported[name])
                length = len(row) + 32
                params.set_search_options(max_length=length, min_length=length, do_sample=False)
                generator = genai.Generator(exported[name], params)
                generator.append_tokens(np.array(row, dtype=np.int32))
                while not generator.is_done():
                    generator.generate_next_token()

        def by_torch() -> None:
            with torch.inference_mode():
                for row in ids:
                    tokens = torch.tensor([row])
                    model.generate(
                        tokens,
                        attention_mask=torch.ones_like(tokens),
                        do_sample=False,
                        min_new_tokens=32,
                        max_new_tokens=32,
                        pad_token_id=tokenizer.pad_token_id,
                    )

        work: dict[str, Callable[[], None]] = {name: lambda name=name: by_onnx(name) for name in exported}
        found = in_turn({**work, "torch generate": by_torch}, args.repeats)
    return [
        {
            "work": name,
            "seconds": round(value, 3),
            "tokens/s": round(32 * len(ids) / value, 1),
            "ratio": round(value / found["merged"], 3),
        }
        for name, value in found.items()
    ]


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = np.log(sizes), np.log(seconds)
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def random_model(layers: int, *, width: int = 256) -> Any:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(pick_dtype("auto", CPU)).eval().requires_grad_(False)


def peak_beyond(work: Callable[[], None]) -> float:
    """MB by which the process's own memory rose above what it held before."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    clear.write_text("5")  # the peak starts anew

    def resident(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    before = resident("VmRSS")
    work()
    return round((resident("VmHWM") - before) / 1024, 1)


def bench_scaling(args: argparse.Namespace) -> Rows:
    """How seconds grow with each quantity, the others held."""
    typical = {"prompts": 256, "tokens": 32, "layers": 4, "sites": 8}
    series = {
        "prompts": [128, 256, 512, 1024],
        "tokens": [16, 32, 64, 128],
        "layers": [2, 4, 8, 16],
        "sites": [2, 4, 8, 16],
    }
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        for name, sizes in series.items():
            probes, trains = [], []
            for size in sizes:
                shape = {**typical, "layers": 8 if name == "sites" else 4, name: size}
                model = random_model(shape["layers"])
                sites = find_sites(model)[-shape["sites"] :] if name == "sites" else find_sites(model)
                ids = [
                    [3 + (i * j) % 1000 for j in range(1, shape["tokens"] + 1)] for i in range(1, shape["prompts"] + 1)
                ]
                probes.append(
                    in_turn(
                        {"": lambda m=model, s=sites, i=ids: collect_activations(m, s, i, path, pad=0)}, args.repeats
                    )[""]
                )
                examples = synthetic(
                    max(16, shape["prompts"] // 8), shape["tokens"], 8, vocab=1024, width=256, dtype=model.dtype
                )
                half = len(examples) // 2
                batch = shape["prompts"] // 16
                steps = Steps(examples[:half], examples[half:], batch_size=batch, steps=args.repeats + 1, seed=0, pad=0)
                trains.append(race(with_nest(model, sites), steps, {})["nest"]["seconds"])
            for work, seconds in (("probe", probes), ("training step", trains)):
                rows.append(
                    {
                        "work": f"{work} against {name}",
                        "sizes": sizes,
                        "seconds": [round(value, 4) for value in seconds],
                        "exponent": exponent(sizes, seconds),
                    }
                )
        model = random_model(4)
        sites = find_sites(model)
        peaks, stores, counts = [], [], [1024, 4096, 16384]
        for count in counts:
            ids = [[3 + (i * j) % 1000 for j in range(1, 9)] for i in range(1, count + 1)]
            peaks.append(peak_beyond(lambda ids=ids: collect_activations(model, sites, ids, path, pad=0)))
            stores.append(round(path.stat().st_size / 1e6, 1))
        rows.append({"work": "memory of probing against prompts, MB", "sizes": counts, "MB": peaks, "store MB": stores})
    return rows


BENCHES = {"probe": bench_probe, "train": bench_train, "onnx": bench_onnx, "scaling": bench_scaling}


def main() -> None:
    """Run what is asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[[], *BENCHES], help="which parts (default: all)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=150, help="to be probed")
    parser.add_argument("--decoded", type=int, default=8, help="prompts to be answered")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    found = {}
    for name in args.only or BENCHES:
        started = time.perf_counter()
        found[name] = BENCHES[name](args)
        if not args.json:
            for row in found[name]:
                print(f"{name}: {row.pop('work')}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
            print(f"{name}: {time.perf_counter() - started:.0f} s in all", flush=True)
    if args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
