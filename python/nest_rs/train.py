"""Train the tied deltas with transformers' Trainer (paper section 3.5).

One training item is one optimizer step: a batch of harmful requests with refusals and a batch of harmless requests with
the base's own answers, each sorted by length so that little is spent on padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from torch.utils.data import Dataset

from nest_rs.prefix import prefix_cache, repeated, shared_prefix

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A request and the answer to learn, as token ids."""

    prompt: list[int]
    answer: list[int]


Batch = dict[str, torch.Tensor]


def collate(examples: Sequence[Example], pad: int, prefix: Sequence[int] = ()) -> Batch:
    """Pad prompts on the left and answers on the right, behind the prefix that all prompts share.

    All answers then start in one column, so `logits_to_keep` can skip the prompt for any model that knows it.

    Returns:
        `prefix` [1, p]; `input_ids` and `position_ids` [n, rest of prompt + answer]; `attention_mask` [n, p + rest of
        prompt + answer]; `labels` [n, answer] int64, padded labels being -100.
    """
    shared = len(prefix)
    left = max(len(example.prompt) for example in examples) - shared
    right = max(len(example.answer) for example in examples)
    ids = torch.full((len(examples), left + right), pad)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens = example.prompt[shared:] + example.answer
        start = left - len(example.prompt) + shared
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
    return {
        "prefix": torch.tensor([list(prefix)], dtype=torch.long),
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones(len(examples), shared, dtype=torch.long), mask], dim=1),
        "position_ids": (shared + mask.cumsum(1) - 1).clamp(min=0),
        "labels": ids[:, left:].masked_fill(mask[:, left:] == 0, IGNORED),
    }


class Steps(Dataset[dict[str, Batch]]):
    """The steps of a run: every harmful example once an epoch, each batch beside as many harmless examples.

    Harmless examples are drawn without replacement until all have been seen, then again: both classes weigh the same
    whatever their number. The order depends on the seed alone.
    """

    def __init__(
        self, harmful: Sequence[Example], benign: Sequence[Example], *, batch_size: int, steps: int, seed: int, pad: int
    ) -> None:
        half = max(1, batch_size // 2)
        rng = random.Random(seed)
        self.pad = pad
        self.prefix = shared_prefix([example.prompt for example in (*harmful, *benign)])
        pairs = zip(_batches(harmful, half, steps, rng), _batches(benign, half, steps, rng), strict=True)
        self.steps = [{"harmful": refuse, "benign": keep} for refuse, keep in pairs]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> dict[str, Batch]:
        return {kind: collate(examples, self.pad, self.prefix) for kind, examples in self.steps[index].items()}


def _batches(examples: Sequence[Example], size: int, count: int, rng: random.Random) -> list[list[Example]]:
    """`count` batches of like length, in random order, from as many shuffled epochs as that takes."""
    batches: list[list[Example]] = []
    size = min(size, len(examples))
    while len(batches) < count:
        order = sorted(rng.sample(examples, len(examples)), key=lambda item: len(item.prompt) + len(item.answer))
        # The incomplete batch is a random one, so that the longest examples are not always the ones left over.
        start = rng.randrange(len(order) % size + 1)
        epoch = [list(order[i : i + size]) for i in range(start, len(order) - size + 1, size)]
        rng.shuffle(epoch)
        batches.extend(epoch)
    return batches[:count]


def answer_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The logits that predict the answer tokens, [n, answer, vocabulary]."""
    rows, answer = batch["labels"].shape
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    cache = repeated(prefix_cache(model, batch["prefix"]), rows)
    # The last kept logit predicts beyond the answer; one more is kept before it, at the end of the prompt.
    out = model(**inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=answer + 1)
    logits: torch.Tensor = out.logits[:, :-1]
    return logits


def sft_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens, float32."""
    kept = labels != IGNORED
    return functional.cross_entropy(logits[kept].float(), labels[kept])


def kl_loss(logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean KL(base || tuned) over the answer tokens, float32: how far the tuned model leaves the base's own answer."""
    kept = labels != IGNORED
    tuned = functional.log_softmax(logits[kept].float(), dim=-1)
    wanted = functional.log_softmax(base[kept].float(), dim=-1)
    return functional.kl_div(tuned, wanted, log_target=True, reduction="batchmean")


def train_deltas(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Steps,
    *,
    output_dir: str,
    learning_rate: float,
    benign_loss: Literal["kl", "sft"],
    benign_weight: float,
    seed: int,
    bf16: bool = False,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Train the adapter in place.

    Args:
        model: A PEFT model with a `NestConfig` adapter.
        tokenizer: Its tokenizer, for the padding token.
        steps: What to train on, a step an item.
        output_dir: Where the trainer may write checkpoints.
        learning_rate: AdamW's peak rate (cosine to zero, 5 % warm-up).
        benign_loss: `kl` holds harmless answers to the base's distribution; `sft` is the paper's plain LM loss.
        benign_weight: Weight of the harmless term.
        seed: Seed of the trainer; the order of the data is the steps' own.
        bf16: Autocast to bfloat16 (a model already in bfloat16 needs none).
        resume: Go on from the last checkpoint in `output_dir`.
        progress: Called with 1 after each step.

    Returns:
        The trainer's log: loss terms by step.
    """
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Tick(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            progress(1)

    class NestTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: dict[str, Batch], return_outputs: bool = False, **_: Any
        ) -> torch.Tensor:
            refuse = sft_loss(answer_logits(model, inputs["harmful"]), inputs["harmful"]["labels"])
            benign = inputs["benign"]
            if benign_loss == "kl":
                adapter = self.accelerator.unwrap_model(model)
                with torch.no_grad(), adapter.disable_adapter():
                    base = answer_logits(model, benign)
                keep = kl_loss(answer_logits(model, benign), base, benign["labels"])
            else:
                keep = sft_loss(answer_logits(model, benign), benign["labels"])
            return refuse + benign_weight * keep

    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=1,  # one item is one whole step
        max_steps=len(steps),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, len(steps) // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        logging_steps=min(5, len(steps)),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, len(steps) // 4),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        label_names=[],
    )
    trainer = NestTrainer(
        model=model,
        args=arguments,
        train_dataset=steps,
        data_collator=lambda items: items[0],
        callbacks=[Tick()],
        processing_class=tokenizer,
    )
    # Our own bar shows the progress; the trainer's printer would put dictionaries on stdout.
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]
