"""Folding deltas into a safetensors file."""

import hashlib
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nest_rs.numeric import fold_file, tensor_sha256

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    tensors = {
        "w.up": torch.randn(20, 7).to(DTYPES[request.param]),
        "w.gate": torch.randn(12, 7).to(DTYPES[request.param]),
        "norm": torch.randn(7),
        "ids": torch.arange(5),
        "none": torch.zeros(0, 7),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "z": "last"})
    return path, tensors


def test_rows_move_by_their_clusters_delta_and_nothing_else(checkpoint, tmp_path):
    path, tensors = checkpoint
    rng = np.random.default_rng(0)
    edits = {
        "w.up": ([19, 3, 4], [1, 0, 1], rng.normal(size=(2, 7)).astype(np.float32)),
        "w.gate": (np.int64([0]), [0], torch.ones(1, 7)),
    }
    before = path.read_bytes()
    out = tmp_path / "out.safetensors"
    report = fold_file(path, out, edits)
    folded = load_file(out)
    assert path.read_bytes() == before
    assert folded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        want = tensor.clone()
        if name in edits:
            rows, cluster, delta = edits[name]
            delta = torch.as_tensor(delta)
            for row, c in zip(rows, cluster, strict=True):
                want[row] = (want[row].float() + delta[c]).to(want.dtype)
            raw = [t.view(torch.uint8).numpy().tobytes() for t in (tensor, want)]
            old, new = (np.frombuffer(r, f"V{tensor.element_size()}") for r in raw)
            changed = int((old != new).sum())
            assert report[name].sha256_before == hashlib.sha256(raw[0]).hexdigest()
            assert report[name].sha256_after == hashlib.sha256(raw[1]).hexdigest()
            assert (report[name].rows, report[name].changed) == (len(rows), changed)
        assert torch.equal(folded[name], want), name
    # Outside the edited rows, the file is the same byte for byte.
    after = out.read_bytes()
    differing = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    header = 8 + struct.unpack("<Q", before[:8])[0]
    assert min(differing) >= header
    assert len(differing) <= 4 * 7 * tensors["w.up"].element_size()
    assert tensor_sha256(out, ["w.up"]) == {"w.up": report["w.up"].sha256_after}
    assert tensor_sha256(out)["norm"] == tensor_sha256(path, ["norm"])["norm"]


def test_in_place_and_without_edits(checkpoint):
    path, tensors = checkpoint
    before = path.read_bytes()
    assert fold_file(path, path, {}) == {}
    assert path.read_bytes() == before
    fold_file(path, path, {"w.up": ([0], [0], np.ones((1, 7), np.float32))})
    want = (tensors["w.up"][0].float() + 1).to(tensors["w.up"].dtype)
    assert torch.equal(load_file(path)["w.up"][0], want)
    assert len(list(path.parent.iterdir())) == 1


def test_the_copy_is_as_readable_as_the_original(checkpoint, tmp_path):
    path, _ = checkpoint
    path.chmod(0o644)
    fold_file(path, tmp_path / "out", {})
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o644


@settings(max_examples=60, deadline=None)
@given(
    w=st.lists(st.integers(0, 2**16 - 1), min_size=8, max_size=8),
    u=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
def test_rounding_is_to_nearest_even(tmp_path_factory, w, u, dtype):
    bits = np.array(w, np.uint16).view(dtype)
    bits = np.where(np.isfinite(bits.astype(np.float32)), bits, dtype(1)).reshape(1, 8)
    delta = np.float32(u).reshape(1, 8)
    with np.errstate(over="ignore"):
        want = (bits.astype(np.float32) + delta).astype(dtype)
    path = tmp_path_factory.mktemp("fold") / "x"
    name = "F16" if dtype == np.float16 else "BF16"
    header = f'{{"w":{{"dtype":"{name}","shape":[1,8],"data_offsets":[0,16]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    if np.isfinite(want.astype(np.float32)).all():
        fold_file(path, path, {"w": ([0], [0], delta)})
        assert path.read_bytes()[-16:] == want.tobytes()
    else:
        with pytest.raises(ValueError, match="not be finite"):
            fold_file(path, path, {"w": ([0], [0], delta)})


ONES = np.ones((2, 7), np.float32)
BAD = {
    "unknown tensor": ("nope", [0], [0], ONES, "`nope`"),
    "vector": ("norm", [0], [0], ONES, "not that of a matrix"),
    "repeated row": ("w.up", [1, 1], [0, 0], ONES, "row `1` is given twice"),
    "row too large": ("w.up", [20], [0], ONES, "row `20` is out of range"),
    "negative row": ("w.up", [-1], [0], ONES, "row `-1` is out of range"),
    "cluster too large": ("w.up", [0], [2], ONES, "cluster `2`"),
    "negative cluster": ("w.up", [0], [-1], ONES, "cluster `-1`"),
    "huge cluster": ("w.up", [0], [70000], ONES, "`70000`"),
    "lengths": ("w.up", [0, 1], [0], ONES, "`2` rows and `1` clusters"),
    "width": ("w.up", [0], [0], np.ones((2, 6), np.float32), "expected 2 x 7"),
    "one dimension": ("w.up", [0], [0], np.ones(7, np.float32), "2 dimensions"),
    "nan": ("w.up", [0], [0], np.full((1, 7), np.nan, np.float32), "`NaN`"),
    "unused nan": ("w.up", [0], [0], np.float32([[1] * 7, [np.inf] * 7]), "cluster `1` holds `inf`"),
    "fractional rows": ("w.up", [0.5], [0], ONES, "whole numbers"),
    "integer tensor": ("ids2d", [0], [0], np.ones((1, 2), np.float32), "type `I64`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_edits_leave_nothing_behind(tmp_path, case):
    path = tmp_path / "m"
    save_file({"w.up": torch.randn(20, 7), "norm": torch.ones(7), "ids2d": torch.ones(2, 2).long()}, path)
    name, rows, cluster, delta, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fold_file(path, tmp_path / "out", {name: (rows, cluster, delta)})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_overflow_is_found_before_anything_is_written(tmp_path):
    path = tmp_path / "m"
    save_file({"w": torch.full((2, 2), 60000.0).half()}, path)
    with pytest.raises(ValueError, match="row `1`, column `0` would not be finite"):
        fold_file(path, path, {"w": ([1], [0], np.float32([[9000, 0]]))})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        fold_file(tmp_path / "none", tmp_path / "out", {})
    path = tmp_path / "m"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not a valid safetensors"):
        fold_file(path, tmp_path / "out", {})
    with pytest.raises(ValueError, match="not a valid safetensors"):
        tensor_sha256(path)
    save_file({"w": torch.ones(2, 2)}, path)
    with pytest.raises(OSError, match="nowhere"):
        fold_file(path, tmp_path / "nowhere" / "out", {})
    with pytest.raises(ValueError, match="`nope`"):
        tensor_sha256(path, ["nope"])
    with pytest.raises(IsADirectoryError):
        fold_file(tmp_path, tmp_path / "out", {})
    assert sorted(os.listdir(tmp_path)) == ["m"]
