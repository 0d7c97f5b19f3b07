"""What `nest-rs tune` does, the way it is usually done: TRL's SFTTrainer with a PEFT LoRA adapter.

Usage: python benches/trl_lora.py [--steps 235] [--model smollm2-135m] [--limit N] [--out DIR] [--json]

The same requests, refusals and answers of the base, as many steps of as many requests, half of each class, the loss on
the answer tokens; the adapter (r = 8 on the gate and up projections where NeST looks) is merged and saved, and base and
tuned model are judged on the same suites. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from nest_rs.config import TuneConfig
from nest_rs.evaluate.refusal import evaluate_refusal
from nest_rs.evaluate.suites import load_suites
from nest_rs.models import load_model, load_tokenizer, pick_device, pick_dtype, resolve
from nest_rs.prompts import load_prompts
from nest_rs.sites import find_sites
from nest_rs.targets import choose_benign, framed_requests, helpful_examples, own_answers, refusal_examples
from nest_rs.train import Example


def rows(examples: list[Example], count: int, rng: random.Random) -> list[dict[str, list[int]]]:
    """Shuffled examples, from the start again where they do not suffice, in the form that SFTTrainer reads."""
    chosen: list[Example] = []
    while len(chosen) < count:
        chosen += rng.sample(examples, len(examples))
    return [
        {
            "input_ids": item.prompt + item.answer,
            "completion_mask": [0] * len(item.prompt) + [1] * len(item.answer),
        }
        for item in chosen[:count]
    ]


def main() -> None:
    """Train, merge, judge; print seconds and rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = TuneConfig()
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--steps", type=int, help="default: as many as nest-rs tune takes")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="the usual one of LoRA")
    parser.add_argument("--limit", type=int, help="first rows of each suite only")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        with stage("load"):
            base = resolve(args.model)
            device = pick_device()
            dtype = pick_dtype("auto", device)
            tokenizer = load_tokenizer(base.folder)
            model = load_model(base.folder, device=device, dtype=dtype)
        with stage("data"):
            train = [item for item in load_prompts(None) if item.split == "train"]
            room = model.config.get_text_config().max_position_embeddings - defaults.answer_tokens
            train = framed_requests(defaults, tokenizer, train, room=room)
            refused = [item for item in train if item.kind == "harmful"]
            harmful = refusal_examples(tokenizer, refused, seed=defaults.seed)
            half = defaults.batch_size // 2
            steps = args.steps or math.ceil(defaults.epochs * len(harmful) / half)
            others = [item for item in train if item.kind in ("benign", "twin")]
            chosen = choose_benign(others, steps * half, defaults.twin_share, defaults.seed)
            answers = own_answers(
                base,
                model,
                tokenizer,
                chosen,
                max_new_tokens=defaults.answer_tokens,
                batch_size=defaults.eval_batch_size,
            )
            benign = helpful_examples(tokenizer, chosen, answers, max_tokens=defaults.answer_tokens)
            rng = random.Random(defaults.seed)
            both = zip(rows(harmful, steps * half, rng), rows(benign, steps * half, rng), strict=True)
            data = Dataset.from_list([row for pair in both for row in pair])
        suites = load_suites(defaults.suite, args.limit)

        def judge(name: str) -> Any:
            return evaluate_refusal(
                model,
                tokenizer,
                suites,
                out / "eval" / name,
                max_new_tokens=defaults.max_new_tokens,
                batch_size=defaults.eval_batch_size,
                early=True,
            )

        with stage("judge base"):
            rates = {"base": judge("base")}
        with stage("train"):
            sites = find_sites(model, depth=defaults.depth)
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    output_dir=str(out / "train"),
                    per_device_train_batch_size=defaults.batch_size // defaults.accumulate,
                    gradient_accumulation_steps=defaults.accumulate,
                    max_steps=steps,
                    learning_rate=args.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=max(1, steps // 20),
                    train_sampling_strategy="sequential",  # the rows alternate between the classes
                    gradient_checkpointing=False,
                    use_cpu=device.type == "cpu",
                    bf16=dtype == torch.bfloat16,
                    seed=defaults.seed,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                ),
                train_dataset=data,
                processing_class=tokenizer,
                peft_config=LoraConfig(
                    r=8,
                    lora_alpha=16,
                    target_modules=[site.module for site in sites],
                    task_type="CAUSAL_LM",
                ),
            )
            trainer.train()
        with stage("merge"):
            model = trainer.model.merge_and_unload().eval()
            model.save_pretrained(out / "merged")
            tokenizer.save_pretrained(out / "merged")
        with stage("judge tuned"):
            rates["tuned"] = judge("tuned")
    result = {"steps": steps, "seconds": {**seconds, "all": round(sum(seconds.values()), 1)}, "eval": rates}
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["seconds"].items():
        print(f"{name}: {value} s")
    for name, found in rates.items():
        print(f"{name}: " + ", ".join(f"{suite} {row['refused']} of {row['n']}" for suite, row in found.items()))


if __name__ == "__main__":
    main()
