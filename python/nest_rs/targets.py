"""What the model learns to answer: refusals to harmful requests, its own words to all others."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from nest_rs.config import TuneConfig
from nest_rs.errors import NestError
from nest_rs.evaluate.generate import Answer, decode
from nest_rs.evaluate.judge import is_apology, is_refusal
from nest_rs.files import replacing
from nest_rs.framing import in_framings
from nest_rs.models import Base, cache_dir, head_makes_logits
from nest_rs.processes import is_main, share, wait
from nest_rs.prompts import Prompt, chat_ids, encode, fitting, refusals
from nest_rs.teacher import harm_scores
from nest_rs.train import Example, Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Tokens of a window of plain text, how many windows at most, and how many are read together.
_WINDOW = 96
_WINDOWS = 128
_TOGETHER = 16


@dataclass(frozen=True)
class TrainingData:
    """What a model is to learn.

    Attributes:
        harmful: Harmful requests with refusals.
        benign: Harmless requests with helpful answers.
        decisions: Requests in their chat form, and whether to refuse them: as many of each class.
        steps: Both, in the steps of a run (or the parts of them).
        count: The number of optimizer steps.
    """

    harmful: list[Example]
    benign: list[Example]
    decisions: list[tuple[list[int], bool]]
    steps: Steps
    count: int

    @property
    def parts(self) -> int:
        """The parts that a step is computed in."""
        return len(self.steps) // self.count

    def shortened(self, share: float) -> TrainingData:
        """The first steps alone, as for a trial."""
        count = max(1, round(share * self.count))
        steps = copy.copy(self.steps)
        steps.steps = self.steps.steps[: count * self.parts]
        return replace(self, steps=steps, count=count)

    @property
    def pairs(self) -> int:
        """Requests that each part has at least of each class."""
        return min(len(items) for part in self.steps.steps for items in part.values())

    def finer(self, pairs: int) -> TrainingData:
        """The same steps, computed in more parts of about `pairs` requests of each class."""
        return replace(self, steps=self.steps.finer(math.ceil(self.pairs / pairs)))


def training_data(
    config: TuneConfig,
    base: Base,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
) -> TrainingData:
    """The examples and steps that a configuration asks for; the base answers harmless requests without a response."""
    train = [item for item in prompts if item.split == "train"]
    room = int(model.config.get_text_config().max_position_embeddings) - config.answer_tokens
    framed = framed_requests(config, tokenizer, train, room=room)
    refused = [item for item in framed if item.kind == "harmful"]
    half = config.batch_size // 2
    count = math.ceil(config.epochs * len(refused) / half)
    harmless = [item for item in framed if item.kind != "harmful"]
    if not refused or not harmless:
        kind = "harmless" if refused else "harmful"
        message = f"not one {kind} request leaves room for an answer in the context: `{room}` tokens at most"
        raise NestError(message, mend="shorten them, or use a model with a longer context")
    chosen = choose_benign(harmless, count * half, config.twin_share, config.seed)
    scores: dict[str, float] = {}
    if config.teacher_weight:
        drawn = {item.id for item in (*refused, *chosen)}
        scores = scored(
            model,
            tokenizer,
            [item for item in train if item.id in drawn],  # the teacher reads what is asked, bare
            bias=config.refusal_bias,
            threads=config.threads,
        )
    whole = learned_whole([*refused, *chosen], config.answer_share, config.seed)
    refusing = refusal_examples(tokenizer, refused, scores, seed=config.seed)
    harmful = [
        example if item.id in whole else example.opening() for item, example in zip(refused, refusing, strict=True)
    ]
    answers = helpful_answers(config, base, model, tokenizer, chosen, whole)
    benign = helpful_examples(tokenizer, chosen, answers, scores, max_tokens=config.answer_tokens)
    texts = plain_texts(model, tokenizer, train, config.seed) if config.text_weight else []
    parts = math.lcm(config.accumulate, share()[1])  # every process has as many
    steps = Steps(
        harmful,
        benign,
        texts,
        batch_size=config.batch_size // parts,
        steps=count * parts,
        seed=config.seed,
        pad=tokenizer.pad_token_id,
    )
    return TrainingData(harmful, benign, decisions(config, tokenizer, refused, harmless), steps, count)


def learned_whole(prompts: Sequence[Prompt], share: float, seed: int) -> set[str]:
    """The ids of the requests, drawn at random, whose answers are learned whole.

    Of the others the opening is, on which it hangs whether an answer refuses: reading a request costs less than its
    answer does, and more requests teach more than more words of the same few refusals.
    """
    return {item.id for item in random.Random(seed).sample(prompts, round(share * len(prompts)))}


def framed_requests(
    config: TuneConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, room: int
) -> list[Prompt]:
    """The requests of at most `room` tokens, a share of them in a framing; bare where they would be longer in it.

    Raises:
        NestError: not one fits.
    """
    asked = chat_ids(tokenizer, [item.prompt for item in prompts])
    bare = [prompts[index] for index in fitting(asked, [item.id for item in prompts], room)]
    framed = in_framings(bare, config.frame_share, config.seed)
    asked = chat_ids(tokenizer, [item.prompt for item in framed])
    return [new if len(ids) <= room else old for old, new, ids in zip(bare, framed, asked, strict=True)]


def decisions(
    config: TuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
) -> list[tuple[list[int], bool]]:
    """Requests drawn for the last step, half of them harmful, and whether to refuse them."""
    kept = choose_benign(harmless, config.newton_requests // 2, config.twin_share, config.seed)
    refused = random.Random(config.seed).sample(harmful, min(len(harmful), len(kept)))
    drawn = [*refused, *kept]
    asked = chat_ids(tokenizer, [item.prompt for item in drawn])
    return [(ids, index < len(refused)) for index, ids in enumerate(asked)]


def scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    bias: float = 0.0,
    threads: int | None = None,
) -> dict[str, float]:
    """The teacher's score of each request, by id, with `bias` logits on top of it."""
    asked = chat_ids(tokenizer, [item.prompt for item in prompts])
    sides = [item.kind == "harmful" for item in prompts]
    scores = harm_scores(model, asked, sides, pad=tokenizer.pad_token_id, threads=threads)
    return {item.id: score + bias for item, score in zip(prompts, scores.tolist(), strict=True)}


