"""Export a merged folder to ONNX Runtime, and hold it against torch on real prompts.

The export is onnxruntime-genai's own model builder, run as a subprocess: what it writes, ONNX Runtime,
onnxruntime-genai and optimum load as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nest_rs.errors import NestError
from nest_rs.evaluate.backends import of_one_length, until_end
from nest_rs.files import new_folder, read_json
from nest_rs.models import load_config
from nest_rs.progress import track

# Prompts decoded together.
_TOGETHER = 8

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


def require_onnx() -> None:
    """Fail early, before hours of training, if the export cannot run.

    Raises:
        NestError: the packages are not installed.
    """
    missing = [name for name in ("onnxruntime_genai", "onnxruntime", "onnx_ir") if not importlib.util.find_spec(name)]
    if missing:
        raise NestError(
            f"the ONNX export needs `{missing[0]}`, which is not installed",
            mend="pip install 'nest-rs[onnx]', or pass --no-export",
        )


def export_onnx(folder: Path, out: Path, *, precision: Precision = "fp32", overwrite: bool = False) -> Path:
    """Build an ONNX Runtime folder from a Hugging Face folder.

    Args:
        folder: A merged (or base) checkpoint.
        out: A new folder: `model.onnx`, its data, `genai_config.json`, tokenizer and configs.
        precision: Of the weights. fp16 and bf16 are built for CUDA, as the builder knows no other way.
        overwrite: Replace `out`.

    Raises:
        NestError: the packages are missing, or the builder does not know the architecture.
    """
    require_onnx()
    provider = "cuda" if precision in ("fp16", "bf16") else "cpu"
    with new_folder(out, overwrite=overwrite) as scratch, tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(scratch)]
        command += ["-p", precision, "-e", provider, "-c", cache]
        # The builder stamps the graph with the commit of whatever repository its environment lies in; without one it
        # takes its own, and the same model gives the same bytes.
        environment = {**os.environ, "GIT_DIR": os.devnull}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode or not (scratch / "model.onnx").is_file():
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise NestError(f"the ONNX builder failed on `{folder}` ({reason[0]})")
        _copy_configs(folder, scratch)
    return out


def _copy_configs(folder: Path, out: Path) -> None:
    # The builder leaves these out, and readers such as optimum need them.
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    config = load_config(folder)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in config and "rope_theta" in rope:
        # Readers on transformers 4 look at the top level and would otherwise take 10000 without a word.
        config["rope_theta"] = rope["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_parity(folder: Path, onnx: Path, ids: Sequence[list[int]], *, new_tokens: int = 32) -> dict[str, int | float]:
    """Decode prompts greedily with ONNX Runtime, and score the same tokens with torch in float32.

    Each of ONNX Runtime's tokens is compared with torch's best token at that place, given the same tokens before it:
    all equal means that both write the same text.

    Args:
        folder: The checkpoint the export was made from.
        onnx: The export.
        ids: Token ids of the prompts, in chat form.
        new_tokens: Tokens decoded a prompt, or fewer if the answer ends.

    Returns:
        `max_abs_logit_diff`, `greedy_tokens_equal`, `greedy_tokens` (compared in all) and `prompts`.
    """
    import onnxruntime_genai as genai
    import torch

    from nest_rs.models import load_model

    reference = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    exported = genai.Model(str(onnx))
    stop = read_json(onnx / "genai_config.json")["model"]["eos_token_id"]
    ends = {stop} if isinstance(stop, int) else {*stop}
    worst, equal, total = 0.0, 0, 0
    with track("compare with ONNX", total=len(ids), unit="prompts") as advance, torch.inference_mode():
        for batch in ([ids[index] for index in group] for group in of_one_length(ids, _TOGETHER)):
            told, logits = _decode(genai, exported, batch, new_tokens)
            for row, prompt in enumerate(batch):
                tokens = until_end(told[row].tolist(), ends)
                scored = torch.tensor([prompt + tokens[:-1]])
                wanted = reference(input_ids=scored, logits_to_keep=len(tokens)).logits[0].numpy()
                worst = max(worst, float(np.abs(wanted - logits[row, : len(tokens)]).max()))
                equal += int((wanted.argmax(axis=-1) == np.array(tokens)).sum())
                total += len(tokens)
                advance(1)
    return {
        "max_abs_logit_diff": worst,
        "greedy_tokens_equal": equal,
        "greedy_tokens": total,
        "prompts": len(ids),
    }


def sample_of_like_length(ids: Sequence[list[int]], count: int, seed: int) -> list[list[int]]:
    """A random choice of prompts, as far as possible in groups of one length: those are decoded together."""
    rng = random.Random(seed)
    mixed = rng.sample(list(ids), len(ids))
    batches = of_one_length(mixed, _TOGETHER)
    rng.shuffle(batches)
    return [mixed[index] for batch in sorted(batches, key=len, reverse=True) for index in batch][:count]


def _decode(genai: Any, model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[Any, Any]:
    """Greedy tokens [n, tokens], and what follows an early end; the logits behind them [n, tokens, vocabulary]."""
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompts[0]) + new_tokens, do_sample=False, batch_size=len(prompts))
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    tokens, logits = [], []
    while not generator.is_done():
        found = generator.get_logits()
        logits.append(found.reshape(len(prompts), -1, found.shape[-1])[:, -1].copy())
        generator.generate_next_token()
        tokens.append(generator.get_next_tokens())
    return np.stack(tokens, axis=1), np.stack(logits, axis=1)
