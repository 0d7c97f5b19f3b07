"""Requests to probe, train and evaluate on, and the chat form a model reads them in.

The embedded set holds requests only: harmful ones, ordinary ones, and twins (harmless requests that look like harmful
ones). It is split by topic, so that no subject stands on both sides of a split.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from nest_rs.errors import NestError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Kind = Literal["harmful", "twin", "benign"]
Split = Literal["train", "validation", "test"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        id: Unique in its file.
        prompt: The request as a user would type it.
        kind: `harmful`, `twin` (harmless, but looks harmful) or `benign` (ordinary).
        category: A harm category or a kind of task; may be empty.
        topic: The subject; all prompts of a topic share a split.
        split: `train`, `validation` or `test`.
        response: A given answer, or None (benign targets are then the base's own answers).
    """

    id: str
    prompt: str
    kind: Kind
    category: str
    topic: str
    split: Split
    response: str | None = None


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str


@dataclass(frozen=True)
class Request:
    """A request that is more than one message of a user.

    Attributes:
        messages: The conversation; the last turn is the user's.
        goal: What the user is after, in plain words: what a judge reads.
        prefill: The opening of the answer that is put into the model's mouth.
    """

    messages: tuple[Message, ...]
    goal: str
    prefill: str = ""

    @classmethod
    def of(cls, asked: str | Request) -> Request:
        """A plain request as a conversation of one message."""
        return asked if isinstance(asked, Request) else cls(({"role": "user", "content": asked},), asked)

    @property
    def prompt(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, one object a line; blank lines are skipped.

    Raises:
        NestError: the file is missing, empty, or a line is not a JSON object.
    """
    if not path.is_file():
        raise NestError(f"no such prompt file: `{path}`", mend="give a .jsonl file with a `prompt` in each line")
    try:
        # Not splitlines: it also cuts at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise NestError(f"`{path}` is not UTF-8 ({error})", mend="save it as UTF-8") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise NestError(
                f"line {number} of `{path}` is not JSON: `{line[:60]}`", mend="one object a line"
            ) from error
        if not isinstance(row, dict):
            raise NestError(f"line {number} of `{path}` is not a JSON object: `{line[:60]}`", mend="one object a line")
        rows.append(row)
    if not rows:
        raise NestError(f"the prompt file `{path}` is empty", mend="give one JSON object a line")
    return rows


def text_field(row: dict[str, Any], name: str, path: Path, number: int) -> str:
    """A non-empty string field of row `number` (from 1), or a clear error."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise NestError(f"row {number} of `{path}` has no `{name}`", mend="it must be a non-empty string")
    return value


def embedded_prompts() -> list[Prompt]:
    """The project's own set (7,679 requests, written for it)."""
    text = files("nest_rs").joinpath("data/prompts.jsonl").read_text(encoding="utf-8")
    return [Prompt(**json.loads(line)) for line in text.splitlines()]


def refusals() -> list[str]:
    """The refusal texts used as targets for harmful requests."""
    text = files("nest_rs").joinpath("data/refusals.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def load_prompts(path: Path | None) -> list[Prompt]:
    """Load a prompt set: the embedded one, or a JSON lines file.

    A file needs `prompt` and `kind` in each line; `id`, `category`, `topic`, `split` and `response` are optional. A row
    without a split gets one by the hash of its topic (or, without a topic, of its prompt): 80 / 10 / 10 %.

    Raises:
        NestError: see `read_jsonl`; also an unknown kind or split, or one kind missing from the training split.
    """
    if path is None:
        return embedded_prompts()
    prompts = []
    for number, row in enumerate(read_jsonl(path), start=1):
        prompt = text_field(row, "prompt", path, number)
        kind = text_field(row, "kind", path, number)
        if kind not in get_args(Kind):
            raise NestError(f"row {number} of `{path}` has the kind `{kind}`", mend=f"use {listed(get_args(Kind))}")
        topic = str(row.get("topic") or prompt)
        split = str(row.get("split") or _split_of(topic))
        if split not in get_args(Split):
            raise NestError(f"row {number} of `{path}` has the split `{split}`", mend=f"use {listed(get_args(Split))}")
        identity = str(row.get("id") or f"{path.stem}-{number}")
        prompts.append(
            Prompt(identity, prompt, kind, str(row.get("category") or ""), topic, split, row.get("response"))  # type: ignore[arg-type]
        )
    trained = {item.kind == "harmful" for item in prompts if item.split == "train"}
    for harmful, name in ((True, "harmful"), (False, "benign")):
        if harmful not in trained:
            raise NestError(
                f"no {name} prompts to train on in `{path}`", mend="both classes are needed to tell them apart"
            )
    return prompts


def _split_of(topic: str) -> Split:
    part = hashlib.sha256(topic.encode()).digest()[0] / 256
    return "train" if part < 0.8 else "validation" if part < 0.9 else "test"


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """A hash of the set's content and order, for manifests."""
    digest = hashlib.sha256()
    for item in prompts:
        digest.update(json.dumps([item.prompt, item.kind, item.split, item.response]).encode())
    return digest.hexdigest()


def render(tokenizer: PreTrainedTokenizerBase, asked: str | Request) -> str:
    """The chat text up to where the model's answer goes on. A thinking model is asked to answer directly."""
    request = Request.of(asked)
    text = tokenizer.apply_chat_template(
        list(request.messages), add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    return f"{text}{request.prefill}"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts (the chat template has already placed the special tokens)."""
    if not texts:
        return []  # a tokenizer cannot say so
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, asked: Sequence[str | Request]) -> list[list[int]]:
    """Token ids of requests in their chat form, up to where the model's answer goes on."""
    return encode(tokenizer, [render(tokenizer, one) for one in asked])


def fitting(ids: Sequence[list[int]], names: Sequence[str], room: int) -> list[int]:
    """Indices of the prompts that leave the answer its room in the context; warns once of those that do not.

    Raises:
        NestError: not one fits.
    """
    kept = [index for index, row in enumerate(ids) if len(row) <= room]
    if len(kept) < len(ids):
        long = [names[index] for index, row in enumerate(ids) if len(row) > room]
        message = f"left out {len(long)} prompts longer than the context of {room} tokens: {listed(long)}"
        if not kept:
            raise NestError(message, mend="shorten them, or use a model with a longer context")
        log.warning(message)
    return kept
