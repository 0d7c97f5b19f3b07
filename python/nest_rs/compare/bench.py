"""What all rows of one seed share: the base, the data, the suites, and how an answer is judged."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nest_rs.compare.coherence import is_incoherent
from nest_rs.compare.meter import Cost
from nest_rs.config import TuneConfig
from nest_rs.evaluate.attacks import with_attacks
from nest_rs.evaluate.generate import decode
from nest_rs.evaluate.refusal import evaluate_refusal, rate
from nest_rs.evaluate.suites import Suite, load_suites
from nest_rs.evaluate.utility import measure_utility
from nest_rs.files import write_json
from nest_rs.models import load_model, pick_device, pick_dtype
from nest_rs.run import Run
from nest_rs.targets import TrainingData, framed_requests, helpful_examples, training_data
from nest_rs.train import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What is pooled over suites, bare and in attacks, and what a table calls it.
SHARES = {
    "attack_success": "attack success",
    "incoherent": "incoherent",
    "over_refusal": "over-refusal",
    "attacked_success": "attacked: success",
    "attacked_over_refusal": "attacked: over-refusal",
}
# Tokens of a continuation.
CONTINUATION = 32


@dataclass(frozen=True)
class Tuned:
    """A model that a method made.

    Attributes:
        model: An ordinary model in the compute dtype: adapters are merged.
        trainable_params: Numbers that were trained.
        cost: Of finding what to train and of training; the base's own answers, which all learn from, are not in it.
    """

    model: PreTrainedModel
    trainable_params: int = 0
    cost: Cost = field(default_factory=Cost)


class Bench:
    """One seed of a comparison.

    Attributes:
        folder: Where its rows go.
        run: The NeST run of this seed (not yet run); its model is the base, its data everyone's.
        suites: By kind: `harmful` ones should be refused, `benign` ones should not; the attacked ones among them.
    """

    def __init__(
        self,
        folder: Path,
        config: TuneConfig,
        benign: list[str],
        attacks: Sequence[str] = (),
        attack_limit: int | None = None,
    ) -> None:
        self.folder = folder
        self.run = Run.start(config.model_copy(update={"out": folder / "nest", "resume": True, "export": False}))
        self.suites = {
            kind: with_attacks(load_suites(sources, config.limit), attacks, attack_limit)
            for kind, sources in (("harmful", config.suite), ("benign", benign))
        }

    @property
    def config(self) -> TuneConfig:
        """The settings of the seed."""
        return self.run.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.run.tokenizer

    @property
    def base(self) -> PreTrainedModel:
        """The base, frozen. Methods work on copies."""
        return self.run.model

    @cached_property
    def validation(self) -> dict[str, list[Suite]]:
        """The embedded validation split, on which rates and recipes are chosen."""
        return {kind: load_suites([f"nest-{kind}-validation"], self.config.limit) for kind in ("harmful", "benign")}

    @cached_property
    def baseline_data(self) -> TrainingData:
        """What a method learns from that has no Gauss-Newton step: as many requests, in more steps."""
        config, data = self.config, self.run.training_data
        if not config.newton_requests:
            return data
        epochs = config.epochs + config.newton_requests / 2 / len(data.harmful)
        longer = config.model_copy(update={"epochs": epochs, "newton_requests": 0})
        return training_data(longer, self.run.base, self.base, self.tokenizer, self.run.prompts)

    @cached_property
    def continuations(self) -> dict[str, list[Example]]:
        """The base's own answers to training requests, by kind, of up to 32 tokens; harmful ones it complied with.

        Made on the spot, kept in memory alone and written nowhere.
        """
        config, found = self.config, {}
        room = int(self.base.config.get_text_config().max_position_embeddings) - CONTINUATION
        for kind in ("harmful", "benign"):
            asked = [
                item
                for item in self.run.prompts
                if item.split == "train" and (item.kind == "harmful") == (kind == "harmful")
            ]
            count = min(len(asked), self.baseline_data.count * config.batch_size // 2)
            drawn = random.Random(config.seed).sample(asked, count)
            asked = framed_requests(config, self.tokenizer, drawn, room=room)
            answers = decode(
                self.base,
                self.tokenizer,
                [item.prompt for item in asked],
                max_new_tokens=CONTINUATION,
                batch_size=config.eval_batch_size,
                label=f"base on {kind}",
                states=False,
            )
            found[kind] = helpful_examples(self.tokenizer, asked, answers, max_tokens=CONTINUATION)
        return found

    def copy(self, *, float32: bool = False, folder: Path | None = None) -> PreTrainedModel:
        """The base, or the model of a folder, loaded anew: frozen, in the compute dtype unless `float32`."""
        device = pick_device(self.config.device)
        dtype = torch.float32 if float32 else pick_dtype(self.config.dtype, device)
        return load_model(folder or self.run.base.folder, device=device, dtype=dtype)

    def finished(self, model: PreTrainedModel) -> PreTrainedModel:
        """A trained model as it is judged: frozen, in the compute dtype, in eval mode."""
        model.requires_grad_(False)
        done: PreTrainedModel = model.to(self.base.dtype).eval()
        return done

    def judge(
        self,
        model: PreTrainedModel,
        folder: Path | None,
        label: str,
        suites: Mapping[str, list[Suite]] | None = None,
    ) -> dict[str, Any]:
        """Answer the suites and judge the answers.

        Args:
            model: What answers.
            folder: Where each answer is written (`samples.jsonl` in `harmful`, `benign` and `attacked`); None keeps the
                counts alone. Those of `harmful` are whole, the others end when the verdict stands.
            label: What the progress bar says.
            suites: By kind; the bench's own without it.

        Returns:
            `suites` (by name), and pooled by kind `attack_success` (harmful requests that were not refused),
            `incoherent` (harmful ones answered with what is neither a refusal nor language), `over_refusal` (benign
            ones that were refused), and of requests in an attack `attacked_success` and `attacked_over_refusal`, each
            with `n`, `count`, `rate` and the Wilson `ci95`.
        """
        suites = self.suites if suites is None else suites
        kinds = {suite.name: kind for kind, group in suites.items() for suite in group}
        parts: dict[str, list[Suite]] = {"harmful": [], "benign": [], "attacked": []}
        for kind, group in suites.items():
            for suite in group:
                parts["attacked" if suite.attack else kind].append(suite)
        attacked = {suite.name for suite in parts["attacked"]}
        found: dict[str, dict[str, Any]] = {}
        samples = []
        with tempfile.TemporaryDirectory() as scratch:
            for part, asked in parts.items():
                if not asked:
                    continue
                where = (folder or Path(scratch)) / part
                found |= evaluate_refusal(
                    model,
                    self.tokenizer,
                    asked,
                    where,
                    max_new_tokens=self.config.max_new_tokens,
                    batch_size=self.config.eval_batch_size,
                    label=f"{label}: {part}",
                    # Whether an answer that does not refuse is language shows in all of it.
                    early=part != "harmful" and not self.config.whole_answers,
                )
                lines = (where / "samples.jsonl").read_text(encoding="utf-8").split("\n")
                samples += [json.loads(line) for line in lines if line]
        pooled: dict[str, list[int]] = {name: [0, 0] for name in SHARES}
        for sample in samples:
            refused, name = sample["refused"], sample["suite"]
            if refused is None:
                continue
            if kinds[name] == "benign":
                counts = {"attacked_over_refusal" if name in attacked else "over_refusal": refused}
            elif name in attacked:
                counts = {"attacked_success": not refused}
            else:
                counts = {"attack_success": not refused, "incoherent": not refused and is_incoherent(sample["answer"])}
            for measure, hit in counts.items():
                pooled[measure][0] += hit
                pooled[measure][1] += 1
        return {
            "suites": {name: {"kind": kinds[name], **result} for name, result in found.items()},
            **{name: share(hits, n) for name, (hits, n) in pooled.items()},
        }

    def utility(self, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracy or perplexity on each utility file."""
        return {
            path.stem: measure_utility(model, self.tokenizer, path, limit=self.config.limit)
            for path in self.config.utility
        }

    def row(self, name: str) -> Path:
        """Where a row stands when it is there."""
        return self.folder / name / "row.json"

    def save_row(
        self, name: str, tuned: Tuned, *, learning_rate: float | None = None, keep_answers: bool = True
    ) -> None:
        """Judge a model and write its row."""
        path = self.row(name)
        row = {
            "method": name,
            "seed": self.config.seed,
            "trainable_params": tuned.trainable_params,
            "total_params": self.base.num_parameters(),
            "seconds": tuned.cost.seconds,
            "peak_mb": tuned.cost.peak_mb,
            "learning_rate": learning_rate,
            **self.judge(tuned.model, path.parent / "answers" if keep_answers else None, f"judge {name}"),
            "utility": self.utility(tuned.model),
        }
        write_json(path, row)


def share(count: int, n: int) -> dict[str, Any]:
    """A count of n with its rate and Wilson 95 % interval."""
    found = rate(count, n)
    return {"n": n, "count": count, "rate": found["rate"], "ci95": found["ci95"]}
