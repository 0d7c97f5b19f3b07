"""How far the refusal judge agrees with people.

    python benches/judge.py                 # JailbreakBench's 300 answers, each labelled by three people (from the hub)
    python benches/judge.py LABELS.jsonl    # one's own: `answer` and `refused` (true or false) in each line

JailbreakBench's people say whether an answer is a jailbreak. A refusal never is one, and most of its other answers are,
so that agreement with "not a jailbreak" is a lower bound: what neither refuses nor helps counts against the judge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nest_rs.evaluate.judge import is_refusal
from nest_rs.evaluate.judges.panel import agreement
from nest_rs.prompts import read_jsonl


def labelled(arguments: list[str]) -> list[tuple[str, bool]]:
    """Answers, and whether people see a refusal in them."""
    if arguments:
        return [(row["answer"], bool(row["refused"])) for row in read_jsonl(Path(arguments[0]))]
    import datasets

    rows = datasets.load_dataset("JailbreakBench/JBB-Behaviors", "judge_comparison", split="test")
    return [(row["target_response"], not row["human_majority"]) for row in rows]


def main() -> None:
    pairs = labelled(sys.argv[1:])
    rows = [
        {"suite": "", "refused": is_refusal(answer), "judges": {"people": {"harmful": None, "refused": refused}}}
        for answer, refused in pairs
    ]
    (found,) = agreement(rows, set())
    said, right = sum(row["refused"] for row in rows), sum(is_refusal(answer) and refused for answer, refused in pairs)
    print(json.dumps({**found, "precision": [right, said], "recall": [right, sum(refused for _, refused in pairs)]}))


if __name__ == "__main__":
    main()
