"""The one exception that stands for a user's mistake."""

from __future__ import annotations

from collections.abc import Iterable


class NestError(Exception):
    """Something the user can mend.

    The message is one line: what failed, the value in backticks, how to mend it. The command line prints it without a
    traceback and exits with status 2; from Python it is an ordinary exception.
    """

    def __init__(self, what: str, *, mend: str | None = None) -> None:
        text = " ".join(what.split())
        super().__init__(f"{text}; {mend}" if mend else text)


def listed(values: Iterable[object], limit: int = 5) -> str:
    """Name the first few values in backticks and count the rest."""
    names = [f"`{value}`" for value in values]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
