"""Framings: what they leave as it was, how many there are, and that the decision is taught as for the bare request."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from conftest import write_prompts
from nest_rs.config import build_config
from nest_rs.evaluate.attacks import ATTACKS
from nest_rs.framing import in_framings
from nest_rs.prompts import Prompt, chat_ids, embedded_prompts
from nest_rs.run import Run
from nest_rs.targets import framed_requests, scored

PUBLIC = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return [item for item in embedded_prompts() if item.split == "train"]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    parts = json.loads(files("nest_rs").joinpath("data/framings.json").read_text(encoding="utf-8"))
    return [sentence for group in parts.values() for sentence in group]


def test_a_share_of_each_kind_is_framed_and_holds_its_request(train: list[Prompt]) -> None:
    framed = in_framings(train, 0.25, seed=0)
    changed = [(old, new) for old, new in zip(train, framed, strict=True) if old != new]
    assert all(old.prompt in new.prompt and len(new.prompt) > len(old.prompt) for old, new in changed)
    assert all(replace(new, prompt=old.prompt) == old for old, new in changed)
    for kind, count in Counter(item.kind for item in train).items():
        assert sum(old.kind == kind for old, _ in changed) / count == pytest.approx(0.25, abs=0.03)
    around = {new.prompt.replace(old.prompt, "") for old, new in changed}
    assert len(around) > 0.95 * len(changed)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all(train: list[Prompt], share: float) -> None:
    framed = in_framings(train, share, seed=0)
    assert sum(old != new for old, new in zip(train, framed, strict=True)) == share * len(train)


def test_a_framing_depends_on_the_request_and_the_seed_alone(train: list[Prompt]) -> None:
    framed = in_framings(train, 0.5, seed=0)
    assert in_framings(train[::-3], 0.5, seed=0) == framed[::-3]
    assert in_framings(train, 0.5, seed=1) != framed


def test_a_framing_says_nothing_about_the_kind(train: list[Prompt], sentences: list[str]) -> None:
    """Sentence for sentence, harmful and harmless requests have it alike often."""
    counts = {True: np.zeros(len(sentences)), False: np.zeros(len(sentences))}
    sizes = Counter(item.kind == "harmful" for item in train)
    for item in in_framings(train, 1.0, seed=0):
        counts[item.kind == "harmful"] += [sentence in item.prompt for sentence in sentences]
    shares = {side: count / sizes[side] for side, count in counts.items()}
    pooled = (counts[True] + counts[False]) / len(train)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / sizes[True] + 1 / sizes[False]))
    assert pooled.min() > 0.005
    assert (np.abs(shares[True] - shares[False]) / deviation).max() < 4.5


def test_a_framed_harmless_request_is_answered_by_the_base() -> None:
    told = [Prompt(f"{n}", "p", kind, "", "", "train", "r") for n, kind in enumerate(("harmful", "benign", "twin"))]
    assert [item.response for item in in_framings(told, 1.0, seed=0)] == ["r", None, None]
    assert in_framings(told, 0.0, seed=0) == told


def test_requests_that_do_not_fit_are_left_out_and_framings_that_do_not_left_off(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [Prompt(f"{n}", f"bake {n}", "benign", "", "", "train") for n in range(60)]
    long = replace(asked[0], id="long", prompt="bake " * 90)
    config = build_config({"frame_share": 1.0})
    with caplog.at_level("WARNING", logger="nest_rs"):
        found = framed_requests(config, tokenizer, [*asked, long], room=80)
    assert [record.getMessage() for record in caplog.records] == [
        "left out 1 prompts longer than the context of 80 tokens: `long`"
    ]
    framed = in_framings(asked, 1.0, config.seed)
    sizes = [len(ids) for ids in chat_ids(tokenizer, [item.prompt for item in framed])]
    assert found == [new if size <= 80 else old for old, new, size in zip(asked, framed, sizes, strict=True)]
    assert 0 < sum(size > 80 for size in sizes) < len(asked)


def test_no_sentence_is_an_attacks(sentences: list[str]) -> None:
    """Five words in a row that an attack of ours, or of the public sets, has too would be learning for the test."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    attacks = [message["content"] for make in ATTACKS.values() for message in make("x").messages]
    for name, field in (("jailbreak_templates", "template"), ("jbb_attack_prompts", "prompt")):
        if PUBLIC.is_dir():
            lines = (PUBLIC / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            attacks += [json.loads(line)[field] for line in lines if line.strip()]
    theirs = set().union(*map(runs, attacks))
    assert [sentence for sentence in sentences if runs(sentence) & theirs] == []


def test_the_teacher_reads_the_bare_request(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "more.jsonl", harmful=40, benign=40)
    given = {"model": str(tiny), "prompts": str(prompts), "dtype": "float32", "epochs": 2.0, "newton_requests": 40}
    found = {}
    for share in (0.0, 0.5):
        run = Run(tmp_path / "run", build_config({**given, "frame_share": share}))
        found[share] = run.training_data
    bare, framed = found[0.0], found[0.5]
    train = [item for item in run.prompts if item.split == "train"]
    scores = set(scored(run.model, run.tokenizer, train, bias=run.config.refusal_bias).values())
    for data in (bare, framed):
        assert {item.score for item in (*data.harmful, *data.benign)} <= scores
    assert [item.score for item in framed.harmful] == [item.score for item in bare.harmful]
    longer = [len(new.prompt) > len(old.prompt) for new, old in zip(framed.harmful, bare.harmful, strict=True)]
    assert 0 < sum(longer) < len(longer)
    # The last step decides on the same requests in the same form.
    asked = [item.prompt for item in framed.harmful]
    assert all(ids in asked for ids, refuse in framed.decisions if refuse)
