"""Named sets of requests to judge a model on: the embedded ones, local files, and the public ones of the hub.

A suite's kind says what a refusal in it means. It is the embedded set's, the hub table's, or a file's: the `kind`
column where all rows agree (`twin` counts as benign), else a word in its name (harmful, unsafe, toxic, attack; benign,
harmless, safe), else a hub suite that the name starts with (`harmbench_test.jsonl` is harmful as `harmbench` is).
Attack success is counted on harmful suites, over-refusal on benign ones; a suite without a kind counts for neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nest_rs.errors import NestError, listed
from nest_rs.evaluate.hub import HUB_SUITES, fetch
from nest_rs.prompts import Request, embedded_prompts, read_jsonl, text_field

SuiteKind = Literal["harmful", "benign"]

# The embedded set's parts that no training sees. Name -> (kind, split).
_EMBEDDED = {
    f"nest-{kind}" + ("" if split == "test" else f"-{split}"): (kind, split)
    for split in ("test", "validation")
    for kind in ("harmful", "benign", "twin")
}
BUILTIN_SUITES = ("nest-harmful", "nest-benign", "nest-twin")
# Longer words first: "unsafe" holds "safe", "harmless" is not harmful.
_WORDS: dict[str, SuiteKind] = {
    "harmless": "benign",
    "unsafe": "harmful",
    "benign": "benign",
    "safe": "benign",
    "harmful": "harmful",
    "toxic": "harmful",
    "attack": "harmful",
}


@dataclass(frozen=True)
class Suite:
    """Requests judged together.

    Attributes:
        name: Unique among the suites of an evaluation.
        ids: One a request.
        prompts: What the model is sent: a user's message, or a `Request` where that is not all.
        kind: What its requests are; None if unknown.
        attack: What they are wrapped in; None if nothing.
        groups: What each belongs to, empty where unknown: its category, or in an attack of several rows the row.
    """

    name: str
    ids: list[str]
    prompts: list[str | Request]
    kind: SuiteKind | None = None
    attack: str | None = None
    groups: list[str] = field(default_factory=list)


def load_suite(source: str, limit: int | None = None) -> Suite:
    """A suite by name or from a .jsonl file (`prompt`; `id`, `kind`, `category`, and `goal` in plain words, if any).

    Names are `nest-harmful`, `nest-benign`, `nest-twin`, each also `-validation`, and the keys of `HUB_SUITES`.

    Raises:
        NestError: an unknown name, a missing file, a row without `prompt`, or a hub suite that cannot be had.
    """
    kind: SuiteKind | None
    rows: Sequence[tuple[str, str | Request]]
    groups: list[str] = []
    if source in _EMBEDDED:
        part, split = _EMBEDDED[source]
        held_out = [item for item in embedded_prompts() if (item.kind, item.split) == (part, split)]
        rows = [(item.id, item.prompt) for item in held_out]
        groups = [item.category for item in held_out]
        name, kind = source, "harmful" if part == "harmful" else "benign"
    elif source in HUB_SUITES:
        rows = fetch(source)
        name, kind = source, HUB_SUITES[source].kind
    else:
        path = Path(source)
        if path.suffix != ".jsonl":
            known = listed([*_EMBEDDED, *HUB_SUITES], len(_EMBEDDED) + len(HUB_SUITES))
            raise NestError(f"no suite named `{source}`", mend=f"give a .jsonl file or one of {known}")
        found = read_jsonl(path)
        rows = [(str(row.get("id") or number), _asked(row, path, number)) for number, row in enumerate(found, start=1)]
        name, kind = path.stem, _kind_of(path.stem, found)
        groups = [str(row.get("category") or "") for row in found] if any(row.get("category") for row in found) else []
    rows = rows[:limit]
    return Suite(name, [row[0] for row in rows], [row[1] for row in rows], kind, groups=groups[:limit])


def _asked(row: dict[str, Any], path: Path, number: int) -> str | Request:
    prompt = text_field(row, "prompt", path, number)
    if not row.get("goal"):
        return prompt
    return Request(({"role": "user", "content": prompt},), text_field(row, "goal", path, number))


def _kind_of(name: str, rows: list[dict[str, Any]]) -> SuiteKind | None:
    kinds = {"harmful" if row.get("kind") == "harmful" else "benign" for row in rows if row.get("kind")}
    if kinds:
        return kinds.pop() if len(kinds) == 1 else None  # type: ignore[return-value]
    parts = re.split(r"[^a-z]+", name.lower())
    for word, kind in _WORDS.items():
        if any(part.startswith(word) for part in parts):
            return kind
    plain = re.sub(r"[^a-z]", "", name.lower())
    for known in sorted(HUB_SUITES, key=len, reverse=True):
        if plain.startswith(re.sub(r"[^a-z]", "", known)):
            return HUB_SUITES[known].kind
    return None


def load_suites(sources: list[str], limit: int | None = None) -> list[Suite]:
    """Several suites, with distinct names.

    Raises:
        NestError: see `load_suite`; also two suites of one name.
    """
    suites = [load_suite(source, limit) for source in sources]
    names = [suite.name for suite in suites]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise NestError(f"two suites are named {listed(twice)}", mend="rename one file")
    return suites
