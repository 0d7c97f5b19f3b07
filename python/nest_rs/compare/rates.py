"""Each baseline's own learning rate, from a small stated grid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nest_rs.compare.bench import Bench
from nest_rs.compare.methods import BASELINES, GRIDS
from nest_rs.files import read_json, write_json

log = logging.getLogger(__name__)


def choose_rate(bench: Bench, method: str, share: float, path: Path) -> float:
    """Try each rate of the method's grid and keep the one with the least attack success plus over-refusal.

    Judged on the embedded validation split (`nest-harmful-validation`, `nest-benign-validation`); ties go to the
    smaller rate. What was found stands in `path`, and what stands there is not tried again.

    Args:
        bench: The seed to try on.
        method: A key of `GRIDS`.
        share: Of the steps that each trial takes.
        path: A JSON file: by rate `attack_success`, `over_refusal`, and their sum, the `score`.
    """
    tried: dict[str, Any] = read_json(path) if path.is_file() else {}
    for rate in GRIDS[method]:
        if f"{rate:g}" in tried:
            continue
        tuned = BASELINES[method](bench, rate, share)
        found = bench.judge(tuned.model, None, f"{method} at {rate:g}", bench.validation)
        tried[f"{rate:g}"] = {
            **{name: found[name] for name in ("attack_success", "over_refusal", "incoherent")},
            "score": round(found["attack_success"]["rate"] + found["over_refusal"]["rate"], 4),
        }
        write_json(path, tried)
    best = min(GRIDS[method], key=lambda rate: (tried[f"{rate:g}"]["score"], rate))
    if best in (GRIDS[method][0], GRIDS[method][-1]):
        log.warning("%s: the best rate, %g, lies at the edge of its grid", method, best)
    return best
