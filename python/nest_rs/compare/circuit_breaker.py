"""Circuit breakers: representation rerouting by LoRA (Zou et al. 2024, arXiv 2406.04313), as published.

On harmful requests with the base's compliant continuations, the hidden states of two middle layers are pushed until
they are orthogonal to the base's; on harmless ones, all layers' hidden states are held to the base's. Published
settings: LoRA of rank 16 on all linear layers up to the later target layer, alpha 10, a constant learning rate of 1e-4
(here the smallest of the grid), target layers 10 and 20 of 32 (here in proportion). Requests and number of steps are
those of the other methods. The opening of the chat template, which both classes share, is left out of both losses.

A rerouted answer need not be a refusal; often it is no language. Attack success counts what is not refused, as for the
other methods; the share of incoherent answers stands beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from nest_rs.compare.bench import Bench, Tuned
from nest_rs.compare.meter import metered
from nest_rs.prefix import behind, prefix_cache, shared_prefix
from nest_rs.progress import track
from nest_rs.train import Batch, collate, drawn, on, training_attention

_ALPHA = 10.0
_RANK = 16
_DROPOUT = 0.05


def break_circuits(bench: Bench, rate: float, share: float = 1.0) -> Tuned:
    """Reroute the representations of harmful requests; `share` of the bench's steps."""
    from peft import LoraConfig, get_peft_model

    config, model = bench.config, bench.copy()
    pairs = bench.continuations
    count = bench.baseline_data.shortened(share).count
    targets = target_layers(model.config.get_text_config().num_hidden_layers)
    torch.manual_seed(config.seed)
    with metered(model.device) as cost, training_attention(model):
        lora = LoraConfig(
            r=_RANK,
            lora_alpha=_RANK,
            lora_dropout=_DROPOUT,
            target_modules=linear_layers(model, targets[-1]),
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, lora).train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        size = config.batch_size // config.accumulate // 2
        prefix = shared_prefix([item.prompt for kind in pairs.values() for item in kind])
        draws = {kind: drawn(items, size, random.Random(config.seed)) for kind, items in pairs.items()}
        with track("circuit breaker", total=count, unit="steps") as advance:
            for step in range(count):
                reroute, retain = coefficients(step, count)
                for _ in range(config.accumulate):
                    batches = {
                        kind: on(collate(next(draw), bench.tokenizer.pad_token_id, prefix), model.device)
                        for kind, draw in draws.items()
                    }
                    loss = reroute * reroute_loss(*_both(adapted, batches["harmful"], targets))
                    loss = loss + retain * retain_loss(*_both(adapted, batches["benign"], None))
                    torch.autograd.backward(loss / config.accumulate)
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                advance(1)
    parameters = sum(parameter.numel() for parameter in trained)
    return Tuned(bench.finished(adapted.merge_and_unload()), parameters, cost)


def target_layers(layers: int) -> list[int]:
    """The two rerouted layers, counted from 1: 10 and 20 of 32, in proportion."""
    return sorted({max(1, round(layers * place / 32)) for place in (10, 20)})


def linear_layers(model: nn.Module, last: int) -> list[str]:
    """All linear modules of the decoder layers 0 to `last` (as published, one beyond the last rerouted state)."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) <= last
    ]


def coefficients(step: int, count: int) -> tuple[float, float]:
    """Weights of rerouting and of retaining: alpha (1 - t / 2T) and alpha t / 2T."""
    progress = step / (2 * count)
    return _ALPHA * (1 - progress), _ALPHA * progress


def reroute_loss(tuned: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of relu(cosine) over layers and tokens; states [layers, n, tokens, d], mask bool [n, tokens]."""
    cosine = functional.cosine_similarity(tuned.float(), base.float(), dim=-1)
    return cosine.relu()[:, mask].mean()


def retain_loss(tuned: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean L2 distance over layers and tokens; shapes as for `reroute_loss`."""
    squares = (tuned.float() - base.float()).square().sum(dim=-1)[:, mask]
    return (squares + 1e-12).sqrt().mean()  # the root has no slope at 0, where training starts


def _both(
    model: nn.Module, batch: Batch, layers: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states with and without the adapter, and which tokens count; all layers without `layers`."""
    tuned = _states(model, batch, layers)
    with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
        base = _states(model, batch, layers)
    return tuned, base, batch["attention_mask"][:, batch["prefix"].shape[1] :].bool()


def _states(model: nn.Module, batch: Batch, layers: Sequence[int] | None) -> torch.Tensor:
    cache = prefix_cache(model, batch["prefix"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    found = model(
        **inputs,
        **behind(cache, len(batch["input_ids"])),
        use_cache=cache is not None,
        output_hidden_states=True,
        logits_to_keep=1,
    ).hidden_states
    return torch.stack([found[layer] for layer in layers] if layers else list(found))
