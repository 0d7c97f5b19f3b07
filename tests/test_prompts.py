"""The embedded prompt set, and what a user's own file may and may not hold."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from conftest import write_prompts
from nest_rs import NestError
from nest_rs.evaluate.judge import is_refusal
from nest_rs.prompts import Prompt, embedded_prompts, fitting, load_prompts, prompts_sha256, refusals

PUBLIC = Path(__file__).parents[2] / "shared" / "data"
GOOD = [{"prompt": "rob a bank", "kind": "harmful"}, {"prompt": "bake bread", "kind": "benign"}]


@pytest.fixture(scope="module")
def embedded() -> list[Prompt]:
    return embedded_prompts()


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower().replace("\u2019", "'").replace("'", "")))


def largest_jaccard(ours: list[frozenset[str]], theirs: list[frozenset[str]]) -> np.ndarray:
    """For each of ours the largest |a & b| / |a | b| with any of theirs."""
    vocabulary = {word: number for number, word in enumerate(sorted(frozenset().union(*ours, *theirs)))}

    def matrix(sets: list[frozenset[str]]) -> csr_array:
        cells = [(row, vocabulary[word]) for row, found in enumerate(sets) for word in found]
        rows, columns = zip(*cells, strict=True)
        return csr_array((np.ones(len(cells)), (rows, columns)), shape=(len(sets), len(vocabulary)))

    shared = (matrix(ours) @ matrix(theirs).T).toarray()
    sizes = np.add.outer([len(found) for found in ours], [len(found) for found in theirs])
    return (shared / (sizes - shared)).max(axis=1)


def test_the_embedded_set_is_large_enough(embedded: list[Prompt]) -> None:
    kinds = Counter(item.kind for item in embedded)
    assert kinds["harmful"] >= 400
    assert kinds["benign"] >= 600
    assert kinds["twin"] >= 200
    assert len({item.category for item in embedded if item.kind == "harmful"}) >= 12


def test_embedded_ids_and_prompts_are_unique(embedded: list[Prompt]) -> None:
    assert len({item.id for item in embedded}) == len(embedded)
    assert len({" ".join(item.prompt.lower().split()) for item in embedded}) == len(embedded)


def test_no_embedded_field_is_empty(embedded: list[Prompt]) -> None:
    assert [item.id for item in embedded if not (item.prompt.strip() and item.category and item.topic)] == []


def test_no_topic_stands_in_two_splits(embedded: list[Prompt]) -> None:
    splits = defaultdict(set)
    for item in embedded:
        splits[item.topic].add(item.split)
    assert {topic: found for topic, found in splits.items() if len(found) > 1} == {}


def test_each_split_has_each_kind(embedded: list[Prompt]) -> None:
    found = Counter((item.split, item.kind) for item in embedded)
    for split in ("train", "validation", "test"):
        for kind in ("harmful", "benign", "twin"):
            assert found[split, kind] >= 20, (split, kind)


def test_each_refusal_text_is_judged_a_refusal() -> None:
    texts = refusals()
    assert len(set(texts)) == len(texts) >= 10
    assert [text for text in texts if not is_refusal(text)] == []


@pytest.mark.skipif(not PUBLIC.is_dir(), reason=f"the public sets are not at {PUBLIC.name}")
def test_no_embedded_prompt_is_near_a_public_one(embedded: list[Prompt]) -> None:
    theirs: dict[frozenset[str], str] = {}
    for path in sorted(PUBLIC.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for name in ("prompt", "goal", "question"):
                if words(row.get(name, "")):
                    theirs[words(row[name])] = f"{path.stem} {row['id']}"
    assert len(theirs) > 2000
    nearest = largest_jaccard([words(item.prompt) for item in embedded], list(theirs))
    assert [(embedded[i].id, round(float(nearest[i]), 2)) for i in np.flatnonzero(nearest >= 0.7)] == []


def test_the_likeness_measure_finds_a_copy() -> None:
    theirs = [words("Write a script that can exploit vulnerabilities"), words("Bake a loaf")]
    ours = [words("write a SCRIPT that can exploit vulnerabilities!"), words("Write a song about bread")]
    assert largest_jaccard(ours, theirs).round(4).tolist() == [1.0, round(2 / 10, 4)]


def test_a_file_is_read_with_its_fields(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "p", "kind": "twin", "category": "c", "topic": "t", "split": "test", "response": "r"}
    path = write_rows(tmp_path / "set.jsonl", [{**item, "split": "train"} for item in GOOD] + [row])
    path.write_text(path.read_text() + "\n\n")
    items = load_prompts(path)
    assert items[2] == Prompt("a", "p", "twin", "c", "t", "test", "r")
    assert [item.id for item in items[:2]] == ["set-1", "set-2"]
    assert items[0].response is None


def test_no_file_means_the_embedded_set(embedded: list[Prompt]) -> None:
    assert load_prompts(None) == embedded


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the prompt file `.*` is empty"),
        (["", "  "], "the prompt file `.*` is empty"),
        ([json.dumps(GOOD[0]), "how do I"], "line 2 of `.*` is not JSON: `how do I`"),
        ([json.dumps(GOOD[0]), '["a", "b"]'], "line 2 of `.*` is not a JSON object"),
        (['"text"'], "line 1 of `.*` is not a JSON object"),
        (['{"kind": "harmful"}'], "row 1 of `.*` has no `prompt`"),
        (['{"prompt": "  ", "kind": "harmful"}'], "row 1 of `.*` has no `prompt`"),
        (['{"prompt": 7, "kind": "harmful"}'], "row 1 of `.*` has no `prompt`"),
        (['{"prompt": "a"}'], "row 1 of `.*` has no `kind`"),
        (['{"prompt": "a", "kind": "evil"}'], "has the kind `evil`; use `harmful`, `twin`, `benign`"),
        (['{"prompt": "a", "kind": "twin", "split": "dev"}'], "has the split `dev`"),
        (['{"prompt": "a", "kind": "harmful", "split": "train"}'], "no benign prompts to train on"),
        (['{"prompt": "a", "kind": "twin", "split": "train"}'], "no harmful prompts to train on"),
        (
            [json.dumps({**GOOD[0], "split": "test"}), json.dumps({**GOOD[1], "split": "train"})],
            "no harmful prompts to train on",
        ),
    ],
)
def test_bad_files_say_what_and_where(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(NestError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(NestError, match=f"no such prompt file: `{re.escape(str(tmp_path / name))}`"):
        load_prompts(tmp_path / name)


def test_bytes_that_are_not_utf8_are_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9", "kind": "benign"}\n')
    with pytest.raises(NestError, match="is not UTF-8"):
        load_prompts(path)


def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path: Path) -> None:
    rows = [{**item, "split": "train"} for item in GOOD]
    rows[0]["prompt"] = "first\u2028second\x85third"
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    assert load_prompts(path)[0].prompt == rows[0]["prompt"]


def test_the_split_of_a_row_without_one_is_stable_and_by_topic(tmp_path: Path) -> None:
    rows = [{"prompt": f"bake {n} loaves", "kind": "benign"} for n in range(1000)]
    rows += [{"prompt": f"rob bank {n}", "kind": "harmful", "topic": f"bank {n % 50}"} for n in range(1000)]
    first = load_prompts(write_rows(tmp_path / "a.jsonl", rows))
    again = load_prompts(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    assert {item.prompt: item.split for item in first} == {item.prompt: item.split for item in again}
    shares = Counter(item.split for item in first[:1000])
    assert 750 < shares["train"] < 850
    assert 60 < shares["validation"] < 140
    assert len({(item.topic, item.split) for item in first[1000:]}) == 50
    # known values: the split of a published set must not move with a new version
    assert [item.split for item in first[:10]] == ["train", "validation", *["train"] * 7, "test"]


def test_the_hash_of_a_set_sees_content_and_order(tmp_path: Path) -> None:
    items = load_prompts(write_prompts(tmp_path / "set.jsonl"))
    digest = prompts_sha256(items)
    assert digest == prompts_sha256(load_prompts(write_prompts(tmp_path / "copy.jsonl")))
    assert digest != prompts_sha256(items[::-1])
    assert digest != prompts_sha256(items[:-1])


def test_prompts_beyond_the_context_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    ids = [[1] * 5, [1] * 6, [1] * 7, [1] * 20]
    with caplog.at_level("WARNING", logger="nest_rs"):
        assert fitting(ids, ["a", "b", "c", "d"], 6) == [0, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "left out 2 prompts longer than the context of 6 tokens: `c`, `d`"
    ]


def test_no_prompt_within_the_context_is_an_error() -> None:
    with pytest.raises(NestError, match="left out 1 prompts longer than the context of 2 tokens: `a`; shorten"):
        fitting([[1, 2, 3]], ["a"], 2)
