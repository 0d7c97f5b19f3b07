"""A run: the stages in order, each leaving its artefact on disk and able to start from the one before."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nest_rs.adapter import RANKS
from nest_rs.config import TuneConfig, build_config, read_yaml
from nest_rs.errors import NestError
from nest_rs.evaluate.refusal import evaluate_refusal, standing_out
from nest_rs.evaluate.suites import load_suites
from nest_rs.evaluate.utility import check_utility, measure_utility
from nest_rs.evidence import attach_evidence
from nest_rs.export import check_parity, export_onnx, require_onnx, sample_of_like_length
from nest_rs.files import new_folder, read_json, write_json
from nest_rs.fold import merge_folder
from nest_rs.memory import halving
from nest_rs.models import Base, load_model, load_tokenizer, pick_device, pick_dtype, resolve
from nest_rs.neurons import load_neurons, save_neurons, select_and_cluster
from nest_rs.numeric import ActivationStore
from nest_rs.patch import FILE_NAME, NestPatch
from nest_rs.probe import collect_activations, fit_probes, load_probes, save_probes
from nest_rs.processes import is_main, share, wait
from nest_rs.progress import track
from nest_rs.prompts import Prompt, chat_ids, fitting, load_prompts, prompts_sha256
from nest_rs.report import model_card
from nest_rs.sites import find_sites

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nest_rs.targets import TrainingData

log = logging.getLogger(__name__)

STAGES = ("probe", "cluster", "train", "merge", "eval", "export")
# Stages that the processes of `accelerate launch` share; the others are the first one's alone.
_SHARED = ("probe", "train")
# Prompts on which the moments of a layer's inputs are taken.
_MOMENT_PROMPTS = 512
_TOOLS = ("nest-rs", "torch", "transformers", "peft", "numpy")


class Run:
    """One run folder and the stages that fill it.

    Attributes:
        folder: `runs/<model>/<run>/`.
        config: Its settings.
    """

    def __init__(self, folder: Path, config: TuneConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def start(cls, config: TuneConfig) -> Run:
        """Make the run folder, or take up an existing one with `resume`.

        Raises:
            NestError: the folder exists and `resume` is not set, or it holds another configuration.
        """
        base = resolve(config.model)
        folder = config.out or Path("runs") / base.slug / f"{config.preset}-seed{config.seed}"
        if config.resume and (folder / "config.yaml").is_file():
            run = cls.open(folder)
            before, now = (item.model_dump(exclude={"out", "resume"}) for item in (run.config, config))
            changed = [key for key in now if now[key] != before[key]]
            if changed:
                raise NestError(
                    f"the run `{folder}` was started with another `{changed[0]}` (`{before[changed[0]]}`)",
                    mend="resume with the same settings, or start a new run with --out",
                )
            return run
        if is_main():
            with new_folder(folder) as scratch:
                config.save(scratch / "config.yaml")
                write_json(scratch / "env.json", environment())
        wait()
        return cls(folder, config)

    def beside(self, folder: Path, **changes: Any) -> Run:
        """Another run of this base on what this one has loaded, with some settings changed."""
        run = Run(folder, self.config.model_copy(update=changes))
        for name in ("base", "tokenizer", "model", "prompts"):
            run.__dict__[name] = getattr(self, name)
        return run

    def take_probe(self, other: Run) -> None:
        """Use the activations and probes of another run, made first if they are not there.

        For runs that differ in what comes after the probe alone.
        """
        if not other.finished("probe"):
            other.stage("probe")
        if self.finished("probe"):
            return
        with new_folder(self.folder / "probe", overwrite=True) as scratch:
            shutil.copytree(other.folder / "probe", scratch, dirs_exist_ok=True, copy_function=_link)
        kept = ("model", "sites", "prompts", "total_params")
        before = other.summary()
        seconds = {"probe": before["seconds"]["probe"]}
        write_json(self.folder / "summary.json", {**{key: before[key] for key in kept}, "seconds": seconds})

    @classmethod
    def open(cls, folder: Path, overrides: dict[str, Any] | None = None) -> Run:
        """An existing run, with some settings changed for the stages to come.

        Raises:
            NestError: there is no run in the folder.
        """
        run = cls.read(folder, overrides)
        if is_main():
            run.config.save(folder / "config.yaml")
        return run

    @classmethod
    def read(cls, folder: Path, overrides: dict[str, Any] | None = None) -> Run:
        """As `open`, but the folder stays as it is."""
        if not (folder / "config.yaml").is_file():
            raise NestError(f"no run in `{folder}`", mend="start one with nest-rs tune or nest-rs probe")
        return cls(folder, build_config(read_yaml(folder / "config.yaml"), overrides or {}))

    # What the stages share, made when first used.

    @cached_property
    def base(self) -> Base:
        """The base on disk."""
        return resolve(self.config.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return load_tokenizer(self.base.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base, frozen, in the compute dtype."""
        return self._load(self.base.folder)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompt set."""
        return load_prompts(self.config.prompts)

    @cached_property
    def training_data(self) -> TrainingData:
        """What there is to learn, in steps."""
        from nest_rs.targets import training_data

        return training_data(self.config, self.base, self.model, self.tokenizer, self.prompts)

    def _load(self, folder: Path) -> PreTrainedModel:
        import torch

        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        device = pick_device(self.config.device)
        return load_model(folder, device=device, dtype=pick_dtype(self.config.dtype, device))

    def _training_prompts(self, kinds: tuple[str, ...]) -> list[Prompt]:
        return [item for item in self.prompts if item.split == "train" and item.kind in kinds]

    # The stages.

    def probe(self) -> dict[str, Any]:
        """Read the activations of harmful and harmless requests, and fit one probe a site."""
        sites = find_sites(self.model, self.config.projections, self.config.depth)
        harmful = self._training_prompts(("harmful",))
        harmless = self._training_prompts(("benign", "twin"))
        # Equal numbers, so that the probe's threshold is not the base rate.
        rng = random.Random(self.config.seed)
        size = min(len(harmful), len(harmless), self.config.probe_prompts)
        chosen = rng.sample(harmful, size) + rng.sample(harmless, size)
        ids = chat_ids(self.tokenizer, [item.prompt for item in chosen])
        kept = fitting(ids, [item.id for item in chosen], self._context())
        order = sorted(kept, key=lambda index: len(ids[index]))
        label = np.array([chosen[index].kind == "harmful" for index in order])
        path = self.folder / "probe" / "activations.safetensors"
        path.parent.mkdir(exist_ok=True)
        collect_activations(
            self.model,
            sites,
            [ids[index] for index in order],
            path,
            pad=self.tokenizer.pad_token_id,
            base=self.base.fingerprint(),
        )
        result = {"sites": len(sites), "prompts": len(order)}
        if not is_main():
            return result
        coefs, accuracy = fit_probes(ActivationStore.open(path), label, c=self.config.c, threads=self.config.threads)
        save_probes(coefs, path.with_name("probes.safetensors"))
        write_json(path.with_name("prompts.json"), [[chosen[index].id, chosen[index].kind] for index in order])
        write_json(path.with_name("accuracy.json"), accuracy)
        return result

    def cluster(self) -> dict[str, Any]:
        """Select the neurons that stand out and cluster them."""
        config = self.config
        folder = self.folder / "probe"
        if not (folder / "activations.safetensors").is_file():
            raise NestError(f"no activations in `{folder}`", mend="run the probe stage first")
        store = ActivationStore.open(folder / "activations.safetensors")
        harmful = np.array([kind == "harmful" for _, kind in read_json(folder / "prompts.json")])
        neurons = select_and_cluster(
            store,
            load_probes(folder / "probes.safetensors", list(store.sites)),
            harmful,
            z=config.z,
            positive=config.positive,
            clustering=config.clustering,
            k_max=config.k_max,
            min_silhouette=config.min_silhouette,
            standardize=config.standardize,
            seed=config.seed,
            threads=config.threads,
        )
        save_neurons(neurons, self.folder / "neurons.safetensors")
        return {
            "neurons": sum(len(site.rows) for site in neurons.values()),
            "clusters": sum(site.clusters for site in neurons.values()),
        }

    def train(self) -> dict[str, Any]:
        """Train the tied deltas and write the patch."""
        import torch
        from peft import get_peft_model

        from nest_rs.newton import newton_step
        from nest_rs.tuner import NestConfig

        config = self.config
        neurons = load_neurons(self.folder / "neurons.safetensors")
        data = self.training_data
        whitening = self._whitening(list(neurons), data) if config.whiten else None
        torch.manual_seed(config.seed)
        # A neuron with a delta of its own has nothing to tie it to.
        learn_ties = config.tie_rate > 0 and config.clustering != "strong"
        model: PeftModel = get_peft_model(
            self.model, NestConfig.from_neurons(neurons, learn_ties=learn_ties, task_type="CAUSAL_LM")
        )
        checkpoints = self.folder / "train"
        losses = self.fit(model, data, checkpoints, learning_rate=config.learning_rate, whitening=whitening)
        if data.decisions:
            with track("newton", total=len(data.decisions), unit="requests") as advance:
                newton_step(
                    model,
                    data.steps,
                    data.decisions,
                    damping=config.newton_damping,
                    bias=config.refusal_bias,
                    whitening=whitening,
                    progress=advance,
                )
        patch = NestPatch.from_model(model)
        patch.manifest = self._manifest()
        patch = patch.seal(self.base.folder)
        if is_main():
            patch.save(self.folder / "patch" / FILE_NAME)
        self.__dict__["model"] = model.unload()  # the bare base again, for the evaluation
        shutil.rmtree(checkpoints, ignore_errors=True)  # of use only to a run that was cut short
        for entry in losses:
            self._log("loss", entry)
        return {"trainable_params": patch.trainable_params, "steps": data.count, "loss": losses[-1]["loss"]}

    def fit(
        self,
        model: PeftModel | PreTrainedModel,
        data: TrainingData,
        checkpoints: Path,
        *,
        learning_rate: float,
        **how: Any,
    ) -> list[dict[str, float]]:
        """Train what is trainable of a model by the run's losses and steps; `how` as for `train_deltas`.

        Where memory runs out, the steps are computed in parts of half the size: from the last checkpoint, or anew.
        """
        import torch
        from peft import PeftModel

        from nest_rs.train import train_deltas

        config = self.config
        trained = [value for value in model.parameters() if value.requires_grad]
        start = [value.detach().clone() for value in trained] if isinstance(model, PeftModel) else []

        def attempt(pairs: int) -> list[dict[str, float]]:
            parts = data.finer(pairs)
            begun = any(checkpoints.glob("checkpoint-*"))
            resume = begun and (config.resume or pairs < data.pairs)
            for value, first in zip(trained, start, strict=False):
                value.data.copy_(first)
                value.grad = None
            with track("train", total=data.count, unit="steps") as advance:
                return train_deltas(
                    model,
                    self.tokenizer,
                    parts.steps,
                    output_dir=str(checkpoints),
                    learning_rate=learning_rate,
                    tie_rate=config.tie_rate,
                    benign_loss=config.benign_loss,
                    benign_weight=config.benign_weight,
                    accumulate=parts.parts,
                    first_weight=config.first_weight,
                    margin_weight=config.margin_weight,
                    teacher_weight=config.teacher_weight,
                    text_weight=config.text_weight,
                    seed=config.seed,
                    bf16=model.dtype == torch.float32 and pick_dtype("auto", model.device) == torch.bfloat16,
                    resume=resume,
                    progress=advance,
                    **how,
                )

        # Processes would wait for the one that starts again, and only an adapter is small enough to be kept twice.
        if share()[1] > 1 or not isinstance(model, PeftModel):
            return attempt(data.pairs)
        return halving(attempt, data.pairs, "requests of each class at a time")[0]

    def _whitening(self, modules: list[str], data: TrainingData) -> dict[str, torch.Tensor]:
        from nest_rs.whiten import whitenings

        rng = random.Random(self.config.seed)
        asked = [rng.sample(items, min(len(items), _MOMENT_PROMPTS // 2)) for items in (data.harmful, data.benign)]
        return whitenings(
            self.model,
            [site for site in find_sites(self.model) if site.module in modules],
            [example.prompt + example.answer for items in asked for example in items],
            damping=self.config.whiten or 0.0,
            pad=self.tokenizer.pad_token_id,
        )

    def _manifest(self) -> dict[str, Any]:
        return {
            "method": "nest",
            "base": {"id": self.base.id, "revision": self.base.revision},
            "prompts_sha256": prompts_sha256(self.prompts),
            "settings": self.config.model_dump(mode="json", exclude={"model", "out", "resume", "prompts", "threads"}),
            "tools": {name: version(name) for name in _TOOLS},
        }

    def merge(self) -> dict[str, Any]:
        """Fold the patch into a copy of the base."""
        patch = NestPatch.load(self.folder / "patch")
        report = merge_folder(
            self.base, patch, self.folder / "merged", card=model_card(self.base, patch), overwrite=True
        )
        write_json(self.folder / "patch" / "nest_patch.json", {**patch.document(), "folded": report})
        if max(len(change.delta) for change in patch.tensors.values()) <= RANKS[-1]:
            patch.to_lora(self.folder / "adapter", overwrite=True)
        changed = sum(entry["changed"] for entry in report.values())
        return {"changed_elements": changed}

    def evaluate(self) -> dict[str, Any]:
        """Judge the base and the merged model on the same suites."""
        config = self.config
        suites = load_suites(config.suite, config.limit)
        merged = self.folder / "merged"
        if not merged.is_dir():
            raise NestError(f"no merged model in `{self.folder}`", mend="run the merge stage first")
        found: dict[str, Any] = {}
        for name in ("base", "tuned"):
            model = self.model if name == "base" else self._load(merged)
            found[name] = evaluate_refusal(
                model,
                self.tokenizer,
                suites,
                self.folder / "eval" / name,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.eval_batch_size,
                label=f"judge {name}",
                early=not config.whole_answers,
            )
            utility = {path.stem: measure_utility(model, self.tokenizer, path) for path in config.utility}
            if utility:
                write_json(self.folder / "eval" / name / "utility.json", utility)
                found.setdefault("utility", {})[name] = utility
        attach_evidence(self.folder, found, max_new_tokens=config.max_new_tokens)
        worse = standing_out(suites, found["tuned"], self.folder / "eval" / "tuned")
        utility = found.pop("utility", None)
        return {"eval": found, "standing_out": worse, **({"utility": utility} if utility else {})}

    def export(self) -> dict[str, Any]:
        """Export the merged model to ONNX and compare it with torch."""
        config = self.config
        merged, out = self.folder / "merged", self.folder / "onnx"
        if not merged.is_dir():
            raise NestError(f"no merged model in `{self.folder}`", mend="run the merge stage first")
        export_onnx(merged, out, precision=config.precision, overwrite=True)
        held_out = [item.prompt for item in self.prompts if item.split != "train"] or [
            item.prompt for item in self.prompts
        ]
        ids = chat_ids(self.tokenizer, held_out)
        parity = check_parity(merged, out, sample_of_like_length(ids, config.parity_prompts, config.seed))
        return {"export": {"path": str(out), "precision": config.precision, **parity}}

    # Bookkeeping.

    def stage(self, name: str) -> dict[str, Any]:
        """Run one stage, time it, and add its result to `summary.json`."""
        log.info("%s ...", name)
        self._log("start", {"stage": name})
        started = time.perf_counter()
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "probe": self.probe,
            "cluster": self.cluster,
            "train": self.train,
            "merge": self.merge,
            "eval": self.evaluate,
            "export": self.export,
        }
        result = work[name]() if is_main() or name in _SHARED else {}
        seconds = round(time.perf_counter() - started, 2)
        if not is_main():
            wait()
            return self.summary()
        summary = self.summary()
        summary |= {
            "model": self.config.model,
            "method": "nest",
            "preset": self.config.preset,
            "seed": self.config.seed,
            "total_params": self._total_params(),
            **result,
            "seconds": {**summary.get("seconds", {}), name: seconds},
        }
        write_json(self.folder / "summary.json", summary)
        self._log("end", {"stage": name, "seconds": seconds})
        log.info("%s done in %.1f s", name, seconds)
        wait()
        return summary

    def summary(self) -> dict[str, Any]:
        """`summary.json` as it stands; empty before the first stage."""
        path = self.folder / "summary.json"
        summary: dict[str, Any] = read_json(path) if path.is_file() else {}
        return summary

    def finished(self, stage: str) -> bool:
        """Whether a stage has ended."""
        return stage in self.summary().get("seconds", {})

    def _total_params(self) -> int:
        known = self.summary().get("total_params")
        return int(known) if known else self.model.num_parameters()

    def _context(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)

    def _log(self, event: str, values: dict[str, Any]) -> None:
        if not is_main():
            return
        with (self.folder / "run.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n")


def _link(source: str, target: str) -> None:
    """Activations are large and never rewritten in place: the same file under a second name, where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def environment() -> dict[str, Any]:
    """What a run was made with."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.cpu.get_capabilities().get("architecture", platform.machine()),
        "cores": os.cpu_count(),
        "accelerator": str(accelerator) if accelerator else None,
        "packages": {name: version(name) for name in _TOOLS},
    }


def tune(model: str | None = None, **settings: Any) -> dict[str, Any]:
    """Run all stages: find the neurons, train, fold, judge and export.

    Args:
        model: A base (see `nest_rs.models.resolve`); the built-in default without it.
        settings: Fields of `TuneConfig`.

    Returns:
        The run's `summary.json`, with `run`, the folder.

    Raises:
        NestError: bad settings or input; one line that says which.
    """
    config = build_config({**({"model": model} if model else {}), **settings})
    return run_all(config)


def run_all(config: TuneConfig) -> dict[str, Any]:
    """All stages of a configuration; with `resume`, those not yet done."""
    if config.export:
        require_onnx()
    load_suites(config.suite, config.limit)  # a wrong name should fail now, not after training
    check_utility(config.utility)
    load_prompts(config.prompts)
    run = Run.start(config)
    for name in STAGES:
        if (name == "export" and not config.export) or (config.resume and run.finished(name)):
            continue
        run.stage(name)
    return {"run": str(run.folder), **run.summary()}
