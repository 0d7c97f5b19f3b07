"""What a patch was seen to do: refusal and utility before and after, kept in the patch file beside its identity.

The patch's id is fixed when it is trained, and judging comes later; so the evidence stands in the file's metadata but
is no part of the id (`nest_rs.patch`). Its own SHA-256 tells accidents, a signature vouches for both.

    {"judge": "start of answer", "max_new_tokens": 64,
     "refusal": {suite: {"base": {"rate", "ci95", "n", "refused"}, "tuned": {...}}},
     "utility": {"base": {...}, "tuned": {...}},
     "samples_sha256": {"base": SHA-256 of eval/base/samples.jsonl, "tuned": ...},
     "sha256": of this object without that key}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nest_rs.errors import NestError
from nest_rs.files import read_json, write_json
from nest_rs.models import file_sha256
from nest_rs.patch import FILE_NAME, NestPatch, evidence_sha256
from nest_rs.report import percent


def attach_evidence(run: Path, found: dict[str, Any], **settings: Any) -> None:
    """Write what a run's evaluation found into its patch; the patch's id stays.

    Args:
        run: The run folder, with `patch/` and the answers below `eval/`.
        found: `base` and `tuned`, each a result a suite, and `utility` if it was measured.
        settings: How the answers were made.
    """
    path = run / "patch" / FILE_NAME
    if not path.is_file():
        return  # a merged folder alone can be judged too
    patch = NestPatch.load(path)
    suites = {suite: {side: found[side][suite] for side in ("base", "tuned")} for suite in found["base"]}
    evidence = {
        "judge": "start of answer",
        **settings,
        "refusal": suites,
        **({"utility": found["utility"]} if "utility" in found else {}),
        "samples_sha256": {side: file_sha256(run / "eval" / side / "samples.jsonl") for side in ("base", "tuned")},
    }
    patch.evidence = {**evidence, "sha256": evidence_sha256(evidence)}
    patch.save(path)
    readable = path.with_suffix(".json")
    write_json(readable, {**read_json(readable), "evidence": patch.evidence})


def lines(evidence: dict[str, Any]) -> list[str]:
    """The evidence for a reader, a line a suite."""
    try:
        out = [
            f"refused, {suite}: base {percent(rates['base'])}, tuned {percent(rates['tuned'])}"
            for suite, rates in evidence.get("refusal", {}).items()
        ]
        return out + [f"utility, {side}: {found}" for side, found in evidence.get("utility", {}).items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NestError("the patch's evidence is not what this version writes", mend="read it with --json") from error
