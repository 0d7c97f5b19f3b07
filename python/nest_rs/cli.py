"""The command line. Each command is a model of its flags; settings shared by the stages are `TuneConfig`'s."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, SettingsConfigDict, SettingsError
from rich.console import Console

from nest_rs.command import Command
from nest_rs.config import TuneConfig, build_config, explain, read_yaml
from nest_rs.errors import NestError
from nest_rs.export import Precision
from nest_rs.patch_commands import Apply, Inspect, Remove, Sign, Verify
from nest_rs.processes import is_main

if TYPE_CHECKING:
    from nest_rs.evaluate.evaluation import Evaluation
    from nest_rs.evaluate.gates import Gate, Metric


def _with_settings(name: str, base: type[BaseModel], doc: str, *, leave_out: set[str]) -> type[Any]:
    """A command that takes the settings of a run as flags (without defaults: only given flags override)."""
    fields: dict[str, Any] = {
        key: (field.annotation, Field(field.get_default(call_default_factory=True), description=field.description))
        for key, field in TuneConfig.model_fields.items()
        if key not in leave_out
    }
    fields["config"] = (Path | None, Field(None, description="YAML file of settings; flags win"))
    return create_model(name, __base__=base, __doc__=doc, **fields)


class _Settings(Command):
    def given(self) -> dict[str, Any]:
        """The settings from the file and, over them, the flags."""
        config: Path | None = getattr(self, "config", None)
        layers = read_yaml(config) if config else {}
        flags = {key: getattr(self, key) for key in self.model_fields_set if key in TuneConfig.model_fields}
        return {**{key.replace("-", "_"): value for key, value in layers.items()}, **flags}

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.report import before_after, facts

        out = Console()
        if "eval" in result:
            out.print(before_after(result))
        if "trainable_params" in result:
            for line in facts(result):
                out.print(line)
        out.print(f"run folder: {result['run']}")


class _Tune(_Settings):
    model: CliPositionalArg[str] = Field("smollm2-135m", description="base model")
    search: int | None = Field(None, ge=1, description="only try so many recipes, and show the front on validation")

    def run(self) -> dict[str, Any]:
        from nest_rs.run import run_all
        from nest_rs.search import search

        config = build_config(self.given())
        return search(config, self.search) if self.search else run_all(config)

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.search import table

        if "trials" not in result:
            super().show(result)
            return
        out = Console()
        out.print(table(result))
        flags = " ".join(
            f"--{name.replace('_', '-')} {value:g}"
            for name, value in result["trials"][result["best"]]["settings"].items()
        )
        out.print(f"least sum: nest-rs tune {self.model} {flags}")


class _Probe(_Settings):
    model: CliPositionalArg[str] = Field("smollm2-135m", description="base model")

    def run(self) -> dict[str, Any]:
        from nest_rs.run import Run

        run = Run.start(build_config(self.given()))
        return {"run": str(run.folder), **run.stage("probe")}


class _Stage(_Settings):
    folder: CliPositionalArg[Path] = Field(description="run folder")

    def run(self) -> dict[str, Any]:
        from nest_rs.run import Run

        run = Run.open(self.folder, self.given())
        return {"run": str(self.folder), **run.stage(type(self).__name__.lower())}


class _Compare(_Settings):
    model: CliPositionalArg[str] = Field("smollm2-135m", description="base model")
    methods: list[str] = Field(
        ["base", "nest", "lora", "full", "circuit-breaker", "random-rows", "random-clusters"],
        description="rows, lora-r1 among them; each baseline takes the best rate of its grid",
    )
    seeds: list[int] = Field([0], description="seeds; the table gives means over them")
    suite: list[str] = Field(["nest-harmful"], description="suites to refuse: .jsonl files or names")
    benign: list[str] = Field(["nest-benign"], description="suites to answer: .jsonl files or names")
    attacks: list[str] = Field([], description="names or .jsonl files: the suites' requests wrapped, beside them bare")
    attack_limit: int | None = Field(None, ge=1, description="wrap the first requests of each suite only")
    rates: dict[str, float] = Field({}, description="learning rates given and not chosen: method=rate")
    trial_share: float = Field(0.4, gt=0, le=1, description="share of the steps when rates are tried")
    stress: bool = Field(False, description="add rows of each model abliterated, pruned and attacked by fine-tuning")
    restore: bool = Field(False, description="add rows of fine-tunes, and of what restores their safety")
    tasks: Path | None = Field(None, description=".jsonl of `prompt` and `response` to fine-tune on (default: own)")

    def run(self) -> dict[str, Any]:
        from nest_rs.compare.comparison import compare

        given = {"suite": self.suite, **self.given()}
        return compare(
            build_config(given),
            methods=self.methods,
            seeds=self.seeds,
            benign=self.benign,
            attacks=self.attacks,
            attack_limit=self.attack_limit,
            rates=self.rates,
            trial_share=self.trial_share,
            stress=self.stress,
            fine_tunes=self.restore,
            tasks=self.tasks,
        )

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.compare.table import terminal

        out = Console()
        out.print(terminal(result["table"]))
        out.print(f"folder: {result['folder']}")


_FIXED = {"model", "out", "resume", "preset"}
Tune = _with_settings(
    "Tune", _Tune, "Find the neurons, train, fold, judge and export: the whole road.", leave_out={"model"}
)
Probe = _with_settings("Probe", _Probe, "Start a run: read activations and fit a probe a site.", leave_out={"model"})
Cluster = _with_settings("Cluster", _Stage, "Select and cluster the neurons of a run.", leave_out=_FIXED)
Train = _with_settings(
    "Train", _Stage, "Train the tied deltas of a run and write its patch.", leave_out=_FIXED - {"resume"}
)
Merge = _with_settings("Merge", _Stage, "Fold a run's patch into a copy of its base.", leave_out=_FIXED)

Compare = _with_settings(
    "Compare",
    _Compare,
    "Put NeST beside LoRA, full fine-tuning, circuit breakers and controls: one table. Finished rows are kept.",
    leave_out={"model", "resume", "seed", "suite", "export", "precision", "parity_prompts"},
)


class Eval(Command):
    """Judge a model on suites; for a run folder without --suite, its base and merged model on the run's suites.

    A suite counts as harmful or benign by the `kind` column of its file, or by its name. Exit status 3: a gate failed.
    """

    model: CliPositionalArg[str] = Field("smollm2-135m", description="model, merged folder or run folder")
    suite: list[str] = Field([], description=".jsonl files (`prompt` in each line) or names, such as harmbench")
    attacks: list[str] = Field(
        [], description="names, such as base64 or prefill, or .jsonl files; judged beside the plain requests"
    )
    attack_limit: int | None = Field(None, ge=1, description="wrap the first requests of each suite only")
    judge: list[str] = Field(
        ["refusal"], description="refusal (always asked), guard:MODEL, endpoint:URL or endpoint:URL#MODEL"
    )
    utility: list[Path] = Field([], description=".jsonl choice or GSM8K sets (accuracy) and .txt files (perplexity)")
    lm_eval: list[str] = Field([], description="tasks of lm-eval")
    kl_to: str | None = Field(None, description="base to measure the divergence from, on benign requests")
    fail_if: list[str] = Field(
        [], description="gates, such as 'asr>5%' or 'over_refusal>+2pp'; exit status 3 if one holds"
    )
    baseline: str | None = Field(None, description="results .json, or a model, that relative gates compare with")
    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens of an answer (32; 256 with a judge that reads the whole answer)"
    )
    limit: int | None = Field(None, ge=1, description="first rows of each suite only")
    batch_size: int = Field(32, ge=0, description="answers decoded together; 0: as many as fit")
    backend: Literal["torch", "onnx", "vllm"] = Field("torch", description="what writes the answers")
    whole_answers: bool = Field(False, description="judge whole answers, not only until every verdict stands")
    out: Path | None = Field(None, description="where results.json and samples.jsonl go (default eval/<model>)")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    threads: int | None = Field(None, ge=1, description="processor threads")

    def run(self) -> dict[str, Any]:
        import torch

        from nest_rs.evaluate.attacks import with_attacks
        from nest_rs.evaluate.backends import find_export
        from nest_rs.evaluate.evaluation import Evaluation
        from nest_rs.evaluate.gates import Gate, apply_gates, check_gates, expected, measured
        from nest_rs.evaluate.harness import Harness
        from nest_rs.evaluate.judges import load_judges
        from nest_rs.evaluate.suites import BUILTIN_SUITES, load_suites
        from nest_rs.models import resolve

        # Everything named is looked at before a model is loaded.
        gates = [Gate.parse(text) for text in self.fail_if]
        is_run = (Path(self.model) / "config.yaml").is_file()
        if is_run and not self.model_fields_set & _BEYOND_A_RUN:
            return self._judge_run(gates)
        no_answers = self.utility or self.lm_eval or self.kl_to
        asked = self.suite or ([] if no_answers and not self.attacks else list(BUILTIN_SUITES))
        judges = load_judges(self.judge, device=self.device, dtype=self.dtype, batch_size=self.batch_size)
        plan = Evaluation(
            suites=with_attacks(load_suites(asked, self.limit), self.attacks, self.attack_limit),
            judges=judges,
            utility=self.utility,
            harness=Harness(self.lm_eval) if self.lm_eval else None,
            kl_to=resolve(self.kl_to) if self.kl_to else None,
            max_new_tokens=self.max_new_tokens or (256 if judges else 32),
            limit=self.limit,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
            early=not (self.whole_answers or judges),
        )
        check_gates(gates, expected(plan.suites, [judge.name for judge in judges], plan.shares))
        before = self._baseline(gates, plan)
        name = str(Path(self.model) / ("onnx" if self.backend == "onnx" else "merged")) if is_run else self.model
        base = find_export(Path(name)) if self.backend == "onnx" else resolve(name)
        if self.threads:
            torch.set_num_threads(self.threads)
        out = self.out or Path("eval") / base.slug
        results = plan.run(base, out)
        if gates:
            compared = before(out / "baseline") if before else {}
            results["gates"] = apply_gates(gates, measured(results, plan.suites), compared)
        return results

    def _judge_run(self, gates: list[Gate]) -> dict[str, Any]:
        """A run's base and merged model on the run's suites; relative gates compare the two."""
        from nest_rs.evaluate.gates import apply_gates, check_gates, expected, measured
        from nest_rs.evaluate.suites import load_suites
        from nest_rs.run import Run

        names = {"batch_size": "eval_batch_size"}
        given = self.model_fields_set & {"max_new_tokens", "limit", "batch_size", "device", "dtype", "threads"}
        run = Run.open(Path(self.model), {names.get(name, name): getattr(self, name) for name in given})
        suites = load_suites(run.config.suite, run.config.limit)
        check_gates(gates, expected(suites, [], {path.stem: path.suffix == ".jsonl" for path in run.config.utility}))
        result = {"run": self.model, **run.stage("eval")}
        if gates:
            base, tuned = (
                measured({**result["eval"][side], **result.get("utility", {}).get(side, {})}, suites)
                for side in ("base", "tuned")
            )
            result["gates"] = apply_gates(gates, tuned, base)
        return result

    def _baseline(self, gates: list[Gate], plan: Evaluation) -> Callable[[Path], dict[str, Metric]] | None:
        """What gives the figures that relative gates compare with, once there is a folder for a baseline's answers."""
        from nest_rs.evaluate.gates import check_baseline, measured
        from nest_rs.files import read_json
        from nest_rs.models import resolve

        relative = [gate for gate in gates if gate.relative]
        if self.baseline is None:
            if relative:
                raise NestError(
                    f"the gate `{relative[0].text}` compares with nothing", mend="pass --baseline RESULTS.json or MODEL"
                )
            return None
        if not relative:
            raise NestError(
                f"no gate compares with the baseline `{self.baseline}`", mend="give one such as asr>+2pp to --fail-if"
            )
        path = Path(self.baseline)
        if path.suffix == ".json":
            beside = path.with_name("utility.json")
            stored = {**read_json(path), **(read_json(beside) if beside.is_file() else {})}
            found = measured(stored, plan.suites)
            check_baseline(gates, found)
            return lambda _: found
        base = resolve(self.baseline)
        return lambda out: measured(plan.run(base, out), plan.suites)

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.report import judged

        if "eval" in result:
            _Settings.show(self, result)  # type: ignore[arg-type]
            return
        for line in judged(result):
            print(line)

    def status(self, result: dict[str, Any]) -> int:
        """3 if a gate failed, each with its line on stderr."""
        lines = [gate["line"] for gate in result.get("gates", []) if gate["failed"]]
        for line in lines:
            print(f"nest-rs: {line}", file=sys.stderr)
        return 3 if lines else 0


