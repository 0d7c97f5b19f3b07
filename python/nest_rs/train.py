"""Train the tied deltas with transformers' Trainer (paper section 3.5).

One training item is one optimizer step: harmful requests with refusals and as many harmless requests with the base's
own answers, all of like length, in one forward pass. Only the answers' logits are computed, and the base's own logits
come from hidden states kept when it answered.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from torch.utils.data import Dataset

from nest_rs.packing import ATTENTION, attention, is_packed, pack, rounded_up
from nest_rs.prefix import behind, prefix_cache, shared_prefix
from nest_rs.processes import share
from nest_rs.teacher import teacher_loss
from nest_rs.whiten import WhitenedAdamW

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
# Layers that mix tokens by attention alone.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# How far the logits of a packed row may differ: bfloat16 rounds, the more the deeper the model, so that what two of the
# library's own implementations differ by is allowed for.
_ALIKE, _NOISE = 0.05, 3.0


@dataclass(frozen=True)
class Example:
    """A request and the answer to learn, as token ids.

    Attributes:
        prompt: The request in its chat form.
        answer: What follows.
        states: The base's final hidden state before each answer token, [answer, d], where it is known.
        score: How harmful the teacher finds the request, in logits, where there is one.
    """

    prompt: list[int]
    answer: list[int]
    states: torch.Tensor | None = None
    score: float | None = None

    def opening(self) -> Example:
        """The same with the first token of its answer alone."""
        return replace(self, answer=self.answer[:1], states=None if self.states is None else self.states[:1])


# Tensors, and under `text` a batch of its own.
Batch = dict[str, Any]


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


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Steps(Dataset[Batch]):
    """The steps of a run: every harmful example once an epoch, each batch beside as many harmless examples.

    Harmless examples are drawn without replacement until all have been seen, then again: both classes weigh the same
    whatever their number. The order depends on the seed alone.
    """

    def __init__(
        self,
        harmful: Sequence[Example],
        benign: Sequence[Example],
        texts: Sequence[Example] = (),
        *,
        batch_size: int,
        steps: int,
        seed: int,
        pad: int,
    ) -> None:
        half = max(1, batch_size // 2)
        rng = random.Random(seed)
        self.pad = pad
        self.texts = texts
        self.prefix = shared_prefix([example.prompt for example in (*harmful, *benign)])
        refuse, keep = (list(islice(drawn(items, half, rng), steps)) for items in (harmful, benign))
        self.steps = [{"harmful": one, "benign": other} for one, other in zip(refuse, keep, strict=True)]

    def finer(self, count: int) -> Steps:
        """The same examples in the same order, each item cut into `count` of about one size."""
        cut = copy.copy(self)
        cut.steps = [
            {kind: items[len(items) * part // count : len(items) * (part + 1) // count] for kind, items in step.items()}
            for step in self.steps
            for part in range(count)
        ]
        return cut

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        examples = [*self.texts, *(item for step in self.steps for items in step.values() for item in items)]
        return max(len(example.prompt) + len(example.answer) for example in examples)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        """What `collate` makes of the step's examples, the harmful ones first; `refuse` [n] says which those are.

        `scores` [n] float32 are the teacher's, where all examples have one.

        `text` is another such batch, of one window of plain text, where there are any.
        """
        refuse, keep = self.steps[index]["harmful"], self.steps[index]["benign"]
        batch = collate([*refuse, *keep], self.pad, self.prefix)
        batch |= _kept(keep, len(refuse))
        scores = [example.score for example in (*refuse, *keep) if example.score is not None]
        if len(scores) == len(refuse) + len(keep):
            batch["scores"] = torch.tensor(scores)
        if self.texts:
            text = [self.texts[index % len(self.texts)]]
            batch["text"] = collate(text, self.pad) | _kept(text, 0)
        return batch


def _kept(keep: Sequence[Example], refused: int) -> Batch:
    """What `base_logits` needs to know of a batch: which rows keep the base's answers, and its states where known."""
    states = [example.states for example in keep if example.states is not None]
    known = {"states": torch.cat(states)} if len(states) == len(keep) else {}
    return {"refuse": torch.tensor([True] * refused + [False] * len(keep)), **known}


