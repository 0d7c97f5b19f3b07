"""PyTorch's own ONNX export, alone and through transformers: its nodes say which module they came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from conftest import write_tiny_model  # noqa: E402
from nest_rs import NestError, NestPatch  # noqa: E402
from test_deploy import hashes, make_patch  # noqa: E402

Export = Callable[[Path, Path], Path]
INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), "attention_mask": torch.ones(2, 4).long()}


def by_torch(folder: Path, out: Path, *, optimize: bool = True) -> Path:
    out.mkdir()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.onnx.export(
        model,
        (),
        out / "model.onnx",
        kwargs={**INPUTS, "use_cache": False},
        dynamo=True,
        external_data=True,
        optimize=optimize,
        verbose=False,
    )
    return out


def by_transformers(folder: Path, out: Path) -> Path:
    exporters = pytest.importorskip("transformers.exporters")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = INPUTS["attention_mask"].clone()
    mask[0, 0] = 0  # or the graph takes none
    exported = exporters.OnnxExporter().export(model, {**INPUTS, "attention_mask": mask}, config=exporters.OnnxConfig())
    exported.save_pretrained(out)
    return out


EXPORTS: dict[str, Export] = {
    "torch": by_torch,
    "torch, not optimised": lambda folder, out: by_torch(folder, out, optimize=False),
    "transformers": by_transformers,
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NestPatch, Path]:
    """A base, a patch for it, and the base with the patch on."""
    folder = tmp_path_factory.mktemp("torch")
    base = write_tiny_model(folder / "base", dtype=request.param)
    patch = make_patch(base)
    patch.apply(base, out=folder / "merged")
    return base, patch, folder / "merged"


@pytest.mark.parametrize("name", EXPORTS)
def test_the_patched_export_is_the_export_of_the_merged_model(
    name: str, world: tuple[Path, NestPatch, Path], tmp_path: Path
) -> None:
    base, patch, merged = world
    target, wanted = (EXPORTS[name](folder, tmp_path / what) for folder, what in ((base, "target"), (merged, "wanted")))
    before = hashes(target)
    assert patch.verify(target).state == "clean"
    patch.apply(target)
    found = hashes(target)
    assert {path: found[path] for path in before} == hashes(wanted)
    assert patch.verify(target).state == "patched"
    shutil.rmtree(target / ".nest-rs")
    patch.remove(target)
    assert hashes(target) == before


@pytest.fixture(scope="module")
def exported(world: tuple[Path, NestPatch, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_torch(world[0], tmp_path_factory.mktemp("exported") / "onnx")


def of_up(model: object) -> object:
    """The node of the first up projection."""
    nodes = model.graph.node  # type: ignore[attr-defined]
    return next(n for n in nodes if any("layers.0.mlp.up_proj'" in entry.value for entry in n.metadata_props))


def without_metadata(model: object) -> None:
    for node in model.graph.node:  # type: ignore[attr-defined]
        del node.metadata_props[:]


def fused(model: object) -> None:
    of_up(model).op_type = "FusedMatMul"  # type: ignore[attr-defined]


def twice(model: object) -> None:
    model.graph.node.append(of_up(model))  # type: ignore[attr-defined]


def shared(model: object) -> None:
    other = model.graph.node.add(op_type="Identity")  # type: ignore[attr-defined]
    other.input.append(of_up(model).input[1])  # type: ignore[attr-defined]


def computed(model: object) -> None:
    of_up(model).input[1] = of_up(model).input[0]  # type: ignore[attr-defined]


CASES = {
    "without metadata": (without_metadata, "is not there"),
    "fused": (fused, "is a `FusedMatMul`"),
    "a module that runs twice": (twice, "one of 2"),
    "a weight of two nodes": (shared, "is used in several places"),
    "a computed weight": (computed, "is not in its data file"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_told_is_refused(
    name: str, world: tuple[Path, NestPatch, Path], exported: Path, tmp_path: Path
) -> None:
    change, message = CASES[name]
    target = Path(shutil.copytree(exported, tmp_path / "target"))
    model = onnx.load(target / "model.onnx", load_external_data=False)
    change(model)
    (target / "model.onnx").write_bytes(model.SerializeToString())
    before = hashes(target)
    with pytest.raises(NestError, match=message):
        world[1].apply(target)
    assert hashes(target) == before