# Flags with which a run folder is judged as any model is, not by its own stage.
_BEYOND_A_RUN = {"suite", "utility", "attacks", "judge", "kl_to", "lm_eval", "baseline"}


class Export(Command):
    """Export a run's merged model, or any Hugging Face folder, to ONNX Runtime, and compare it with torch."""

    folder: CliPositionalArg[Path] = Field(description="run folder or model folder")
    out: Path | None = Field(None, description="new folder for the export (a model folder needs it)")
    precision: Precision = Field("fp32", description="of the weights")

    def run(self) -> dict[str, Any]:
        from nest_rs.export import check_parity, export_onnx, sample_of_like_length
        from nest_rs.models import load_tokenizer, resolve
        from nest_rs.prompts import chat_ids, embedded_prompts
        from nest_rs.run import Run

        if (self.folder / "config.yaml").is_file():
            run = Run.open(self.folder, {key: self.precision for key in ("precision",) if key in self.model_fields_set})
            return {"run": str(self.folder), **run.stage("export")}
        if self.out is None:
            raise NestError("no output named for the export", mend="pass --out FOLDER")
        base = resolve(str(self.folder))
        export_onnx(base.folder, self.out, precision=self.precision)
        tokenizer = load_tokenizer(base.folder)
        prompts = [item.prompt for item in embedded_prompts() if item.split == "validation"]
        ids = chat_ids(tokenizer, prompts)
        parity = check_parity(base.folder, self.out, sample_of_like_length(ids, 32, seed=0))
        return {"export": {"path": str(self.out), "precision": self.precision, **parity}}

    def show(self, result: dict[str, Any]) -> None:
        for key, value in result["export"].items():
            print(f"{key}: {value}")


