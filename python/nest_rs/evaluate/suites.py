"""Named sets of requests to judge a model on, and attacks to wrap them in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nest_rs.errors import NestError, listed
from nest_rs.prompts import embedded_prompts, read_jsonl, text_field

# The embedded set's parts that no training sees. Name -> (kind, split).
_EMBEDDED = {
    f"nest-{kind}" + ("" if split == "test" else f"-{split}"): (kind, split)
    for split in ("test", "validation")
    for kind in ("harmful", "benign", "twin")
}
BUILTIN_SUITES = ("nest-harmful", "nest-benign", "nest-twin")


@dataclass(frozen=True)
class Suite:
    """Requests judged together."""

    name: str
    ids: list[str]
    prompts: list[str]


def load_suite(source: str, limit: int | None = None) -> Suite:
    """A suite by name (`nest-harmful`, `nest-benign`, `nest-twin`, each also `-validation`) or from a .jsonl file.

    Raises:
        NestError: an unknown name, a missing file, or a row without `prompt`.
    """
    if source in _EMBEDDED:
        kind, split = _EMBEDDED[source]
        rows = [(item.id, item.prompt) for item in embedded_prompts() if (item.kind, item.split) == (kind, split)]
        name = source
    else:
        path = Path(source)
        if path.suffix != ".jsonl":
            raise NestError(f"no suite named `{source}`", mend=f"give a .jsonl file or one of {listed(_EMBEDDED, 6)}")
        rows = [
            (str(row.get("id") or number), text_field(row, "prompt", path, number))
            for number, row in enumerate(read_jsonl(path), start=1)
        ]
        name = path.stem
    rows = rows[:limit]
    return Suite(name, [row[0] for row in rows], [row[1] for row in rows])


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


def attack(suites: list[Suite], path: Path) -> list[Suite]:
    """Wrap each request of each suite in each template of a file.

    A template row has `template` with one slot: `{0}`, `{prompt}`, `{{ prompt }}`, or a name in `parameters` in single
    or double braces.

    Raises:
        NestError: a template without a slot, which would leave the request out or unchanged.
    """
    templates = []
    for number, row in enumerate(read_jsonl(path), start=1):
        text = text_field(row, "template", path, number)
        names = [*row.get("parameters", []), "prompt", "0"]
        slots = [
            slot for name in names for slot in (f"{{{{ {name} }}}}", f"{{{{{name}}}}}", f"{{{name}}}") if slot in text
        ]
        if not slots or text.strip() == slots[0]:
            raise NestError(f"row {number} of `{path}` changes nothing: its template has no slot or only a slot")
        templates.append((str(row.get("id") or number), text, slots[0]))
    return [
        Suite(
            f"{suite.name}+{path.stem}",
            [f"{identity}+{name}" for name, _, _ in templates for identity in suite.ids],
            [text.replace(slot, prompt) for _, text, slot in templates for prompt in suite.prompts],
        )
        for suite in suites
    ]