def plain_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], seed: int
) -> list[Example]:
    """Windows of running text on which the tuned model should predict what the base predicts: outside of a chat.

    The text is the training requests of all kinds, in random order, without chat markup. Each window is an example that
    answers its first token with all others; it carries the base's states, unless the base's logits are more than its
    head makes of them.
    """
    texts = [item.prompt for item in prompts]
    random.Random(seed).shuffle(texts)
    ids = encode(tokenizer, ["\n\n".join(texts)])[0]
    width = min(_WINDOW, len(ids))
    windows = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)][:_WINDOWS]
    if not head_makes_logits(model):
        return [Example(window[:1], window[1:]) for window in windows]
    examples = []
    with torch.no_grad():
        for start in range(0, len(windows), _TOGETHER):
            batch = windows[start : start + _TOGETHER]
            tokens = torch.tensor(batch, device=model.device)
            states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].cpu()
            examples += [
                Example(window[:1], window[1:], read.clone()) for window, read in zip(batch, states, strict=True)
            ]
    return examples


def helpful_answers(
    config: TuneConfig,
    base: Base,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    whole: Collection[str],
) -> list[Answer | None]:
    """What is to be answered to harmless requests, the given response or the base's own answer: its first token alone
    where the request is not among the `whole` ones."""
    answers: dict[str, Answer | None] = {}
    for tokens, items in (
        (config.answer_tokens, [item for item in prompts if item.id in whole]),
        (1, [item for item in prompts if item.id not in whole]),
    ):
        told = [item for item in items if item.response is not None]
        given = given_answers(tokenizer, [str(item.response) for item in told], max_tokens=tokens)
        asked = [item for item in items if item.response is None]
        own = own_answers(base, model, tokenizer, asked, max_new_tokens=tokens, batch_size=config.eval_batch_size)
        answers |= zip((item.id for item in (*told, *asked)), (*given, *own), strict=True)
    return [answers[item.id] for item in prompts]


