"""All that `nest-rs eval` asks of a model, in order: answers, utility, divergence, and then the other judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nest_rs.errors import NestError, listed
from nest_rs.evaluate.backends import open_backend
from nest_rs.evaluate.divergence import kl_to_base
from nest_rs.evaluate.harness import Harness
from nest_rs.evaluate.judges import Judge
from nest_rs.evaluate.judges.panel import judge_answers
from nest_rs.evaluate.refusal import evaluate_refusal, standing_out
from nest_rs.evaluate.suites import Suite, load_suite
from nest_rs.evaluate.utility import check_utility, measure_utility
from nest_rs.files import write_json
from nest_rs.models import Base, load_model, load_tokenizer, pick_device, pick_dtype
from nest_rs.prompts import Request

# What stands beside suites and utility files in the results.
_RESERVED = ("judges", "gates", "kl", "lm_eval", "standing_out")


@dataclass(frozen=True)
class Evaluation:
    """What to measure.

    Attributes:
        suites: Requests to answer and judge.
        judges: Asked beside the refusal judge.
        utility: Files of `measure_utility`.
        harness: Tasks of lm-eval.
        kl_to: The base to measure the divergence from, on the benign suites or, without one, on the embedded benign
            requests.
        max_new_tokens: Tokens of an answer.
        limit: First rows of each utility file only.
        batch_size: Answers decoded together.
        device: See `nest_rs.models.pick_device`.
        dtype: See `nest_rs.models.pick_dtype`.
        backend: What writes the answers: `torch`, or an engine of `nest_rs.evaluate.backends`.
        early: End a batch of answers where no refusal verdict can change any more.

    Raises:
        NestError: another backend than torch is to measure more than answers, two results would have one name, judges
            have no answers to judge, or a utility file cannot be scored.
    """

    suites: Sequence[Suite] = ()
    judges: Sequence[Judge] = ()
    utility: Sequence[Path] = ()
    harness: Harness | None = None
    kl_to: Base | None = None
    max_new_tokens: int = 32
    limit: int | None = None
    batch_size: int = 32
    device: str = "auto"
    dtype: str = "auto"
    backend: Literal["torch", "onnx", "vllm"] = "torch"
    early: bool = False

    def __post_init__(self) -> None:
        check_utility(self.utility)
        if self.judges and not self.suites:
            raise NestError(f"nothing is answered that `{self.judges[0].name}` could judge", mend="name a --suite")
        if self.backend != "torch" and self.shares | ({"lm_eval": True} if self.harness else {}):
            raise NestError(f"`{self.backend}` writes answers only", mend="measure the rest with --backend torch")
        names = [*_RESERVED, *(suite.name for suite in self.suites), *(path.stem for path in self.utility)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise NestError(f"two results would be named {listed(twice)}", mend="rename one file")

    @property
    def shares(self) -> dict[str, bool]:
        """Names of the utility results, and whether each is a share from 0 to 1."""
        return {path.stem: path.suffix == ".jsonl" for path in self.utility} | ({"kl": False} if self.kl_to else {})

    def run(self, base: Base, out: Path) -> dict[str, Any]:
        """Measure a model; `results.json`, `samples.jsonl` and `utility.json` go to `out`.

        Returns:
            By suite and utility file its result, `standing_out`, and `judges`, `kl` and `lm_eval` where asked for.
        """
        device = pick_device(self.device)
        dtype = pick_dtype(self.dtype, device)
        tokenizer = load_tokenizer(base.folder)
        model: Any
        if self.backend == "torch":
            model = load_model(base.folder, device=device, dtype=dtype)
        else:
            model = open_backend(self.backend, base.folder, dtype)
        results: dict[str, Any] = {}
        if self.suites:
            results = evaluate_refusal(
                model,
                tokenizer,
                self.suites,
                out,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                early=self.early,
            )
        worse = standing_out(self.suites, results, out) if self.suites else []
        utility: dict[str, Any] = {
            path.stem: measure_utility(model, tokenizer, path, limit=self.limit) for path in self.utility
        }
        if self.kl_to:
            utility["kl"] = kl_to_base(
                model,
                load_model(self.kl_to.folder, device=device, dtype=dtype),
                tokenizer,
                self._benign(),
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
        if self.harness:
            utility["lm_eval"] = self.harness.run(model, tokenizer, batch_size=self.batch_size, limit=self.limit)
        if utility:
            write_json(out / "utility.json", utility)
        if self.judges:
            del model  # a guard is often larger than what it guards
            results["judges"] = judge_answers(self.judges, self.suites, out)
        return {**results, **utility, **({"standing_out": worse} if worse else {})}

    def _benign(self) -> list[str | Request]:
        benign = [suite for suite in self.suites if suite.kind == "benign"] or [load_suite("nest-benign")]
        return [asked for suite in benign for asked in suite.prompts]
