"""What is left of a tuned model's refusals when someone works against them: reported, not promised.

Each stress is a context in which the model is weakened; it is whole again afterwards. A weakened model is judged and
gone: neither it nor its answers are written anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nest_rs.compare.bench import Bench
from nest_rs.compare.finetune import fine_tune
from nest_rs.neurons import load_neurons
from nest_rs.prefix import behind_prefix, budgeted
from nest_rs.prompts import Request, chat_ids, embedded_prompts, encode, refusals
from nest_rs.sites import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Requests of each class from which the refusal direction is read, and with which its layer is chosen.
_READ, _CHECKED = 128, 32
# The attacker's fine-tuning: 10 steps of 16 harmful requests with the base's own compliant continuations.
_STEPS, _BATCH, _RANK, _RATE = 10, 16, 8, 1e-3


@contextmanager
def abliterated(bench: Bench, model: PreTrainedModel, _folder: Path) -> Iterator[None]:
    """Project the refusal direction out of all that is written to the residual stream (Arditi et al. 2024).

    The direction is the difference of the mean hidden states at the last prompt token, harmful minus harmless training
    requests, of the layer without whose direction harmful validation requests are least likely to be answered with a
    refusal's first token. The projection acts on the outputs of the embedding, attention and feed-forward modules,
    which is the same as projecting the matrices that write them.
    """
    rng = random.Random(bench.config.seed)
    states = {}
    for harmful in (True, False):
        asked = [item for item in bench.run.prompts if item.split == "train" and (item.kind == "harmful") == harmful]
        chosen = rng.sample(asked, min(_READ, len(asked)))
        states[harmful] = _last_states(bench, model, [item.prompt for item in chosen])[0].mean(dim=1)
    directions = nn.functional.normalize(states[True] - states[False], dim=-1)  # [layers + 1, d]
    held_out = (item for item in embedded_prompts() if (item.kind, item.split) == ("harmful", "validation"))
    checked = [item.prompt for item in islice(held_out, _CHECKED)]
    openings = {row[0] for row in encode(bench.tokenizer, refusals())}

    def refusing(layer: int) -> float:
        with _without(model, directions[layer]):
            logits = _last_states(bench, model, checked)[1]
        return float(logits.softmax(dim=-1)[:, sorted(openings)].sum(dim=1).mean())

    best = min(range(1, len(directions)), key=refusing)
    with _without(model, directions[best]):
        yield


@contextmanager
def pruned(_bench: Bench, model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Set the rows of the moved neurons to zero, which switches them off."""
    kept = []
    for module, site in load_neurons(folder / "neurons.safetensors").items():
        weight = model.get_submodule(module).weight.data
        rows = torch.from_numpy(site.rows).long().to(weight.device)
        kept.append((weight, rows, weight[rows]))
        weight[rows] = 0
    try:
        yield
    finally:
        for weight, rows, original in kept:
            weight[rows] = original


@contextmanager
def attacked(bench: Bench, model: PreTrainedModel, _folder: Path) -> Iterator[None]:
    """Ten steps of LoRA fine-tuning on harmful requests with the untuned base's own compliant continuations."""
    from peft import LoraConfig, get_peft_model

    sites = [site.module for site in find_sites(model)]
    torch.manual_seed(bench.config.seed)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=sites, task_type="CAUSAL_LM")
    )
    try:
        fine_tune(
            model,
            bench.continuations["harmful"],
            steps=_STEPS,
            batch_size=_BATCH,
            learning_rate=_RATE,
            seed=bench.config.seed,
            pad=bench.tokenizer.pad_token_id,
            label="harmful fine-tuning",
        )
        yield
    finally:
        adapted.unload()
        model.requires_grad_(False)


STRESSES: dict[str, Callable[[Bench, PreTrainedModel, Path], AbstractContextManager[None]]] = {
    "abliterated": abliterated,
    "pruned": pruned,
    "attacked": attacked,
}


@contextmanager
def _without(model: PreTrainedModel, direction: torch.Tensor) -> Iterator[None]:
    """Take a direction [d], of length 1, out of what each module writes to the residual stream."""

    def project(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        written = output[0] if isinstance(output, tuple) else output
        unit = direction.to(written.dtype)
        clean = written - (written @ unit)[..., None] * unit
        return (clean, *output[1:]) if isinstance(output, tuple) else clean

    forwards = {site.module.rpartition(".")[0] for site in find_sites(model)}
    layers = {module.rpartition(".")[0] for module in forwards}
    writers = [*forwards, *(f"{layer}.self_attn" for layer in layers)]
    with ExitStack() as stack:
        for module in (model.get_input_embeddings(), *map(model.get_submodule, writers)):
            stack.callback(module.register_forward_hook(project).remove)
        yield


@torch.inference_mode()
def _last_states(
    bench: Bench, model: PreTrainedModel, prompts: Sequence[str | Request]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [layers + 1, n, d] and logits [n, vocabulary] at the last token of each prompt, float32."""
    ids = sorted(chat_ids(bench.tokenizer, prompts), key=len)
    states, logits = [], []
    for batch in budgeted(ids, 4096):
        tokens, _, mask = behind_prefix(batch, [], bench.tokenizer.pad_token_id, model.device)
        out = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        rows, last = torch.arange(len(batch)), torch.tensor([len(row) - 1 for row in batch])
        states.append(torch.stack([layer[rows, last].float() for layer in out.hidden_states]))
        logits.append(out.logits[rows, last].float())
    return torch.cat(states, dim=1), torch.cat(logits)
