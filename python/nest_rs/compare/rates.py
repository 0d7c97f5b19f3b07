"""Each baseline's own learning rate, from a small stated grid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nest_rs.compare.bench import Bench
from nest_rs.compare.methods import BASELINES, GRIDS
from nest_rs.files import read_json, write_json

log = logging.getLogger(__name__)


# Steps of a half order of magnitude beyond the grid that are taken where its best rate lies at an edge.
_BEYOND = 2


def choose_rate(bench: Bench, method: str, share: float, path: Path) -> float:
    """Try each rate of the method's grid and keep the one with the least attack success plus over-refusal.

    Judged on the embedded validation split (`nest-harmful-validation`, `nest-benign-validation`); ties go to the
    smaller rate. A best rate at an edge of the grid, better than its neighbour, asks for one more beyond it, twice at
    most. What was found stands in `path`, and what stands there is not tried again.

    Args:
        bench: The seed to try on.
        method: A key of `GRIDS`.
        share: Of the steps that each trial takes.
        path: A JSON file: by rate `attack_success`, `over_refusal`, and their sum, the `score`.
    """
    tried: dict[str, Any] = read_json(path) if path.is_file() else {}

    def score(rate: float) -> float:
        key = f"{rate:g}"
        if key not in tried:
            tuned = BASELINES[method](bench, rate, share)
            found = bench.judge(tuned.model, None, f"{method} at {key}", bench.validation)
            tried[key] = {
                **{name: found[name] for name in ("attack_success", "over_refusal", "incoherent")},
                "score": round(found["attack_success"]["rate"] + found["over_refusal"]["rate"], 4),
            }
            write_json(path, tried)
        return float(tried[key]["score"])

    rates = list(GRIDS[method])
    for _ in range(_BEYOND + 1):
        best = min(rates, key=lambda rate: (score(rate), rate))
        if best == rates[-1] and score(best) < score(rates[-2]):
            rates.append(_rounded(best * 10**0.5))
        elif best == rates[0] and score(best) < score(rates[1]):
            rates.insert(0, _rounded(best / 10**0.5))
        else:
            return best
    best = min(rates, key=lambda rate: (score(rate), rate))
    if best in (rates[0], rates[-1]):
        log.warning("%s: the best rate, %g, lies at the edge of what was tried", method, best)
    return best


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