class Update(Command):
    """Refuse one more category of harm, or one fewer: a second patch on top of a run's, which is not trained again."""

    folder: CliPositionalArg[Path] = Field(description="run folder with a patch")
    refuse: str | None = Field(None, description="category of the prompts to refuse from now on")
    allow: str | None = Field(None, description="category of the prompts to refuse no longer")
    prompts: Path | None = Field(None, description="prompt set with the category (default: the run's)")
    z: float | None = Field(None, description="select rows of the second patch above it (default: the run's)")
    steps: int = Field(60, ge=1, description="training steps of the second patch")
    out: Path | None = Field(None, description="new folder (default <run>/update-<category>)")

    def run(self) -> dict[str, Any]:
        from nest_rs.policy import update
        from nest_rs.run import Run

        changes = {"prompts": self.prompts, "z": self.z}
        run = Run.read(self.folder, {name: value for name, value in changes.items() if value is not None})
        out = self.out or self.folder / f"update-{self.refuse or self.allow}"
        return update(run, out, refuse=self.refuse, allow=self.allow, steps=self.steps)

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.report import percent

        for group, before in result["refused"]["before"].items():
            print(f"{group}: refused {percent(before)} -> {percent(result['refused']['after'][group])}")
        print(f"{result['trainable_params']:,} numbers trained; patch: {result['patch']}")


