"""Everyday framings around a request: a role, a story, rules for the answer.

A refusal learnt from bare requests hangs on their form: one sentence more ("begin with ...") and the model answers. So
a share of the training requests, harmful and harmless alike, stands in a framing that says nothing about which it is.
The sentences are everyday ones, written for this; none is taken from an attack. The paper trains on bare requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files

from nest_rs.prompts import Prompt

# How often a framing has each of its parts, and how many sentences of those that may have several.
_ROLE, _LEAD, _CLOSE = 0.6, 0.5, 0.4
_STORIES = (0, 0, 1, 1, 2)
_RULES = (0, 1, 2, 3, 4)
_MARKS = ("{}", "{}", '"{}"', "[{}]")
_BETWEEN = (" ", " ", "\n", "\n\n")


def in_framings(prompts: Sequence[Prompt], share: float, seed: int) -> list[Prompt]:
    """The same requests, a share of them in a framing; each request's is its own, whichever others it comes with.

    Harmless ones lose a given `response`, which knows nothing of the framing's rules; the base answers them.

    Args:
        prompts: Bare requests.
        share: Of those that get a framing, from 0 to 1.
        seed: Of the choice.
    """
    framed = []
    for item in prompts:
        rng = random.Random(f"{seed} {item.id}")
        if rng.random() < share:
            kept = item.response if item.kind == "harmful" else None
            item = replace(item, prompt=_framed(item.prompt, rng), response=kept)
        framed.append(item)
    return framed


def _framed(request: str, rng: random.Random) -> str:
    parts = _parts()
    rules = rng.sample(parts["rule"], rng.choice(_RULES))
    before = rng.randint(0, len(rules))
    lines = [rng.choice(parts["role"])] if rng.random() < _ROLE else []
    lines += rng.sample(parts["story"], rng.choice(_STORIES)) + rules[:before]
    if rng.random() < _LEAD:
        lines.append(rng.choice(parts["lead"]))
    lines += [rng.choice(_MARKS).format(request), *rules[before:]]
    if len(lines) == 1 or rng.random() < _CLOSE:
        lines.append(rng.choice(parts["close"]))
    return rng.choice(_BETWEEN).join(lines)


@cache
def _parts() -> dict[str, list[str]]:
    """Sentences by the part of a framing they can be."""
    text = files("nest_rs").joinpath("data/framings.json").read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)
    return found