def _length(batch: Sequence[Example]) -> int:
    return max(len(example.prompt) for example in batch)


def drawn(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """All examples in random order, in batches of `size` (or of all there are), then again, without end.

    They are not sorted by length: packed rows have no padding to save, and a batch of long requests alone would be one
    of framed requests alone.
    """
    size = max(1, min(size, len(examples)))
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def answer_logits(model: torch.nn.Module, *batches: Batch) -> tuple[torch.Tensor, ...]:
    """The logits that predict the answers' tokens, of each batch [tokens, vocabulary], answer after answer.

    A model whose attention is `nest_rs.packing.ATTENTION` reads all batches in one pass, without their padding.
    """
    if not is_packed(model):
        return tuple(_padded_logits(model, batch) for batch in batches)
    row = pack(batches, next(model.parameters()).dtype)
    wanted = []
    for batch, slots in zip(batches, row.slots, strict=True):
        kept = batch["labels"] != IGNORED
        wanted.append(slots[:, -kept.shape[1] - 1 : -1][kept])  # a token is predicted one place before
    sizes = [len(places) for places in wanted]
    keep = rounded_up(torch.cat(wanted))
    logits: torch.Tensor = model(**row.inputs, use_cache=False, logits_to_keep=keep).logits[0]
    return torch.split(logits, [*sizes, len(keep) - sum(sizes)])[:-1]


def _padded_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    rows, answer = batch["labels"].shape
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    cache = prefix_cache(model, batch["prefix"])
    # The last kept logit predicts beyond the answer; one more is kept before it, at the end of the prompt.
    out = model(**inputs, **behind(cache, rows), use_cache=cache is not None, logits_to_keep=answer + 1)
    logits: torch.Tensor = out.logits[:, :-1][batch["labels"] != IGNORED]
    return logits


def by_class(
    logits: torch.Tensor, step: Batch
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A step's `answer_logits` and labels of the harmful requests, and those of the harmless ones behind them."""
    refused, kept = (step["labels"][rows] for rows in (step["refuse"], ~step["refuse"]))
    count = int((refused != IGNORED).sum())
    refusing, keeping = torch.split(logits, [count, len(logits) - count])
    return (refusing, refused), (keeping, kept)


def base_logits(
    model: PeftModel | PreTrainedModel, batch: Batch, reference: PreTrainedModel | None = None
) -> torch.Tensor:
    """The base's logits of the harmless answers' tokens, [tokens, vocabulary].

    Args:
        model: The model in training; without its adapter it is the base.
        batch: A step.
        reference: The base, where the model's own weights are trained and no adapter can be taken off.
    """
    if "states" in batch:
        base = model.get_base_model() if reference is None else reference
        logits: torch.Tensor = base.get_output_embeddings()(batch["states"])
        return logits
    benign = ~batch["refuse"]
    rows = {name: batch[name][benign] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    rows["prefix"] = batch["prefix"]
    if reference is not None:
        return answer_logits(reference, rows)[0]
    with model.disable_adapter():
        return answer_logits(model, rows)[0]


def openings_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits of each answer's first token, [n, vocabulary], of those of all its tokens."""
    lengths = (labels != IGNORED).sum(dim=1)
    return logits[lengths.cumsum(dim=0) - lengths]


def token_weights(labels: torch.Tensor, first: float) -> torch.Tensor:
    """How much each answer token counts, [n, answer] float32, in all 1.

    Args:
        labels: int64 [n, answer], padding -100.
        first: The share of the first tokens, on which it hangs whether an answer refuses; the others divide the rest.
            0 weighs every token alike (the ordinary language model loss).
    """
    kept = labels != IGNORED
    if not first:
        return kept / kept.sum()
    rest = kept.clone()
    rest[:, 0] = False
    weights = rest * ((1 - first) / rest.sum().clamp(min=1))
    weights[:, 0] = first / len(labels)
    return weights / weights.sum()  # where no answer has a second token


def sft_loss(logits: torch.Tensor, labels: torch.Tensor, first: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the answer tokens, float32, weighted by `token_weights`.

    Args:
        logits: [tokens, vocabulary], of the labels that are no padding.
        labels: int64 [n, answer], padding -100.
        first: See `token_weights`.
    """
    kept = labels != IGNORED
    losses = functional.cross_entropy(logits.float(), labels[kept], reduction="none")
    return losses @ token_weights(labels, first)[kept]


def kl_loss(logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, first: float = 0.0) -> torch.Tensor:
    """KL(base || tuned) of the answer tokens, float32, weighted alike: how far the tuned model leaves the base.

    Args:
        logits: The tuned model's of the answer tokens that are no padding, [tokens, vocabulary].
        base: The base's of the same.
        labels: int64 [n, answer], padding -100.
        first: See `token_weights`.
    """
    kept = labels != IGNORED
    tuned = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    wanted = functional.log_softmax(base, dim=-1, dtype=torch.float32)
    losses = functional.kl_div(tuned, wanted, log_target=True, reduction="none").sum(dim=-1)
    return losses @ token_weights(labels, first)[kept]


def margin_loss(logits: torch.Tensor, own: torch.Tensor, refusing: torch.Tensor) -> torch.Tensor:
    """How close harmless answers come to opening as a refusal: the logistic loss of the base's first token against it.

    A greedy answer follows the larger logit. Where the base's own distribution is wide, a refusal wins with a small
    share of the mass, which a divergence hardly sees; this sees it.

    Args:
        logits: Of the first answer tokens, [n, vocabulary].
        own: The base's own first tokens, int64 [n].
        refusing: Tokens with which refusals begin, int64 [r]; answers that begin so by themselves do not count.

    Returns:
        Mean of softplus(logsumexp(refusing logits) - own logit), float32; 0 where no answer counts.
    """
    counted = ~torch.isin(own, refusing)
    logits = logits[counted].float()
    gap = logits[:, refusing].logsumexp(dim=1) - logits.gather(1, own[counted, None])[:, 0]
    return functional.softplus(gap).sum() / counted.sum().clamp(min=1)


@contextmanager
def training_attention(model: PeftModel | PreTrainedModel, steps: Steps | None = None) -> Iterator[None]:
    """The attention that trains fastest: packed rows where a model reads `steps` right in them.

    Otherwise, on a processor, the plain one: the fused one is slower in the backward pass.
    """
    if steps is not None and _packs(model, steps):
        name = ATTENTION
    elif model.device.type == "cpu":
        name = "eager"
    else:
        name = model.config.get_text_config()._attn_implementation
    with attention(model, name):
        yield


def _packs(model: PeftModel | PreTrainedModel, steps: Steps) -> bool:
    """Whether a model gives the same logits for a packed row: layers that pass states along a row do not."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if not model._supports_attention_backend or kinds - _ATTENTION_LAYERS or (window and window < steps.longest):
        return False
    two = [items[0] for items in min(steps.steps, key=lambda step: sum(map(_length, step.values()))).values()]
    batch = on(collate(two, steps.pad, steps.prefix), model.device)

    def read(name: str) -> torch.Tensor:
        with torch.no_grad(), attention(model, name):
            return answer_logits(model, batch)[0].float()

    try:
        packed = read(ATTENTION)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # its layers want another layout
        return False
    eager, fused = read("eager"), read("sdpa" if model._supports_sdpa else "eager")
    allowed = max(_ALIKE * float(eager.norm()), _NOISE * float((fused - eager).norm()))
    return float((packed - eager).norm()) <= allowed


def train_deltas(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Steps,
    *,
    output_dir: str,
    learning_rate: float,
    tie_rate: float = 0.0,
    benign_loss: Literal["kl", "sft"],
    benign_weight: float,
    seed: int,
    accumulate: int = 1,
    first_weight: float = 0.0,
    margin_weight: float = 0.0,
    teacher_weight: float = 0.0,
    text_weight: float = 0.0,
    whitening: Mapping[str, torch.Tensor] | None = None,
    bf16: bool = False,
    reference: PreTrainedModel | None = None,
    save: bool = True,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Train the adapter, or whatever else of the model asks for gradients, in place.

    Args:
        model: A PEFT model, most often with a `NestConfig` adapter; or a plain one with a `reference`.
        tokenizer: Its tokenizer, for the padding token.
        steps: What to train on; each item is one step, or one of the parts of a step.
        output_dir: Where the trainer may write checkpoints.
        learning_rate: AdamW's peak rate (cosine to zero, 5 % warm-up).
        tie_rate: That of the ties, where they are learned.
        benign_loss: `kl` holds harmless answers to the base's distribution; `sft` is the paper's plain LM loss.
        benign_weight: Weight of the harmless term.
        seed: Seed of the trainer; the order of the data is the steps' own.
        accumulate: Parts (items) of a step; their gradients are averaged. The number of items is a multiple of it.
        first_weight: The first answer token's share of the loss; 0 weighs all tokens alike.
        margin_weight: Weight of `margin_loss`.
        teacher_weight: Weight of `teacher_loss`, where the examples have scores.
        text_weight: Weight of the divergence from the base on the steps' plain text.
        whitening: By module path, the A of `nest_rs.whiten`; without it AdamW steps in raw coordinates.
        bf16: Autocast to bfloat16 (a model already in bfloat16 needs none).
        reference: See `base_logits`.
        save: Write checkpoints.
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
        def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, **_: Any) -> torch.Tensor:
            texts = [inputs["text"]] if text_weight and "text" in inputs else []
            logits, *text_logits = answer_logits(model, inputs, *texts)
            with torch.no_grad():
                plain = self.accelerator.unwrap_model(model)
                base = base_logits(plain, inputs, reference) if benign_loss == "kl" else None
                text_bases = [base_logits(plain, text, reference) for text in texts]
            (refusing, refused), (keeping, kept) = by_class(logits, inputs)
            loss = sft_loss(refusing, refused, first_weight)
            if base is not None:
                loss = loss + benign_weight * kl_loss(keeping, base, kept, first_weight)
            else:
                loss = loss + benign_weight * sft_loss(keeping, kept, first_weight)
            refusals, openings = torch.unique(refused[:, 0]), openings_of(keeping, kept)
            if margin_weight:
                loss = loss + margin_weight * margin_loss(openings, kept[:, 0], refusals)
            if teacher_weight and "scores" in inputs:
                both = torch.cat([openings_of(refusing, refused), openings])
                loss = loss + teacher_weight * teacher_loss(both, inputs["scores"], refusals)
            for text, found, wanted in zip(texts, text_logits, text_bases, strict=True):
                loss = loss + text_weight * kl_loss(found, wanted, text["labels"])
            return loss

        def floating_point_ops(self, inputs: Batch) -> int:
            return 0  # the count, which nobody reads, takes longer than the optimizer's step

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            trained = {
                name: parameter
                for name, parameter in (self.model if model is None else model).named_parameters()
                if parameter.requires_grad
            }
            ties = [parameter for name, parameter in trained.items() if ".nest_tie." in name]
            if whitening is None and not ties:
                plain: torch.optim.Optimizer = super().create_optimizer(model)
                return plain
            deltas = {name: parameter for name, parameter in trained.items() if ".nest_tie." not in name}
            groups: list[dict[str, Any]] = [{"params": list(deltas.values())}, {"params": ties, "lr": tie_rate}]
            whitened = {}
            if whitening is not None:
                for name, delta in deltas.items():
                    whitened[delta] = next(a for module, a in whitening.items() if f".{module}.nest_" in f".{name}")
            optimizer = WhitenedAdamW(groups if ties else groups[:1], whitened, lr=learning_rate, weight_decay=0.0)
            self.optimizer = optimizer
            return optimizer

    count = len(steps) // accumulate
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=1,  # one item is one whole step, or a part of one
        gradient_accumulation_steps=accumulate // share()[1],  # each process takes its share of a step's parts
        max_steps=count,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, count // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        logging_steps=min(5, count),
        logging_nan_inf_filter=False,
        save_strategy="steps" if save else "no",
        save_steps=max(1, count // 4),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
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
    # The losses are means: parts are averaged, not summed for a division by tokens that the model would do.
    trainer.model_accepts_loss_kwargs = False
    # Our own bar shows the progress; the trainer's printer would put dictionaries on stdout.
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    with training_attention(model, steps):
        trainer.train(resume_from_checkpoint=resume or None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]
