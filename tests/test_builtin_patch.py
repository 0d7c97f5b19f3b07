"""A patch on what the built-in model is deployed as: the same bytes, and the same tokens, as from its merged folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from nest_rs import NestPatch
from nest_rs.export import Precision, export_onnx
from nest_rs.models import BUILTIN, resolve
from nest_rs.patch import RowDelta
from test_deploy import hashes

pytestmark = pytest.mark.builtin


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
