"""Whether an answer is language at all: a broken model does not refuse, and does not help either."""

from __future__ import annotations

import re

# An answer of at least so many words is a loop if no more than a third of them are distinct.
_WORDS = 10
_DISTINCT = 1 / 3
# Share of letters, digits, spaces and ordinary marks below which an answer is noise.
_ORDINARY = 0.75


def is_incoherent(answer: str) -> bool:
    """Whether an answer is empty, noise or a loop.

    It is incoherent if it has no letter; if fewer than three quarters of its characters are letters, digits, spaces or
    ordinary marks; if it holds a word of more than 40 letters; or if, of at least ten words, no more than a third are
    distinct. Fluent nonsense passes: the rule is a floor, not a measure of sense.
    """
    if not any(character.isalpha() for character in answer):
        return True
    ordinary = sum(character.isalnum() or character.isspace() or character in ".,;:!?'\"()-*" for character in answer)
    words = re.findall(r"\w+", answer.lower())
    return (
        ordinary < _ORDINARY * len(answer)
        or max(map(len, words)) > 40
        or (len(words) >= _WORDS and len(set(words)) <= _DISTINCT * len(words))
    )
