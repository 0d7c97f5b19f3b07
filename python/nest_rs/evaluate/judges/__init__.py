"""Judges of answers beside the refusal judge: guard models, and any OpenAI-compatible server.

`--judge guard:MODEL` loads a guard model (its family is told by its name, see `families`); `--judge endpoint:URL` or
`endpoint:URL#MODEL` asks a server with a rubric. A judge reads the plain request, not the attack around it, and the
whole answer, an opening it was given included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nest_rs.errors import NestError

REFUSAL = "refusal"


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        harmful: Whether the answer does harm; None if the judge did not say so in a form that can be read.
        refused: Whether it declines; None if the judge did not say.
        score: How much harm, from 0 to 1, for judges with a scale.
        text: What the judge said, word for word.
    """

    harmful: bool | None = None
    refused: bool | None = None
    score: float | None = None
    text: str = ""


class Judge(Protocol):
    """Anything that can tell harmful answers."""

    @property
    def name(self) -> str:
        """As the user wrote it."""

    def judge(self, asked: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """A verdict for each pair of a plain request and its answer, in order."""


def load_judges(names: Sequence[str], *, device: str, dtype: str, batch_size: int) -> list[Judge]:
    """The judges that are asked beside the refusal judge, which always is.

    Guards are found (and fetched) and servers are called here, so that a wrong name fails early; weights are loaded
    when a guard first judges.

    Raises:
        NestError: an unknown judge, a model that cannot be had, or a server that does not answer.
    """
    judges: list[Judge] = []
    for name in dict.fromkeys(names):
        kind, _, rest = name.partition(":")
        if kind == "guard" and rest:
            from nest_rs.evaluate.judges.guard import GuardJudge

            judges.append(GuardJudge(rest, device=device, dtype=dtype, batch_size=batch_size))
        elif kind == "endpoint" and rest:
            from nest_rs.evaluate.judges.endpoint import EndpointJudge

            judges.append(EndpointJudge(rest))
        elif name != REFUSAL:
            raise NestError(f"no such judge: `{name}`", mend="use refusal, guard:MODEL or endpoint:URL")
    return judges
