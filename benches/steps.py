"""Training steps side by side: NeST by `train_deltas`; LoRA, full fine-tuning and the frozen model by plain loops."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from nest_rs import NestConfig
from nest_rs.sites import Site
from nest_rs.train import Batch, Example, Steps, answer_logits, by_class, kl_loss, on, sft_loss, train_deltas


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator still works on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synthetic(count: int, prompt: int, answer: int, *, vocab: int, width: int, dtype: torch.dtype) -> list[Example]:
    """Random requests behind a shared opening of a quarter of their length, with the base's hidden states."""
    rng = random.Random(0)
    opening = rng.choices(range(3, vocab), k=prompt // 4)
    return [
        Example(
            opening + rng.choices(range(3, vocab), k=prompt - len(opening)),
            rng.choices(range(3, vocab), k=answer),
            torch.randn(answer, width, dtype=dtype),
        )
        for _ in range(count)
    ]


def with_nest(model: Any, sites: Sequence[Site], rows: int = 100, clusters: int = 2) -> Any:
    """A NeST adapter on random rows of each site: by default as many as a default run of SmolLM2 selects."""
    rng = random.Random(0)
    neurons = {
        site.module: {
            "rows": sorted(rng.sample(range(site.d_out), min(rows, site.d_out))),
            "cluster": [number % clusters for number in range(min(rows, site.d_out))],
        }
        for site in sites
    }
    return get_peft_model(model, NestConfig(neurons=neurons, learn_ties=True, task_type="CAUSAL_LM"))


def with_lora(model: Any, sites: Sequence[Site], rank: int = 8) -> Any:
    """A LoRA adapter on the same sites, in the model's own dtype: in float32, PEFT's default, it is slower."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[site.module for site in sites], task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def tokens_of(batch: Batch) -> int:
    """Tokens that a step has to read: every request's own, and the shared opening once."""
    return int(batch["attention_mask"].sum()) - batch["prefix"].numel() * (len(batch["input_ids"]) - 1)


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    (logits,) = answer_logits(model, batch)
    with torch.no_grad():
        base = model.get_output_embeddings()(batch["states"])
    refused, (keeping, kept) = by_class(logits, batch)
    return sft_loss(*refused) + kl_loss(keeping, base, kept)


def plain_step(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """Forward, backward and an optimizer step of whatever the model trains; the same loss as NeST's."""

    def step(batch: Batch) -> None:
        _loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def frozen_step(model: Any, layer: int) -> Callable[[Batch], None]:
    """The bound: the frozen model's forward, and its backward down to the input of a layer, without a parameter."""

    def enter(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].detach().requires_grad_(torch.is_grad_enabled()), *inputs[1:])

    layers = model.get_decoder().layers

    def step(batch: Batch) -> None:
        handle = layers[layer].register_forward_pre_hook(enter)
        try:
            _loss(model, batch).backward()
        finally:
            handle.remove()

    return step


def race(
    model: Any, steps: Steps, others: dict[str, Callable[[Batch], None]], *, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Train NeST through `train_deltas`, and after each of its steps let the others take the same one.

    Returns:
        By name: median seconds a step, and tokens a second.
    """
    device = model.device
    # Products are prepared for each new shape, and NeST is the first to take a step.
    for item in range(len(steps)):
        for step in others.values():
            step(on(steps[item], device))
    seconds: dict[str, list[float]] = {name: [] for name in ("nest", *others)}
    number, resumed = 0, time.perf_counter()

    def lap(_: int) -> None:
        nonlocal number, resumed
        synchronize(device)
        seconds["nest"].append(time.perf_counter() - resumed)
        batch = on(steps[number], device)
        for name, step in others.items():
            seconds[name].append(timed(lambda step=step, batch=batch: step(batch), device))
        number += 1
        resumed = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        train_deltas(
            model,
            None,  # type: ignore[arg-type]  # only to be saved beside checkpoints
            steps,
            output_dir=folder,
            learning_rate=1e-3,
            tie_rate=0.1,
            benign_loss="kl",
            benign_weight=1.0,
            seed=0,
            save=False,  # a run saves four times; of so few steps each would be followed by a checkpoint
            progress=lap,
        )
    tokens = statistics.mean(tokens_of(steps[i]) for i in range(warm_up, len(steps)))
    medians = {name: statistics.median(laps[warm_up:]) for name, laps in seconds.items()}
    return {name: {"seconds": round(value, 4), "tokens/s": round(tokens / value, 1)} for name, value in medians.items()}