def own_answers(
    base: Base,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer | None]:
    """The base's greedy answers, from the cache where the same base has answered the same prompts before.

    Each carries the hidden states it was read from, unless the base's logits are more than its head makes of them.
    """
    if not prompts:
        return []
    key = hashlib.sha256(
        "\0".join(
            [base.fingerprint(), str(model.dtype), str(max_new_tokens), *(item.prompt for item in prompts)]
        ).encode()
    ).hexdigest()
    path = cache_dir() / "answers" / f"{key[:32]}.safetensors"
    if is_main() and not path.is_file():
        answers = decode(
            model,
            tokenizer,
            [item.prompt for item in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            label="base answers",
            states=head_makes_logits(model),
        )
        _write_answers(answers, path)
    wait()
    return _read_answers(path)


def _write_answers(answers: Sequence[Answer | None], path: Path) -> None:
    """One row an answered token, the answers one behind the other; a prompt that was not answered has -1 tokens."""
    told = [answer for answer in answers if answer is not None]
    tensors = {
        "lengths": torch.tensor([-1 if answer is None else len(answer.tokens) for answer in answers]),
        "tokens": torch.tensor([token for answer in told for token in answer.tokens], dtype=torch.int32),
    }
    states = [answer.states for answer in told if answer.states is not None]
    if states:
        tensors["states"] = torch.cat(states)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        save_file(tensors, scratch)


def _read_answers(path: Path) -> list[Answer | None]:
    tensors = load_file(path)
    answers: list[Answer | None] = []
    start = 0
    for length in tensors["lengths"].tolist():
        if length < 0:
            answers.append(None)
            continue
        rows = slice(start, start + length)
        states = tensors["states"][rows] if "states" in tensors else None
        answers.append(Answer(tensors["tokens"][rows].tolist(), states))
        start += length
    return answers


def choose_benign(prompts: Sequence[Prompt], count: int, twin_share: float, seed: int) -> list[Prompt]:
    """Pick harmless training requests: `twin_share` of them twins as far as there are enough, the rest ordinary."""
    rng = random.Random(seed)
    ordinary = [item for item in prompts if item.kind == "benign"]
    twins = [item for item in prompts if item.kind == "twin"]
    wanted = min(len(twins), round(count * twin_share))
    chosen = rng.sample(twins, wanted) + rng.sample(ordinary, min(len(ordinary), count - wanted))
    return sorted(chosen, key=lambda item: item.id)


def refusal_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    scores: Mapping[str, float] = MappingProxyType({}),
    *,
    seed: int,
) -> list[Example]:
    """Harmful requests, each with its own response or one of the refusal texts, and with its score if there is one."""
    rng = random.Random(seed)
    texts = refusals()
    asked = chat_ids(tokenizer, [item.prompt for item in prompts])
    told = encode(tokenizer, [item.response or rng.choice(texts) for item in prompts])
    return [
        Example(ids, [*answer, tokenizer.eos_token_id], score=scores.get(item.id))
        for item, ids, answer in zip(prompts, asked, told, strict=True)
    ]


def helpful_examples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer | None],
    scores: Mapping[str, float] = MappingProxyType({}),
    *,
    max_tokens: int,
) -> list[Example]:
    """Harmless requests with helpful answers, and with their scores if there are any.

    Those to which the base itself refused or apologised are left out.
    """
    texts = [
        "" if answer is None else tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        for answer in answers
    ]
    kept = [i for i, text in enumerate(texts) if text and not is_refusal(text) and not is_apology(text)]
    log.info("%d of %d harmless requests have a helpful answer of the base", len(kept), len(prompts))
    if not kept:
        raise NestError("the base refuses every harmless request", mend="give prompts with a `response` of their own")
    chosen = [(prompts[i], answer) for i in kept if (answer := answers[i]) is not None]
    asked = chat_ids(tokenizer, [item.prompt for item, _ in chosen])
    return [
        Example(
            ids,
            answer.tokens[:max_tokens],
            None if answer.states is None else answer.states[:max_tokens],
            scores.get(item.id),
        )
        for (item, answer), ids in zip(chosen, asked, strict=True)
    ]


def given_answers(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], *, max_tokens: int | None = None
) -> list[Answer]:
    """Answers that came with the prompts."""
    return [Answer(tokens[:max_tokens]) for tokens in encode(tokenizer, responses)]
