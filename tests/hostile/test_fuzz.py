"""Whatever lies in a patch or an ONNX file: it is read, or refused in one line; no other exception."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile.test_hostile import read_header, write_header
from nest_rs import NestError, NestPatch
from nest_rs.checkpoints import open_checkpoint
from nest_rs.deploy import describe
from nest_rs.evidence import lines
from test_deploy import make_patch

onnx = pytest.importorskip("onnx")

QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=6)


def edited(content: bytes, edits: list[tuple[float, bytes]], cut: float) -> bytes:
    """Bytes overwritten at some places, and perhaps an end cut off."""
    spoilt = bytearray(content)
    for where, new in edits:
        at = int(where * len(content))
        spoilt[at : at + len(new)] = new
    return bytes(spoilt[: int(cut * len(spoilt))] if cut < 0.5 else spoilt)


@pytest.fixture(scope="module")
def patch(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[NestPatch, Path]:
    path = tmp_path_factory.mktemp("fuzz") / "patch.safetensors"
    made = make_patch(tiny, base={"id": "base"})
    made.save(path)
    return made, path


def one_line(error: NestError) -> None:
    assert "\n" not in str(error)


def read_patch(path: Path) -> None:
    try:
        found = NestPatch.load(path)
        describe(found)
        lines(found.evidence or {})
    except NestError as error:
        one_line(error)


@QUICK
@given(edits=EDITS, cut=st.floats(0, 1))
def test_a_patch_of_spoilt_bytes(patch: tuple[NestPatch, Path], edits: list[tuple[float, bytes]], cut: float) -> None:
    spoilt = patch[1].with_name("spoilt")
    spoilt.write_bytes(edited(patch[1].read_bytes(), edits, cut))
    read_patch(spoilt)


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from walk(inner, (*path, key))


@QUICK
@given(data=st.data(), new=JSON, signed=st.booleans())
def test_a_patch_with_any_json_anywhere_in_its_manifest(
    patch: tuple[NestPatch, Path], data: st.DataObject, new: Any, signed: bool
) -> None:
    made, path = patch
    manifest = json.loads(json.dumps(made.document() | {"evidence": {"refusal": {"all": {"base": {"rate": 0.5}}}}}))
    where = data.draw(st.sampled_from(list(walk(manifest))[1:]))
    inner: Any = manifest
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = new
    spoilt = path.with_name("spoilt")
    if signed and isinstance(manifest.get("tensors"), dict):
        # As its maker would write it.
        plain = {key: value for key, value in manifest.items() if key not in ("format", "sha256", "evidence")}
        NestPatch(made.tensors, plain, {"refusal": manifest.get("evidence")}).save(spoilt)
    else:
        header, content = read_header(path)
        header["__metadata__"]["nest_patch"] = json.dumps(manifest)
        write_header(spoilt, header, content)
    read_patch(spoilt)


@pytest.fixture(scope="module")
def graph(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small graph with what the reader looks at: MatMul and MatMulNBits on external data, and PyTorch's metadata."""
    folder = tmp_path_factory.mktemp("graph")
    model = onnx.ModelProto(producer_name="onnxruntime-genai", ir_version=10)
    model.opset_import.add(domain="", version=21)
    for layer, kind in enumerate(("MatMul", "MatMulNBits")):
        module = f"model.layers.{layer}.mlp.up_proj"
        names = [f"{module}.MatMul.weight"] if kind == "MatMul" else [f"{module}.MatMul.weight_{x}" for x in "qs"]
        node = model.graph.node.add(op_type=kind)
        node.input.extend([f"x{layer}", *names])
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'model', '{module}', 'linear']")
        for key, value in {"bits": 4, "block_size": 32, "K": 64, "N": 96}.items() if layer else ():
            node.attribute.append(onnx.helper.make_attribute(key, value))
        for place, name in enumerate(names):
            shape, type_ = ([64, 96], 1) if kind == "MatMul" else (([96, 2, 16], 2) if place == 0 else ([96, 2], 1))
            tensor = model.graph.initializer.add(name=name, data_type=type_, dims=shape, data_location=1)
            length = 24576 if kind == "MatMul" else (3072 if place == 0 else 768)
            for key, value in {"location": "model.onnx.data", "offset": "0", "length": str(length)}.items():
                tensor.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(bytes(24576))
    return folder


def try_onnx(patch: NestPatch, folder: Path) -> None:
    before = (folder / "model.onnx.data").read_bytes()
    for name in sorted(patch.tensors):
        try:
            checkpoint = open_checkpoint(folder)
            places = checkpoint.locate(name, patch.manifest["tensors"][name]["shape"], patch.tensors[name].rows)
            values = checkpoint.decode(name, [checkpoint.read(place) for place in places], 64)
            assert values.shape == (7, 64)
        except NestError as error:
            one_line(error)
    assert (folder / "model.onnx.data").read_bytes() == before


@QUICK
@given(edits=EDITS, cut=st.floats(0, 1), torch=st.booleans())
def test_an_onnx_file_of_spoilt_bytes(
    patch: tuple[NestPatch, Path], graph: Path, edits: list[tuple[float, bytes]], cut: float, torch: bool
) -> None:
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    if torch:
        model.producer_name = "pytorch"
    spoilt = graph.with_name("spoilt")
    spoilt.mkdir(exist_ok=True)
    shutil.copyfile(graph / "model.onnx.data", spoilt / "model.onnx.data")
    (spoilt / "model.onnx").write_bytes(edited(model.SerializeToString(), edits, cut))
    try_onnx(patch[0], spoilt)


@QUICK
@given(data=st.data(), torch=st.booleans())
def test_an_onnx_graph_of_any_numbers_and_names(
    patch: tuple[NestPatch, Path], graph: Path, data: st.DataObject, torch: bool
) -> None:
    """Well-formed protobuf, so that the values come through to the reader."""
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    number, text = st.integers(-(2**63), 2**63 - 1), st.text(max_size=12) | st.sampled_from(["-1", "0", "9" * 40, "x"])
    if torch:
        model.producer_name = "pytorch"
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
        node = data.draw(st.sampled_from(list(model.graph.node)))
        match data.draw(st.integers(0, 5)):
            case 0:
                del tensor.dims[:]
                tensor.dims.extend(data.draw(st.lists(number | st.just(0), max_size=4)))
            case 1:
                tensor.data_type = data.draw(st.integers(0, 25))
            case 2:
                data.draw(st.sampled_from(list(tensor.external_data))).value = data.draw(text)
            case 3 if node.attribute:
                data.draw(st.sampled_from(list(node.attribute))).i = data.draw(number | st.integers(0, 8))
            case 4:
                node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(text)
            case _:
                node.metadata_props[0].value = data.draw(text)
    spoilt = graph.with_name("spoilt")
    spoilt.mkdir(exist_ok=True)
    shutil.copyfile(graph / "model.onnx.data", spoilt / "model.onnx.data")
    (spoilt / "model.onnx").write_bytes(model.SerializeToString())
    try_onnx(patch[0], spoilt)
