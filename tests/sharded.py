"""Three steps on two processes, the model sharded by FSDP2; prints the first process's losses and deltas as JSON.

Run by torchrun from `test_processes.py`, or alone for the unsharded model: `python sharded.py MODEL`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from nest_rs import NestConfig
from nest_rs.models import load_model
from nest_rs.sites import find_sites
from nest_rs.train import IGNORED, Example, Steps, sft_loss
from nest_rs.whiten import WhitenedAdamW

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    base = load_model(Path(sys.argv[1]), device=torch.device("cpu"), dtype=torch.float32)
    width = base.config.hidden_size
    neurons = {site.module: {"rows": list(range(0, 40, 2)), "cluster": [0, 1] * 10} for site in find_sites(base)}
    model = get_peft_model(base, NestConfig(neurons=neurons, task_type="CAUSAL_LM"))
    if WORLD > 1:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(isinstance(parameter, DTensor) == (WORLD > 1) for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    root = torch.eye(width) + 0.01 * torch.randn(width, width, generator=generator)
    optimizer = WhitenedAdamW(deltas, dict.fromkeys(deltas, root @ root.T), lr=1e-3, weight_decay=0.0)
    rng = random.Random(0)
    examples = [Example([1, *rng.choices(range(30, 90), k=6)], rng.choices(range(30, 90), k=4)) for _ in range(32)]
    steps = Steps(examples[:16], examples[16:], batch_size=8, steps=2, seed=0, pad=0)
    losses = []
    for _ in range(3):
        shown = 0.0
        for part in range(RANK, 2, WORLD):
            batch = steps[part]
            whole_rows = torch.cat([batch["prefix"].expand(len(batch["input_ids"]), -1), batch["input_ids"]], dim=1)
            answer = batch["labels"].shape[1]
            logits = model(whole_rows, attention_mask=batch["attention_mask"], logits_to_keep=answer + 1).logits[:, :-1]
            loss = sft_loss(logits[batch["labels"] != IGNORED], batch["labels"]) * WORLD / 2
            loss.backward()
            shown += loss.item() / WORLD
        total = torch.tensor(shown)
        if WORLD > 1:
            distributed.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    found = [whole(delta.detach()).tolist() for delta in deltas]
    if RANK == 0:
        print(json.dumps({"losses": losses, "deltas": found}))
    if WORLD > 1:
        distributed.destroy_process_group()


main()
