"""The command line. Each command is a model of its flags; settings shared by the stages are `TuneConfig`'s."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, SettingsConfigDict, SettingsError
from rich.console import Console

from nest_rs.command import Command
from nest_rs.config import TuneConfig, build_config, explain, read_yaml
from nest_rs.errors import NestError
from nest_rs.export import Precision
from nest_rs.patch_commands import Apply, Inspect, Remove, Sign, Verify


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

    def run(self) -> dict[str, Any]:
        from nest_rs.run import run_all

        return run_all(build_config(self.given()))


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


class Eval(Command):
    """Judge a model on suites; for a run folder without --suite, its base and merged model on the run's suites."""

    model: CliPositionalArg[str] = Field("smollm2-135m", description="model, merged folder or run folder")
    suite: list[str] = Field([], description=".jsonl files (`prompt` in each line) or names")
    attacks: list[Path] = Field(
        [], description=".jsonl templates to wrap each request in, judged beside the plain ones"
    )
    judge: str = Field("refusal", description="refusal: does the answer start by declining")
    utility: list[Path] = Field([], description=".jsonl choice sets (accuracy) and .txt files (perplexity)")
    max_new_tokens: int = Field(32, ge=1, description="tokens of an answer")
    limit: int | None = Field(None, ge=1, description="first rows of each suite only")
    batch_size: int = Field(32, ge=1, description="answers decoded together")
    out: Path | None = Field(None, description="where results.json and samples.jsonl go (default eval/<model>)")
    device: str = Field("auto", description="auto, cpu, cuda, ...")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    threads: int | None = Field(None, ge=1, description="processor threads")

    def run(self) -> dict[str, Any]:
        import torch

        from nest_rs.evaluate.refusal import evaluate_refusal
        from nest_rs.evaluate.suites import BUILTIN_SUITES, attack, load_suites
        from nest_rs.evaluate.utility import check_utility, measure_utility
        from nest_rs.files import write_json
        from nest_rs.models import load_model, load_tokenizer, pick_device, pick_dtype, resolve
        from nest_rs.run import Run

        if self.judge != "refusal":
            raise NestError(f"no such judge: `{self.judge}`", mend="use refusal")
        is_run = (Path(self.model) / "config.yaml").is_file()
        if is_run and not self.suite and not self.utility:
            return {"run": self.model, **Run.open(Path(self.model)).stage("eval")}
        # Everything named is looked at before the model is loaded.
        suites = load_suites(self.suite or ([] if self.utility else list(BUILTIN_SUITES)), self.limit)
        for path in self.attacks:
            suites += attack(suites[: len(self.suite or BUILTIN_SUITES)], path)
        check_utility(self.utility)
        base = resolve(str(Path(self.model) / "merged") if is_run else self.model)
        if self.threads:
            torch.set_num_threads(self.threads)
        device = pick_device(self.device)
        model = load_model(base.folder, device=device, dtype=pick_dtype(self.dtype, device))
        tokenizer = load_tokenizer(base.folder)
        out = self.out or Path("eval") / base.slug
        results: dict[str, Any] = {}
        if suites:
            results = evaluate_refusal(
                model, tokenizer, suites, out, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
            )
        utility = {path.stem: measure_utility(model, tokenizer, path, limit=self.limit) for path in self.utility}
        if utility:
            write_json(out / "utility.json", utility)
        return {**results, **utility}

    def show(self, result: dict[str, Any]) -> None:
        from nest_rs.report import percent

        if "eval" in result:
            _Settings.show(self, result)  # type: ignore[arg-type]
            return
        for name, found in result.items():
            text = percent(found) if "refused" in found else ", ".join(f"{key} {value}" for key, value in found.items())
            print(f"{name}: {text}")


class Export(Command):
    """Export a run's merged model, or any Hugging Face folder, to ONNX Runtime, and compare it with torch."""

    folder: CliPositionalArg[Path] = Field(description="run folder or model folder")
    out: Path | None = Field(None, description="new folder for the export (a model folder needs it)")
    precision: Precision = Field("fp32", description="of the weights")

    def run(self) -> dict[str, Any]:
        from nest_rs.export import check_parity, export_onnx
        from nest_rs.models import load_tokenizer, resolve
        from nest_rs.prompts import embedded_prompts, encode, render
        from nest_rs.run import Run

        if (self.folder / "config.yaml").is_file():
            run = Run.open(self.folder, {key: self.precision for key in ("precision",) if key in self.model_fields_set})
            return {"run": str(self.folder), **run.stage("export")}
        if self.out is None:
            raise NestError("no output named for the export", mend="pass --out FOLDER")
        base = resolve(str(self.folder))
        export_onnx(base.folder, self.out, precision=self.precision)
        tokenizer = load_tokenizer(base.folder)
        prompts = [item.prompt for item in embedded_prompts() if item.split == "validation"][:32]
        parity = check_parity(base.folder, self.out, encode(tokenizer, [render(tokenizer, text) for text in prompts]))
        return {"export": {"path": str(self.out), "precision": self.precision, **parity}}

    def show(self, result: dict[str, Any]) -> None:
        for key, value in result["export"].items():
            print(f"{key}: {value}")


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
    apply: CliSubCommand[Apply]
    remove: CliSubCommand[Remove]
    verify: CliSubCommand[Verify]
    inspect: CliSubCommand[Inspect]
    sign: CliSubCommand[Sign]
    env: CliSubCommand[Env]


def _normalise(arguments: list[str]) -> list[str]:
    """Accept `--snake_case` flags, and several values after a list flag (`--suite A B`)."""
    lists = {"--suite", "--utility", "--attacks", "--projections", "--depth", "--others"}
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
    quiet = "--quiet" in arguments or "--help" in arguments
    logging.basicConfig(level=logging.WARNING, format="nest-rs: %(message)s", stream=sys.stderr)
    # The libraries' deprecation notes are ours to act on, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("nest_rs").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        settings = CliApp.run(NestRs, cli_args=_normalise(arguments or ["--help"]))
        command: Command = next(value for value in vars(settings).values() if value is not None)
        result = command.run()
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
