"""One model of every setting: the keys of the YAML file are the flags, and flags win."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nest_rs.errors import NestError
from nest_rs.evaluate.suites import BUILTIN_SUITES
from nest_rs.export import Precision
from nest_rs.models import BUILTIN
from nest_rs.neurons import Clustering

# What a preset changes. `paper` is the recipe of arXiv 2602.16835v1, section 3, as far as it is disclosed.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Four times the requests, and a Gauss-Newton step at the end: what the default leaves out to take minutes. So many
    # requests teach more when of most answers the opening alone is learned; in the default's few steps, attacks get
    # through then.
    "thorough": {
        "epochs": 1.9,
        "batch_size": 24,
        "answer_share": 0.33,
        "frame_share": 0.4,
        "text_weight": 96.0,
        "refusal_bias": 1.5,
        "newton_requests": 2400,
    },
    "paper": {
        "depth": (0.0, 1.0),
        "z": 3.0,
        "positive": True,
        "clustering": "silhouette",
        "k_max": 2,
        "standardize": False,
        "benign_loss": "sft",
        "benign_weight": 1.0,
        "first_weight": 0.0,
        "margin_weight": 0.0,
        "teacher_weight": 0.0,
        "text_weight": 0.0,
        "newton_requests": 0,
        "whiten": None,
        "tie_rate": 0.0,
        "learning_rate": 1e-2,
        "twin_share": 0.0,
        "frame_share": 0.0,
        "epochs": 5.0,
        "batch_size": 32,
        "accumulate": 2,
        "answer_share": 1.0,
        "answer_tokens": 64,
    },
}


class TuneConfig(BaseModel):
    """Settings of a run. Flags are the kebab-case names; defaults are the `default` preset."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(BUILTIN, description="base model: built-in name, folder, .gguf file or hub id")
    preset: Literal["default", "thorough", "paper"] = Field(
        "default", description="a set of defaults; flags and file win"
    )
    out: Path | None = Field(None, description="run folder (default runs/<model>/<preset>-seed<seed>)")
    resume: bool = Field(False, description="go on with an interrupted run, stage by stage")
    seed: int = Field(0, description="of k-means, the choice of prompts, their order and the refusal texts")
    prompts: Path | None = Field(
        None, description="own .jsonl prompt set (prompt, kind, ...); default: the embedded one"
    )
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="compute dtype")
    threads: int | None = Field(None, ge=1, description="processor threads (default: all)")

    projections: tuple[Literal["gate", "up"], ...] = Field(("gate", "up"), description="where neurons are looked for")
    depth: tuple[float, float] = Field((0.33, 1.0), description="between which shares of the layers")
    probe_prompts: int = Field(1000, ge=2, description="prompts of each class that the probes learn from, at most")
    c: float = Field(1.0, gt=0, description="inverse L2 strength of the probes")
    z: float = Field(1.5, description="select rows whose coefficient stands out by more standard deviations")
    positive: bool = Field(True, description="select positive coefficients only")

    clustering: Clustering = Field("silhouette", description="silhouette, strong (a neuron each) or weak (one a site)")
    k_max: int | None = Field(2, ge=1, description="largest number of clusters tried a site")
    min_silhouette: float = Field(0.1, description="below it a site keeps one cluster")
    standardize: bool = Field(False, description="cluster on activations standardised over prompts")

    epochs: float = Field(0.48, gt=0, description="passes over the harmful requests")
    batch_size: int = Field(16, ge=2, description="requests a step, half harmful and half harmless")
    accumulate: int = Field(1, ge=1, description="parts that a step is computed in; more parts take less memory")
    learning_rate: float = Field(4e-3, gt=0, description="peak rate of AdamW")
    tie_rate: float = Field(
        0.1, ge=0, description="peak rate of the ties, how far a neuron follows each delta of its matrix; 0: one-hot"
    )
    whiten: float | None = Field(
        3.0, gt=0, description="train in coordinates of unit variance, with this damping; null for raw ones"
    )
    first_weight: float = Field(
        0.5, ge=0, lt=1, description="share of the first answer token in the loss; 0: all alike"
    )
    benign_loss: Literal["kl", "sft"] = Field(
        "kl", description="hold harmless answers to the base's distribution, or fit them"
    )
    benign_weight: float = Field(4.0, ge=0, description="weight of the harmless term")
    margin_weight: float = Field(1.0, ge=0, description="weight of the first harmless token's margin over a refusal's")
    teacher_weight: float = Field(
        3.0, ge=0, description="weight of deciding on the first token as a linear probe of the base does"
    )
    refusal_bias: float = Field(
        0.5, description="logits added to the odds of refusing that are aimed at: more refuse more, right and wrong"
    )
    newton_requests: int = Field(
        0, ge=0, description="requests whose decisions a last Gauss-Newton step fits; 0: no such step"
    )
    newton_damping: float = Field(3.0, gt=0, description="how little that step may move the deltas")
    text_weight: float = Field(48.0, ge=0, description="weight of the divergence from the base on plain text")
    twin_share: float = Field(0.5, ge=0, lt=1, description="share of twins among the harmless requests")
    frame_share: float = Field(
        0.25, ge=0, le=1, description="share of the training requests in an everyday framing: role, story, rules"
    )
    answer_share: float = Field(
        1.0, ge=0, le=1, description="share of the answers learned whole; of the others the first token is"
    )
    answer_tokens: int = Field(8, ge=1, description="tokens of the base's own answers to learn from")

    suite: list[str] = Field(
        list(BUILTIN_SUITES), description="suites to judge before and after: .jsonl files or names"
    )
    utility: list[Path] = Field([], description=".jsonl choice sets (accuracy) and .txt files (perplexity)")
    max_new_tokens: int = Field(32, ge=1, description="tokens of a judged answer")
    limit: int | None = Field(None, ge=1, description="first rows of each suite only")
    eval_batch_size: int = Field(96, ge=0, description="answers decoded together; 0: as many as fit")
    whole_answers: bool = Field(False, description="judge whole answers, not only until every verdict stands")

    export: bool = Field(True, description="export the merged model to ONNX")
    precision: Precision = Field("fp32", description="of the ONNX weights")
    parity_prompts: int = Field(32, ge=1, description="prompts on which ONNX and torch are compared")

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(f"a batch of {self.batch_size} requests has no {self.accumulate} parts of two classes")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and (preset := given.get("preset")) in PRESETS:
            return {**PRESETS[preset], **given}
        return given

    def save(self, path: Path) -> None:
        """Write the settings as YAML; the file can be given back with --config."""
        values = self.model_dump(mode="json", exclude={"out", "resume"})
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        NestError: missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NestError(f"no such config file: `{path}`") from error
    except yaml.YAMLError as error:
        raise NestError(f"`{path}` is not YAML ({error})") from error
    if not isinstance(values, dict):
        raise NestError(f"`{path}` must hold `key: value` lines")
    return values


def build_config(*layers: dict[str, Any]) -> TuneConfig:
    """Merge settings, later layers winning, and check them.

    Raises:
        NestError: an unknown key or a value out of range; the message names it.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key.replace("-", "_"): value for key, value in layer.items()}
    try:
        return TuneConfig(**merged)
    except ValidationError as error:
        raise explain(error) from error


def explain(error: ValidationError) -> NestError:
    """Say the first problem of a validation in one line."""
    first = error.errors()[0]
    # The location of a flag starts with its command, that of a list's value ends with an index.
    names = [str(part) for part in first["loc"] if isinstance(part, str)]
    name = "--" + (names[-1] if names else "config").replace("_", "-")
    return NestError(f"`{name}` has the value `{first['input']}`: {first['msg'].lower()}", mend="see --help")
