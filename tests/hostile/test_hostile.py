"""Each case spoils a patch file or a target by hand; apply must say why not, in one line, and write nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from conftest import write_tiny_model
from nest_rs.cli import main
from nest_rs.patch import FORMAT, NestPatch, RowDelta
from test_deploy import GATE, UP, hashes, make_patch, shard

INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path, Path], None]


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def write_header(path: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def in_header(change: Callable[[dict[str, Any]], Any], which: str = "patch") -> Spoil:
    def spoil(patch: Path, target: Path) -> None:
        path = patch if which == "patch" else target / "model.safetensors"
        header, data = read_header(path)
        change(header)
        write_header(path, header, data)

    return spoil


def in_manifest(change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> Spoil:
    """Edit the manifest; with `sign`, as a forger who can compute a SHA-256."""

    def spoil(patch: Path, target: Path) -> None:
        header, data = read_header(patch)
        manifest = json.loads(header["__metadata__"]["nest_patch"])
        change(manifest)
        if sign:
            arrays = load_arrays(patch)
            names = {name.rpartition(".")[0] for name in arrays}
            parts = ("rows", "cluster", "delta", "residual", "sketch", "tie")
            tensors = {name: RowDelta(*(arrays.get(f"{name}.{part}") for part in parts)) for name in names}
            manifest["sha256"] = NestPatch(
                tensors, {key: value for key, value in manifest.items() if key not in ("sha256", "format")}
            ).id
        header["__metadata__"]["nest_patch"] = json.dumps(manifest)
        write_header(patch, header, data)

    return spoil


def in_arrays(name: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> Spoil:
    """A patch whose maker signs what he spoilt."""

    def spoil(patch: Path, target: Path) -> None:
        good = NestPatch.load(patch)
        delta = good.tensors[UP]
        array = getattr(delta, name).copy()
        changed = change(array)
        parts = {key: getattr(delta, key) for key in ("rows", "cluster", "delta", "residual", "sketch", "tie")}
        good.tensors[UP] = RowDelta(**{**parts, name: array if changed is None else changed})
        good.save(patch)

    return spoil


def put(index: Any, value: Any) -> Callable[[np.ndarray[Any, Any]], None]:
    return lambda array: array.__setitem__(index, value)


def cut(size: int, which: str = "patch") -> Spoil:
    def spoil(patch: Path, target: Path) -> None:
        path = patch if which == "patch" else target / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:size])

    return spoil


def in_index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(patch: Path, target: Path) -> None:
        shard(target, torch.float32)
        index = json.loads((target / INDEX).read_text())
        change(index)
        (target / INDEX).write_text(json.dumps(index))

    return spoil


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(patch: Path, target: Path) -> None:
        weights = load_file(target / "model.safetensors")
        change(weights)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    return spoil


def swap_for_link(patch: Path, target: Path) -> None:
    (target / "model.safetensors").rename(target.parent / "elsewhere.safetensors")
    (target / "model.safetensors").symlink_to(target.parent / "elsewhere.safetensors")


def share(patch: Path, target: Path) -> None:
    os.link(target / "model.safetensors", target.parent / "elsewhere.safetensors")


def journal(content: bytes) -> Spoil:
    def spoil(patch: Path, target: Path) -> None:
        (target / ".nest-rs").mkdir()
        (target / ".nest-rs" / "journal").write_bytes(content)

    return spoil


def state_is_link(patch: Path, target: Path) -> None:
    (target.parent / "aside").mkdir()
    (target / ".nest-rs").symlink_to(target.parent / "aside")


def shape_off_by_one(patch: Path, target: Path) -> None:
    shutil.rmtree(target)
    write_tiny_model(target, intermediate_size=97)


def other_base(patch: Path, target: Path) -> None:
    shutil.rmtree(target)
    write_tiny_model(target, initializer_range=0.1)


def other_family(patch: Path, target: Path) -> None:
    shutil.rmtree(target)
    write_tiny_model(target, "phi3")


def no_weights(patch: Path, target: Path) -> None:
    (target / "model.safetensors").unlink()


def twice(patch: Path, target: Path) -> None:
    shutil.copyfile(target / "model.safetensors", target / "again.safetensors")


def folder_for_shard(patch: Path, target: Path) -> None:
    (target / "model.safetensors").unlink()
    (target / "model.safetensors").mkdir()


def half_patched(patch: Path, target: Path) -> None:
    good = NestPatch.load(patch)
    weights = load_file(target / "model.safetensors")
    change = good.tensors[UP]
    weights[UP][torch.from_numpy(change.rows).long()] += torch.from_numpy(change.moves)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def seal(name: str = UP, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"][name].update(values)


def first_offsets(header: dict[str, Any], name: str, begin: int, end: int) -> None:
    header[name]["data_offsets"] = [begin, end]


INCONSISTENT = "inconsistent rows, clusters or deltas"
CASES: dict[str, tuple[Spoil, str]] = {
    # The patch as a file.
    "patch: empty": (cut(0), "cannot read the patch"),
    "patch: half a length": (cut(5), "cannot read the patch"),
    "patch: truncated in its header": (cut(300), "cannot read the patch"),
    "patch: truncated in its data": (cut(-1), "cannot read the patch"),
    "patch: a header of 2^63 bytes": (lambda p, t: write_header(p, "{}", b"", 2**63), "cannot read the patch"),
    "patch: a header of 2^64 - 1 bytes": (lambda p, t: write_header(p, "{}", b"", 2**64 - 1), "cannot read the patch"),
    "patch: a header that is a list": (lambda p, t: write_header(p, "[]", b""), "cannot read the patch"),
    "patch: brackets without end": (lambda p, t: write_header(p, "[" * 100_000, b""), "cannot read the patch"),
    "patch: overlapping arrays": (
        in_header(lambda h: first_offsets(h, f"{UP}.rows", *h[f"{GATE}.rows"]["data_offsets"])),
        "cannot read the patch",
    ),
    "patch: an array behind the end": (
        in_header(lambda h: first_offsets(h, f"{UP}.delta", 2**40, 2**40 + 768)),
        "cannot read the patch",
    ),
    "patch: a dtype that lies": (
        in_header(lambda h: h[f"{UP}.delta"].update(dtype="I32")),
        INCONSISTENT,
    ),
    "patch: a shape that lies": (
        in_header(lambda h: h[f"{UP}.delta"].update(shape=[64, 3])),
        "inconsistent|does not fit",
    ),
    "patch: a shape that overflows": (
        in_header(lambda h: h[f"{UP}.delta"].update(shape=[2**63, 4])),
        "cannot read the patch",
    ),
    "patch: no metadata": (in_header(lambda h: h.pop("__metadata__")), "is not a NeST patch"),
    "patch: an unknown array": (
        in_header(lambda h: h.update({f"{UP}.more": h.pop(f"{UP}.residual")})),
        "the unknown array",
    ),
    "patch: residuals without sketches": (
        in_header(lambda h: h.update({"x.rows": h.pop(f"{UP}.sketch")})),
        "lacks the array|inconsistent",
    ),
    # Its arrays, signed by whoever spoilt them.
    "rows: one twice": (in_arrays("rows", put(1, 0)), INCONSISTENT),
    "rows: negative": (in_arrays("rows", put(0, -1)), INCONSISTENT),
    "rows: past the end": (in_arrays("rows", put(-1, 96)), "does not fit"),
    "rows: the largest number": (in_arrays("rows", put(-1, 2**31 - 1)), "does not fit"),
    "rows: descending": (in_arrays("rows", lambda a: a[::-1].copy()), INCONSISTENT),
    "clusters: past k": (in_arrays("cluster", put(0, 3)), INCONSISTENT),
    "clusters: negative": (in_arrays("cluster", put(0, -32768)), INCONSISTENT),
    "deltas: NaN": (in_arrays("delta", put((0, 0), np.nan)), INCONSISTENT),
    "deltas: infinite": (in_arrays("delta", put((2, 63), -np.inf)), INCONSISTENT),
    "deltas: an overflow": (in_arrays("delta", put((0, 0), 3.4e38)), "manifest promises|not be finite"),
    "deltas: too narrow": (in_arrays("delta", lambda a: a[:, :63].copy()), "does not fit"),
    "deltas: others than the manifest's": (in_arrays("delta", lambda a: -a), "manifest promises"),
    "sketches: NaN": (in_arrays("sketch", put((0, 0), np.nan)), INCONSISTENT),
    # Its manifest.
    "manifest: edited": (in_manifest(lambda m: m.update(seed=1)), "changed after it was written"),
    "manifest: without its hash": (in_manifest(lambda m: m.pop("sha256")), "changed after it was written"),
    "evidence: edited": (in_manifest(lambda m: m.update(evidence={"sha256": "0" * 64})), "evidence in the patch"),
    "evidence: no object": (in_manifest(lambda m: m.update(evidence=[1])), "evidence in the patch"),
    "manifest: another format": (in_manifest(lambda m: m.update(format="nest-patch/9")), "has the format"),
    "manifest: format is a list": (in_manifest(lambda m: m.update(format=[FORMAT])), "has the format"),
    "manifest: no seal": (in_manifest(lambda m: m.pop("tensors"), sign=True), "not bound to a base"),
    "manifest: a seal that is a list": (in_manifest(lambda m: m.update(tensors=[]), sign=True), "other tensors"),
    "manifest: seals of other tensors": (
        in_manifest(lambda m: m["tensors"].update(x=m["tensors"].pop(UP)), sign=True),
        "other tensors",
    ),
    "manifest: a seal that is a number": (in_manifest(lambda m: m["tensors"].update({UP: 1}), sign=True), "not fit"),
    "manifest: a shape of text": (in_manifest(seal(shape=["96", "64"]), sign=True), "does not fit"),
    "manifest: a huge shape": (in_manifest(seal(shape=[2**31, 64]), sign=True), "does not fit"),
    "manifest: a dtype unknown": (in_manifest(seal(dtype="F8"), sign=True), "does not fit"),
    "manifest: a dtype that lies": (in_manifest(seal(dtype="BF16"), sign=True), "not those of the patch's base|--base"),
    "manifest: a hash of a path": (in_manifest(seal(sha256_after="../../etc/passwd"), sign=True), "does not fit"),
    "manifest: the hash of another base": (
        in_manifest(seal(rows_sha256_before="0" * 64), sign=True),
        "are not those of the patch's base",
    ),
    "manifest: the hash of another result": (
        in_manifest(seal(rows_sha256_after="0" * 64), sign=True),
        "manifest promises",
    ),
    # Targets.
    "target: another base": (other_base, "are not those of the patch's base"),
    "target: another family": (other_family, "has no tensor"),
    "target: another revision": (
        in_weights(lambda w: w[UP].mul_(1 + 1e-6)),
        "are not those of the patch's base",
    ),
    "target: a shape off by one": (shape_off_by_one, "has the shape"),
    "target: a tensor missing": (in_weights(lambda w: w.pop(UP)), "has no tensor"),
    "target: a vector for a matrix": (
        in_weights(lambda w: w.update({UP: w[UP].flatten().clone()})),
        "not that of a matrix",
    ),
    "target: whole numbers": (in_weights(lambda w: w.update({UP: w[UP].int()})), "is stored as `I32`"),
    "target: patched in part": (half_patched, "carries the patch in part"),
    "target: truncated": (cut(-1, "target"), "not a valid safetensors file"),
    "target: a header of 2^63 bytes": (
        lambda p, t: write_header(t / "model.safetensors", "{}", b"", 2**63),
        "claims a header",
    ),
    "target: overlapping tensors": (
        in_header(lambda h: first_offsets(h, UP, *h[GATE]["data_offsets"]), "target"),
        "overlaps|leaves a gap",
    ),
    "target: a dtype that lies": (
        in_header(lambda h: h[UP].update(dtype="F64"), "target"),
        "claims",
    ),
    "target: no weights": (no_weights, "no .safetensors weights"),
    "target: a folder for a shard": (folder_for_shard, "is missing"),
    "target: a tensor in two files": (twice, "is in both"),
    "target: a symlinked shard": (swap_for_link, "is a link or shares"),
    "target: a shard with a second name": (share, "is a link or shares"),
    "target: its state is a link": (state_is_link, "it is a link"),
    "index: a path upwards": (
        in_index(lambda i: i["weight_map"].update({UP: "../elsewhere.safetensors"})),
        "which is not in this folder",
    ),
    "index: an absolute path": (
        in_index(lambda i: i["weight_map"].update({UP: "/etc/passwd"})),
        "which is not in this folder",
    ),
    "index: a shard that is not there": (
        in_index(lambda i: i["weight_map"].update({UP: "model-00009-of-00009.safetensors"})),
        "is missing",
    ),
    "index: no weight map": (in_index(lambda i: i.pop("weight_map")), "has no weight_map"),
    "index: a weight map of numbers": (in_index(lambda i: i["weight_map"].update({UP: 1})), "has no weight_map"),
    "index: not JSON": (lambda p, t: (t / INDEX).write_text("{") and None, "is not JSON"),
    "journal: empty": (journal(b""), "not a valid undo record"),
    "journal: random": (journal(b"NESTUND1" + b"\xff" * 100), "not a valid undo record"),
}


def test_there_are_enough() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_one_line_and_no_byte_is_written(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = CASES[name]
    target = Path(shutil.copytree(tiny, tmp_path / "target"))
    patch = tmp_path / "patch.safetensors"
    make_patch(target).save(patch)
    spoil(patch, target)
    before = hashes(tmp_path)
    for arguments in (["apply", "--in-place"], ["remove", "--in-place"]):
        status = main([arguments[0], str(patch), str(target), *arguments[1:]])
        error = capsys.readouterr().err
        assert status == 2, error
        lines = [line for line in error.splitlines() if line.startswith("nest-rs: ")]
        assert len(lines) == 1, error
        if arguments[0] == "apply":
            assert any(part in lines[0] for part in message.split("|")), lines[0]
        assert hashes(tmp_path) == before
