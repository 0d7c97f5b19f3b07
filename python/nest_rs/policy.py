"""Change a policy that is already in a patch: refuse one more category of harm, or no longer refuse one.

The first patch is left as it is. A second one is trained on top of it, on rows that the first does not move, and both
compose to one patch for the same base:

- to refuse a category, its requests are the harmful ones, and the neurons those that tell them from harmless requests;
- to allow one, its requests are harmless ones to be answered as the base answers them, all other categories stay
  refused, and the neurons are those that tell the category from everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nest_rs.errors import NestError, listed
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.evaluate.refusal import rate
from nest_rs.files import write_json
from nest_rs.fold import merge_folder
from nest_rs.models import load_model
from nest_rs.neurons import load_neurons, save_neurons, without_rows
from nest_rs.patch import FILE_NAME, NestPatch
from nest_rs.prompts import Prompt
from nest_rs.report import model_card
from nest_rs.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of an allowed category's requests among the harmless ones.
_ALLOWED_SHARE = 0.5


def update(
    run: Run, out: Path, *, refuse: str | None = None, allow: str | None = None, steps: int = 60
) -> dict[str, Any]:
    """Train a second patch for one category and compose it with a run's.

    Args:
        run: A run with a patch; its settings and prompts are used.
        out: A new folder: `second/` (the second patch's run), `patch/nest_patch.safetensors` (both, composed and
            sealed to the base), `merged/` and `update.json`.
        refuse: A category of the prompts to refuse from now on.
        allow: A category of the prompts to refuse no longer.
        steps: Of training.

    Returns:
        `patch`, `trainable_params` of the second patch, and `refused`: rates before (the first patch alone) and after,
        on the category's and the other harmful requests, and on the harmless ones, of the held-out splits.

    Raises:
        NestError: not one category is named, or none of the training prompts is of it.
    """
    category = refuse or allow
    if category is None or (refuse and allow):
        raise NestError("nothing to change", mend="name one category with --refuse or --allow")
    known = sorted({item.category for item in run.prompts if item.kind == "harmful"})
    if category not in known:
        raise NestError(f"no harmful prompts of the category `{category}`", mend=f"use one of {listed(known, 30)}")
    first = NestPatch.load(run.folder / "patch")
    second = _second(run, out / "second", first, category, allow=allow is not None, steps=steps)
    both = first.compose(second, base=run.base.folder)
    both.save(out / "patch" / FILE_NAME)
    merge_folder(run.base, both, out / "merged", card=model_card(run.base, both), overwrite=True)
    result = {
        ("allow" if allow else "refuse"): category,
        "patch": str(out / "patch" / FILE_NAME),
        "trainable_params": second.trainable_params,
        "refused": _judged(run, run.folder / "merged", out / "merged", category),
    }
    write_json(out / "update.json", result)
    return result


def _second(run: Run, folder: Path, first: NestPatch, category: str, *, allow: bool, steps: int) -> NestPatch:
    work = Run.start(run.config.model_copy(update={"out": folder, "resume": False}))
    for name in ("base", "tokenizer", "model"):
        work.__dict__[name] = getattr(run, name)
    own = [item for item in run.prompts if item.kind == "harmful" and item.category == category]
    others = [item for item in run.prompts if item.kind == "harmful" and item.category != category]
    harmless = [item for item in run.prompts if item.kind != "harmful"]
    # The probe tells the category from what must not change.
    work.__dict__["prompts"] = [*own, *harmless, *(_as(others, "benign") if allow else [])]
    work.stage("probe")
    work.stage("cluster")
    taken = {name.removesuffix(".weight"): change.rows for name, change in first.tensors.items()}
    path = folder / "neurons.safetensors"
    save_neurons(without_rows(load_neurons(path), taken), path)
    if allow:
        # The kinds serve to draw from the allowed requests and from all other harmless ones in fixed shares.
        work.__dict__["prompts"] = [*others, *_as(harmless, "benign"), *_as(own, "twin")]
    # The Gauss-Newton step knows only of refusing or not, and what is allowed again is to be answered as by the base.
    changes: dict[str, Any] = {"newton_requests": 0, **({"twin_share": _ALLOWED_SHARE} if allow else {})}
    refused = [item for item in work.prompts if item.kind == "harmful" and item.split == "train"]
    changes["epochs"] = steps * (run.config.batch_size // 2) / len(refused)
    work.config = work.config.model_copy(update=changes)
    # What is learned comes from the base; what learns it is the base with the first patch.
    data = work.training_data
    if any(example.states is None for example in data.benign):
        # Without the base's own states the model in training would be asked what it wants to unlearn.
        work.config = work.config.model_copy(update={"benign_loss": "sft"})
    work.config.save(folder / "config.yaml")
    work.__dict__["model"] = _patched(run, first)
    work.stage("train")
    return NestPatch.load(folder / "patch")


def _as(prompts: Sequence[Prompt], kind: str) -> list[Prompt]:
    return [replace(item, kind=kind) for item in prompts]  # type: ignore[arg-type]


def _patched(run: Run, patch: NestPatch) -> PreTrainedModel:
    """A copy of the run's base in memory with the patch's rows moved."""
    model = load_model(run.base.folder, device=run.model.device, dtype=run.model.dtype)
    for name, change in patch.tensors.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight.data
        rows = torch.from_numpy(change.rows).long().to(weight.device)
        delta = torch.from_numpy(change.moves).to(weight.device)
        weight[rows] = (weight[rows].float() + delta).to(weight.dtype)
    return model


def _judged(run: Run, before: Path, after: Path, category: str) -> dict[str, Any]:
    held_out = [item for item in run.prompts if item.split != "train"]
    groups = {
        category: [item for item in held_out if item.kind == "harmful" and item.category == category],
        "other harmful": [item for item in held_out if item.kind == "harmful" and item.category != category],
        "harmless": [item for item in held_out if item.kind != "harmful"],
    }
    found: dict[str, Any] = {}
    for name, folder in (("before", before), ("after", after)):
        model = load_model(folder, device=run.model.device, dtype=run.model.dtype)
        found[name] = {}
        for group, items in groups.items():
            answers = generate(
                model,
                run.tokenizer,
                [item.prompt for item in items[: run.config.limit]],
                max_new_tokens=run.config.max_new_tokens,
                batch_size=run.config.eval_batch_size,
                label=f"{name}: {group}",
            )
            told = [answer for answer in answers if answer is not None]
            found[name][group] = rate(sum(map(is_refusal, told)), len(told))
    return found
