"""Plain fine-tuning on given answers: what a user does with a model, or an attacker."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nest_rs.models import pick_dtype
from nest_rs.prefix import shared_prefix
from nest_rs.progress import track
from nest_rs.train import Example, answer_logits, collate, drawn, on, sft_loss, training_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fine_tune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    pad: int,
    label: str,
) -> None:
    """Fit the answers with what of the model asks for gradients, in place: AdamW, the rate falling linearly to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches = drawn(examples, batch_size, random.Random(seed))
    prefix = shared_prefix([item.prompt for item in examples])
    device = model.device
    torch.manual_seed(seed)
    mixed = model.dtype == torch.float32 and pick_dtype("auto", device) == torch.bfloat16
    model.train()
    with track(label, total=steps, unit="steps") as advance, training_attention(model):
        for _ in range(steps):
            batch = on(collate(next(batches), pad, prefix), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = sft_loss(answer_logits(model, batch)[0], batch["labels"])
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
            advance(1)
    model.eval()