class Env(Command):
    """What this machine and installation offer."""

    def run(self) -> dict[str, Any]:
        from nest_rs.run import environment

        return environment()

    def show(self, result: dict[str, Any]) -> None:
        for key, value in result.items():
            print(f"{key}: {value}")


class NestRs(BaseSettings):
    """Make an open-weight language model refuse what it should, by moving almost nothing."""

    model_config = SettingsConfigDict(
        cli_prog_name="nest-rs",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )

    tune: CliSubCommand[Tune]  # type: ignore[valid-type]
    probe: CliSubCommand[Probe]  # type: ignore[valid-type]
    cluster: CliSubCommand[Cluster]  # type: ignore[valid-type]
    train: CliSubCommand[Train]  # type: ignore[valid-type]
    merge: CliSubCommand[Merge]  # type: ignore[valid-type]
    eval: CliSubCommand[Eval]
    export: CliSubCommand[Export]
    compare: CliSubCommand[Compare]  # type: ignore[valid-type]
    update: CliSubCommand[Update]
    apply: CliSubCommand[Apply]
    remove: CliSubCommand[Remove]
    verify: CliSubCommand[Verify]
    inspect: CliSubCommand[Inspect]
    sign: CliSubCommand[Sign]
    env: CliSubCommand[Env]


def _normalise(arguments: list[str]) -> list[str]:
    """Accept `--snake_case` flags, and several values after a list flag (`--suite A B`)."""
    lists = {"--suite", "--utility", "--attacks", "--judge", "--lm-eval", "--fail-if", "--projections", "--depth"}
    lists |= {"--methods", "--seeds", "--benign", "--rates", "--others"}
    out: list[str] = []
    open_list = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            # one-letter settings are short flags to the parser; the long form is taken as well
            argument = (name if len(name) > 3 else name[1:]) + equals + value
            open_list = argument if argument in lists else ""
        elif open_list and out[-1] != open_list:
            out.append(open_list)
        out.append(argument)
    return out


def entry() -> None:
    """The `nest-rs` script."""
    sys.exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, or 2 for a user's mistake)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    quiet = "--quiet" in arguments or "--help" in arguments or not is_main()
    logging.basicConfig(level=logging.WARNING, format="nest-rs: %(message)s", stream=sys.stderr)
    # The libraries' deprecation notes are ours to act on, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("nest_rs").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        settings = CliApp.run(NestRs, cli_args=_normalise(arguments or ["--help"]))
        command: Command = next(value for value in vars(settings).values() if value is not None)
        result = command.run()
        if not is_main():
            return 0
        if command.json_output:
            print(json.dumps(result, indent=2))
        else:
            command.show(result)
        return command.status(result)
    except ValidationError as error:
        return _fail(explain(error))
    except (NestError, SettingsError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(NestError("interrupted", mend="go on with --resume"), status=130)


def _fail(error: Exception, status: int = 2) -> int:
    print(f"nest-rs: error: {error}", file=sys.stderr)
    return status
