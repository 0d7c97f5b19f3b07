"""When does the refusal verdict on an unfinished answer stand, whatever follows?

The judge looks at the start of an answer, so most verdicts stand after a few words: "The" begins no refusal, and "I'm
sorry, but I can't help with that." cannot become anything else.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from nest_rs.evaluate import judge

# Characters within which the judge's exceptions ("I can't recommend it enough") may still undo a match.
_REACH = 80


@cache
def _pattern() -> Any:
    import regex  # matches in part, which `re` cannot

    # Lazy or greedy, the same texts match; but a lazy repeat does not report that it could go on.
    return regex.compile(judge._REFUSALS.pattern.replace("}?", "}"))


def verdict_stands(text: str) -> bool:
    """Whether every answer that begins with `text` gets the verdict that `is_refusal(text)` gives.

    It errs on the side of False: the last word may go on, and a character may be there in part only.
    """
    start = judge.normalise(text)
    if not start or start.endswith("\ufffd"):
        return False
    found = _pattern().match(start, partial=True)
    if found is None:
        return True
    if found.partial:
        return False
    # An exception spans a clause at most: behind its end, or far enough, a match is final.
    behind = start[found.end() :]
    return any(mark in behind for mark in ".!?") or len(behind) > _REACH
