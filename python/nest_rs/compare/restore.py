"""Fine-tunes of the base: how much safety ordinary fine-tuning takes, and what gives it back.

The base and the tuned model are fine-tuned on ordinary tasks, fully and by LoRA. What fine-tuning leaves is judged, and
so is the fine-tuned base (a) with the old patch added to its rows and (b) with the deltas trained again on it, on the
neurons that were found in the base. Rows, for each of `full` and `lora`:

- `tasks-full`: the base, fine-tuned;
- `nest+tasks-full`: the tuned model, fine-tuned;
- `tasks-full+patch`: the fine-tuned base, the old patch added;
- `tasks-full+retrained`: the fine-tuned base, its deltas trained again.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nest_rs.compare.bench import Bench, Tuned
from nest_rs.compare.finetune import fine_tune
from nest_rs.compare.meter import Cost, metered
from nest_rs.compare.methods import make_nest
from nest_rs.evaluate.generate import decode
from nest_rs.files import new_folder, read_json
from nest_rs.fold import merge_folder
from nest_rs.models import resolve
from nest_rs.patch import NestPatch
from nest_rs.prompts import Prompt, chat_ids, fitting, read_jsonl, text_field
from nest_rs.report import model_card
from nest_rs.run import Run
from nest_rs.targets import given_answers, helpful_examples
from nest_rs.train import Example

# Fine-tuning as users do it: 3 epochs, at most 100 steps, of 16 tasks.
_EPOCHS, _MOST, _BATCH, _RANK = 3, 100, 16, 16
_RATES = {"full": 2e-5, "lora": 2e-4}
# Tasks that the base sets itself: ordinary requests, answered under another instruction than they are learned with.
_INSTRUCTION = "Answer in one plain sentence, as a teacher would to a child.\n\n"
_TASKS, _TASK_TOKENS = 512, 48


def restore(bench: Bench, tasks: Path | None = None) -> list[dict[str, Any]]:
    """The rows above for one seed; what is there is read.

    Args:
        bench: The seed; its NeST run is made if it is not there.
        tasks: A .jsonl file with `prompt` and `response`; without it the base sets itself some.
    """
    rows = []
    for kind in _RATES:
        names = [f"tasks-{kind}", f"nest+tasks-{kind}", f"tasks-{kind}+patch", f"tasks-{kind}+retrained"]
        if not all(bench.row(name).is_file() for name in names):
            _make(bench, kind, names, tasks)
        rows += [read_json(bench.row(name)) for name in names]
    return rows


def _make(bench: Bench, kind: str, names: list[str], tasks: Path | None) -> None:
    plain, tuned, patched, retrained = names
    make_nest(bench)
    merged = bench.run.folder / "merged"
    # The fine-tuned base is an ordinary folder: the stages of a run work on it.
    folder = bench.row(plain).parent / "model"
    if not bench.row(plain).is_file() or not folder.is_dir():
        made = _fine_tuned(bench, bench.run.base.folder, kind, tasks)
        with new_folder(folder, overwrite=True) as scratch:
            made.model.save_pretrained(scratch)
            bench.tokenizer.save_pretrained(scratch)
        bench.save_row(plain, replace(made, model=bench.finished(made.model)))
    if not bench.row(tuned).is_file():
        made = _fine_tuned(bench, merged, kind, tasks)
        bench.save_row(tuned, replace(made, model=bench.finished(made.model)))
    base = resolve(str(folder))
    if not bench.row(patched).is_file():
        patch = NestPatch.load(bench.run.folder / "patch")
        loose = NestPatch(patch.tensors)  # not bound to the weights that it was trained on
        out = bench.row(patched).parent / "model"
        started = time.perf_counter()
        merge_folder(base, loose, out, card=model_card(base, loose), overwrite=True)
        cost = Cost(round(time.perf_counter() - started, 2))
        bench.save_row(patched, Tuned(bench.copy(folder=out), 0, cost))
        shutil.rmtree(out)
    if not bench.row(retrained).is_file():
        changes = {"model": str(folder), "out": bench.row(retrained).parent / "run", "resume": True}
        run = Run.start(bench.config.model_copy(update=changes))
        shutil.copyfile(bench.run.folder / "neurons.safetensors", run.folder / "neurons.safetensors")
        with metered(run.model.device) as cost:
            for stage in ("train", "merge"):
                run.stage(stage)
        parameters = run.summary()["trainable_params"]
        bench.save_row(retrained, Tuned(bench.copy(folder=run.folder / "merged"), parameters, cost))
    shutil.rmtree(folder)


def read_tasks(path: Path) -> list[tuple[str, str]]:
    """Requests and answers of a .jsonl file.

    Raises:
        NestError: missing, or a row without `prompt` or `response`.
    """
    return [
        (text_field(row, "prompt", path, number), text_field(row, "response", path, number))
        for number, row in enumerate(read_jsonl(path), start=1)
    ]


def task_examples(bench: Bench, tasks: Path | None) -> list[Example]:
    """What is learned: the file's tasks, or ordinary training requests with answers given under an instruction."""
    tokenizer, config = bench.tokenizer, bench.config
    context = int(bench.base.config.get_text_config().max_position_embeddings)
    if tasks is not None:
        lines = read_tasks(tasks)
        answers = given_answers(tokenizer, [response for _, response in lines])
        asked = chat_ids(tokenizer, [prompt for prompt, _ in lines])
        longest = context // 2
        fit = fitting(asked, [prompt[:40] for prompt, _ in lines], longest)
        return [Example(asked[i], [*answers[i].tokens[: longest - 1], tokenizer.eos_token_id]) for i in fit]
    ordinary = [item for item in bench.run.prompts if item.split == "train" and item.kind == "benign"]
    chosen: list[Prompt] = random.Random(config.seed).sample(ordinary, min(_TASKS, len(ordinary)))
    told = decode(
        bench.base,
        tokenizer,
        [_INSTRUCTION + item.prompt for item in chosen],
        max_new_tokens=_TASK_TOKENS,
        batch_size=config.eval_batch_size,
        label="tasks",
        states=False,
    )
    return helpful_examples(tokenizer, chosen, told, max_tokens=_TASK_TOKENS)


def _fine_tuned(bench: Bench, folder: Path, kind: str, tasks: Path | None) -> Tuned:
    """The model of a folder fine-tuned on the tasks; in float32, adapters merged."""
    from peft import LoraConfig, get_peft_model

    examples = task_examples(bench, tasks)
    model = bench.copy(float32=True, folder=folder)
    torch.manual_seed(bench.config.seed)
    adapted = None
    with metered(model.device) as cost:
        if kind == "lora":
            config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            adapted = get_peft_model(model, config)
        else:
            model.requires_grad_(True)
        parameters = sum(item.numel() for item in model.parameters() if item.requires_grad)
        fine_tune(
            model,
            examples,
            steps=min(_MOST, math.ceil(_EPOCHS * len(examples) / _BATCH)),
            batch_size=_BATCH,
            learning_rate=_RATES[kind],
            seed=bench.config.seed,
            pad=bench.tokenizer.pad_token_id,
            label=f"fine-tune {kind}",
        )
    return Tuned(model if adapted is None else adapted.merge_and_unload(), parameters, cost)
