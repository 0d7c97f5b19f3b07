"""Patching an ONNX export in place is the same as exporting the merged model again, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx")

from conftest import write_tiny_model  # noqa: E402
from nest_rs import NestError, NestPatch  # noqa: E402
from nest_rs.export import Precision, export_onnx  # noqa: E402
from test_deploy import UP, hashes, make_patch  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NestPatch, Path]:
    """A base, a patch for it, and the base with the patch on."""
    folder = tmp_path_factory.mktemp("onnx")
    base = write_tiny_model(folder / "base", head_dim=16)
    patch = make_patch(base)
    patch.apply(base, out=folder / "merged")
    return base, patch, folder / "merged"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_the_patched_export_is_the_export_of_the_merged_model(
    precision: Precision, world: tuple[Path, NestPatch, Path], tmp_path: Path
) -> None:
    base, patch, merged = world
    target = export_onnx(base, tmp_path / "target", precision=precision)
    wanted = export_onnx(merged, tmp_path / "wanted", precision=precision)
    before = hashes(target)
    assert patch.verify(target, base=base).state == "clean"
    if precision != "fp32":
        with pytest.raises(NestError, match="pass --base"):
            patch.apply(target)
    patch.apply(target, base=base)
    found = hashes(target)
    assert {name: found[name] for name in before} == hashes(wanted)
    assert patch.verify(target, base=base).state == "patched"
    patch.remove(target, base=base)
    assert hashes(target) == before
    patch.apply(target, base=base)
    shutil.rmtree(target / ".nest-rs")
    patch.remove(target, base=base)
    assert hashes(target) == before


def test_the_export_does_not_name_the_repository_it_was_made_in(exported: Path) -> None:
    """Else a commit between two exports of one model would tell them apart."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert model.producer_version == f"{genai.__version__}+{genai.__commit__[:7]}"


@pytest.fixture(scope="module")
def exported(world: tuple[Path, NestPatch, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(world[0], tmp_path_factory.mktemp("exported") / "onnx", precision="int4")


def edit(folder: Path, change: object) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)  # type: ignore[operator]
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def external(model: object, key: str, value: str) -> None:
    for tensor in model.graph.initializer:  # type: ignore[attr-defined]
        if tensor.name.startswith(UP.removesuffix(".weight")):
            entries = [entry for entry in tensor.external_data if entry.key == key]
            (entries[0] if entries else tensor.external_data.add(key=key)).value = value


def zero_points(model: object) -> None:
    for node in model.graph.node:  # type: ignore[attr-defined]
        if node.op_type == "MatMulNBits":
            node.input.append(node.input[2])


def rename_ops(model: object) -> None:
    for node in model.graph.node:  # type: ignore[attr-defined]
        node.op_type = "FusedMatMul" if node.op_type == "MatMulNBits" else node.op_type


def prepacked(model: object) -> None:
    for node in model.graph.node:  # type: ignore[attr-defined]
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("weight_prepacked", 1))


CASES = {
    "a path upwards": (lambda m: external(m, "location", "../model.onnx.data"), "which is not in this folder"),
    "an absolute path": (lambda m: external(m, "location", "/etc/passwd"), "which is not in this folder"),
    "a file that is not there": (lambda m: external(m, "location", "other.data"), "is missing"),
    "an offset behind the end": (lambda m: external(m, "offset", str(2**62)), "that are not there"),
    "a negative offset": (lambda m: external(m, "offset", "-1"), "that are not there"),
    "a length that lies": (lambda m: external(m, "length", "7"), "claims `7` bytes"),
    "pre-packed by ONNX Runtime": (lambda m: external(m, "prepacked_0", "x|0|8"), "pre-packed weights"),
    "pre-packed for CUDA": (prepacked, "pre-packed weights"),
    "zero points": (zero_points, "calibrated and asymmetric exports are not patched"),
    "fused": (rename_ops, "used by `FusedMatMul`"),
    "another tool's": (lambda m: setattr(m, "producer_name", "olive"), "was written by `olive`"),
    "no producer": (lambda m: setattr(m, "producer_name", ""), "an unknown tool"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_the_builders_own_is_refused(
    name: str, world: tuple[Path, NestPatch, Path], exported: Path, tmp_path: Path
) -> None:
    change, message = CASES[name]
    target = Path(shutil.copytree(exported, tmp_path / "target"))
    edit(target, change)
    before = hashes(target)
    with pytest.raises(NestError, match=message):
        world[1].apply(target, base=world[0])
    assert hashes(target) == before


def test_a_calibrated_export_is_refused(world: tuple[Path, NestPatch, Path], exported: Path, tmp_path: Path) -> None:
    """Its scales are not what the rows alone give."""
    target = Path(shutil.copytree(exported, tmp_path / "target"))
    model = onnx.load(target / "model.onnx", load_external_data=False)
    scales = next(t for t in model.graph.initializer if t.name == f"{UP.removesuffix('.weight')}.MatMul.weight_scales")
    where = {entry.key: entry.value for entry in scales.external_data}
    content = bytearray((target / "model.onnx.data").read_bytes())
    begin, length = int(where["offset"]), int(where["length"])
    content[begin : begin + length] = bytes(value ^ 1 for value in content[begin : begin + length])
    (target / "model.onnx.data").write_bytes(content)
    with pytest.raises(NestError, match="exported without calibration"):
        world[1].apply(target, base=world[0])


def test_an_optimised_graph_is_refused(world: tuple[Path, NestPatch, Path], exported: Path, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    target = Path(shutil.copytree(exported, tmp_path / "target"))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target / "optimised.onnx")
    ort.InferenceSession(str(target / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (target / "optimised.onnx").replace(target / "model.onnx")
    with pytest.raises(NestError, match="was rewritten by an optimiser"):
        world[1].apply(target, base=world[0])
