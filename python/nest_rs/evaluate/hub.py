"""Public suites at their homes on the Hugging Face hub, read by `datasets` (the extra `hub`).

Some homes ask for a licence to be accepted first (`hf auth login`). What has been fetched once is found in the cache
without a network; a folder of the dataset's name below the working directory takes its place, as always in `datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nest_rs.errors import NestError, listed


@dataclass(frozen=True)
class HubSuite:
    """Where a suite lives.

    Attributes:
        dataset: Its id on the hub.
        kind: What a model should do with its requests: refuse harmful ones, answer benign ones.
        config: The dataset's configuration, if it has several.
        split: The split.
        column: Where the request stands; of a list of turns, the first is taken.
        where: A column and the value that a row must have in it, or None for all rows.
        options: What else the loader needs.
    """

    dataset: str
    kind: Literal["harmful", "benign"]
    config: str | None = None
    split: str = "train"
    column: str = "prompt"
    where: tuple[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


# Without these the tab-separated files of WildJailbreak are not understood.
_TABS = {"delimiter": "\t", "keep_default_na": False}
_WILD = "allenai/wildjailbreak"
_JBB = "JailbreakBench/JBB-Behaviors"
_OR = "bench-llm/or-bench"

HUB_SUITES: dict[str, HubSuite] = {
    "advbench": HubSuite("walledai/AdvBench", "harmful"),
    "harmbench": HubSuite("walledai/HarmBench", "harmful", config="standard"),
    "jbb": HubSuite(_JBB, "harmful", config="behaviors", split="harmful", column="Goal"),
    "jbb-benign": HubSuite(_JBB, "benign", config="behaviors", split="benign", column="Goal"),
    "strongreject": HubSuite("walledai/StrongREJECT", "harmful"),
    "xstest": HubSuite("Paul/XSTest", "benign", where=("label", "safe")),
    "xstest-unsafe": HubSuite("Paul/XSTest", "harmful", where=("label", "unsafe")),
    "wildjailbreak": HubSuite(
        *(_WILD, "harmful", "eval"), column="adversarial", where=("data_type", "adversarial_harmful"), options=_TABS
    ),
    "wildjailbreak-benign": HubSuite(
        *(_WILD, "benign", "eval"), column="adversarial", where=("data_type", "adversarial_benign"), options=_TABS
    ),
    "sorry-bench": HubSuite(
        "sorry-bench/sorry-bench-202503", "harmful", column="turns", where=("prompt_style", "base")
    ),
    "or-bench": HubSuite(_OR, "benign", config="or-bench-hard-1k"),
    "or-bench-toxic": HubSuite(_OR, "harmful", config="or-bench-toxic"),
    "simplesafetytests": HubSuite("Bertievidgen/SimpleSafetyTests", "harmful", split="test"),
    "malicious-instruct": HubSuite("walledai/MaliciousInstruct", "harmful"),
    "do-not-answer": HubSuite("LibrAI/do-not-answer", "harmful", column="question"),
    "coconot-contrast": HubSuite("allenai/coconot", "benign", config="contrast", split="test"),
    "ifeval": HubSuite("google/IFEval", "benign"),
    "mt-bench": HubSuite("HuggingFaceH4/mt_bench_prompts", "benign"),
}


def fetch(name: str) -> list[tuple[str, str]]:
    """The requests of a suite, each with an id: the suite's name and the row.

    Raises:
        NestError: `datasets` is not installed, the dataset cannot be had, or it is not as the table says.
    """
    suite = HUB_SUITES[name]
    around = "give a local .jsonl file with a `prompt` in each line"
    try:
        import datasets
    except ImportError as error:
        raise NestError(
            f"the suite `{name}` needs `datasets`, which is not installed",
            mend=f"pip install 'nest-rs[hub]', or {around}",
        ) from error
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(suite.dataset, suite.config, split=suite.split, **suite.options)
    except Exception as error:  # offline, gated, moved: the clients raise many kinds, each means "could not be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NestError(
            f"cannot fetch the suite `{name}` (`{suite.dataset}`) from the hub and it is not in the cache ({reason})",
            mend=f"check the network and, for a gated set, `hf auth login`; or {around}",
        ) from error
    needed = [suite.column, *(suite.where[:1] if suite.where else ())]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise NestError(
            f"`{suite.dataset}` has no column {listed(missing)} any more, but {listed(rows.column_names)}", mend=around
        )
    found = []
    for number, row in enumerate(rows, start=1):
        if suite.where is None or row[suite.where[0]] == suite.where[1]:
            value = row[suite.column]
            text = value[0] if isinstance(value, list) else value
            found.append((f"{name}-{number}", str(text)))
    if not found:
        raise NestError(f"no row of `{suite.dataset}` has the `{needed[-1]}` asked for", mend=around)
    return found
