"""The activation store and the streaming statistics."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from nest_rs.numeric import ActivationStore, LogisticProbe, PooledStats, pooled_stats

TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.fixture
def blocks():
    rng = np.random.default_rng(0)
    return {"a.up": rng.normal(size=(30, 8)), "b.gate": rng.normal(size=(30, 5)) + 3}


def fill(path, blocks, dtype="bf16", **kwargs):
    sites = {name: block.shape[1] for name, block in blocks.items()}
    with ActivationStore.create(path, sites, 30, dtype, **kwargs) as store:
        for name, block in blocks.items():
            for start in (20, 0, 10):  # any order
                store.write(name, start, block[start : start + 10].astype(np.float32))
    return store


@pytest.mark.parametrize("dtype", TYPES)
def test_a_store_is_an_ordinary_safetensors_file(tmp_path, blocks, dtype):
    path = tmp_path / "x.safetensors"
    fill(path, blocks, dtype, metadata={"labels": "sha", "ünï": 'q"'}).close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"labels": "sha", "ünï": 'q"'}
        theirs = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    store = ActivationStore.open(path)
    assert (store.n_rows, store.dtype, store.sites) == (30, dtype, {"a.up": 8, "b.gate": 5})
    assert store.metadata == {"labels": "sha", "ünï": 'q"'}
    for name, block in blocks.items():
        want = block.astype(np.float32).astype(TYPES[dtype]).astype(np.float32)
        assert np.array_equal(store.read(name), want)
        assert np.array_equal(theirs[name], want)


def test_blocks_of_the_stores_type_keep_their_bits(tmp_path):
    bits = torch.randn(6, 4).bfloat16()
    with ActivationStore.create(tmp_path / "x", {"s": 4}, 6) as store:
        store.write("s", 0, bits)
    assert np.array_equal(store.read("s"), bits.float().numpy())


def test_more_than_the_disk_is_given_at_once_is_stored_whole(tmp_path):
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((5, 4, 1 << 20), dtype=np.float32)  # 80 MiB
    store = ActivationStore.create(tmp_path / "store", {"site": 1 << 20}, 20, "f32")
    for number, block in enumerate(blocks):
        store.write("site", 4 * number, block)
    assert np.array_equal(store.finish().read("site"), blocks.reshape(20, -1))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_block_of_the_stores_type_says_where_it_is_not_finite(tmp_path, dtype):
    block = np.zeros((3, 5), dtype=TYPES[dtype])
    block[2, 1] = np.inf
    store = ActivationStore.create(tmp_path / "store", {"site": 5}, 4, dtype=dtype)
    with pytest.raises(ValueError, match="row `3`, column `1`"):
        store.write("site", 1, block)


def test_columns_are_points(tmp_path, blocks):
    store = fill(tmp_path / "x", blocks, "f32")
    x = store.read("b.gate")
    assert np.array_equal(store.columns("b.gate", [4, 0]), x[:, [4, 0]].T)
    points = store.columns("b.gate", np.int32([1, 2]), standardize=True)
    want = (x - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(points, want[:, [1, 2]].T, atol=1e-5)
    assert store.columns("a.up", []).shape == (0, 30)
    for bad in ([5], [-1], [0.5]):
        with pytest.raises(ValueError, match="`"):
            store.columns("b.gate", bad)
    with pytest.raises(ValueError, match="`nope`"):
        store.columns("nope", [0])


def test_a_constant_column_standardises_to_zero(tmp_path):
    with ActivationStore.create(tmp_path / "x", {"s": 1}, 3, "f32") as store:
        store.write("s", 0, np.full((3, 1), 0.1, np.float32))
    assert (store.columns("s", [0], standardize=True) == 0).all()


def test_probes_come_straight_from_the_store(tmp_path, blocks):
    y = np.arange(30) % 2
    store = fill(tmp_path / "x", blocks)
    fits = store.fit_probes(y, C=0.5)
    assert list(fits) == ["a.up", "b.gate"]
    for name, (coef, intercept) in fits.items():
        want = LogisticProbe(C=0.5).fit(store.read(name), y)
        assert np.array_equal(coef, want.coef_)
        assert intercept == want.intercept_
    assert list(store.fit_probes(y, sites=["b.gate"])) == ["b.gate"]
    with pytest.raises(ValueError, match="`nope`"):
        store.fit_probes(y, sites=["nope"])
    with pytest.raises(ValueError, match="y has shape `29`"):
        store.fit_probes(y[1:])
    with pytest.raises(ValueError, match="classes"):
        store.fit_probes(np.zeros(30, int))


def test_a_writer_that_went_away_is_resumed(tmp_path, blocks):
    path = tmp_path / "x.safetensors"
    store = ActivationStore.create(path, {"a.up": 8}, 30, "f32", {"k": "v"})
    store.write("a.up", 0, blocks["a.up"][:10].astype(np.float32))
    store.close()
    assert not path.exists()
    again = ActivationStore.resume(path)
    assert (again.n_rows, again.metadata, again.sites) == (30, {"k": "v"}, {"a.up": 8})
    again.write("a.up", 10, blocks["a.up"][10:].astype(np.float32))
    again.finish()
    assert np.array_equal(ActivationStore.open(path).read("a.up"), blocks["a.up"].astype(np.float32))
    with pytest.raises(FileNotFoundError):
        ActivationStore.resume(path)


def test_a_failed_block_leaves_only_the_partial_file(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ActivationStore.create(tmp_path / "x", {"s": 2}, 2):
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["x.partial"]


@pytest.mark.parametrize(
    ("site", "start", "block", "message"),
    [
        ("nope", 0, np.zeros((1, 3)), "`nope`"),
        ("s", 0, np.zeros((1, 4)), "`4` columns"),
        ("s", 4, np.zeros((2, 3)), "`4..6`"),
        ("s", 2**62, np.zeros((1, 3)), "out of range"),
        ("s", -1, np.zeros((1, 3)), "start is `-1`"),
        ("s", 2, np.array([[0, np.nan, 0]]), "row `2`, column `1`"),
        ("s", 0, np.array([[0, 0, 70000.0]]), "row `0`, column `2`"),
    ],
)
def test_blocks_that_do_not_fit(tmp_path, site, start, block, message):
    store = ActivationStore.create(tmp_path / "x", {"s": 3}, 5, "f16")
    with pytest.raises(ValueError, match=message):
        store.write(site, start, block.astype(np.float32))


@pytest.mark.parametrize(
    ("sites", "n_rows", "dtype"),
    [
        ({}, 3, "f32"),
        ({"s": 0}, 3, "f32"),
        ({"": 2}, 3, "f32"),
        ({"__metadata__": 2}, 3, "f32"),
        ({"s": 2}, 0, "f32"),
        ({"s": 2}, 3, "i8"),
        ({"s": 2**62}, 2**62, "f32"),
    ],
)
def test_stores_that_cannot_be(tmp_path, sites, n_rows, dtype):
    with pytest.raises(ValueError, match="`"):
        ActivationStore.create(tmp_path / "x", sites, n_rows, dtype)
    assert list(tmp_path.iterdir()) == []


def test_states_are_checked(tmp_path):
    store = ActivationStore.create(tmp_path / "x", {"s": 1}, 1)
    with pytest.raises(ValueError, match="not open for reading"):
        store.read("s")
    store.finish()
    with pytest.raises(ValueError, match="no more rows"):
        store.write("s", 0, np.zeros((1, 1), np.float32))
    store.close()
    with pytest.raises(ValueError, match="closed"):
        _ = store.n_rows
    with pytest.raises(FileNotFoundError):
        ActivationStore.open(tmp_path / "none")
    with pytest.raises(OSError, match="nowhere"):
        ActivationStore.create(tmp_path / "nowhere" / "x", {"s": 1}, 1)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Padded below so that the tensor begins at an odd byte.
ODD = json.dumps({"a": entry([2, 2], 0, 16)}).encode()

HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "long header": struct.pack("<Q", 2**60) + b"{}",
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "not json": raw(b"{not json"),
    "not utf-8": raw(b'{"\xff":1}'),
    "array": raw([1]),
    "no site": raw({}),
    "truncated": raw({"a": entry([2, 2], 0, 16)}, bytes(12)),
    "trailing": raw({"a": entry([2, 2], 0, 16)}, bytes(20)),
    "overlap": raw({"a": entry([2, 2], 0, 16), "b": entry([2, 2], 8, 24)}, bytes(24)),
    "gap": raw({"a": entry([2, 2], 0, 16), "b": entry([2, 2], 20, 36)}, bytes(36)),
    "reversed": raw({"a": entry([2, 2], 16, 0)}, bytes(16)),
    "lying shape": raw({"a": entry([3, 2], 0, 16)}, bytes(16)),
    "overflow": raw({"a": entry([2**63, 2**63], 0, 16)}, bytes(16)),
    "negative": raw({"a": entry([-2, -2], 0, 16)}, bytes(16)),
    "wrong type": raw({"a": entry([2, 2], 0, 32, "F64")}, bytes(32)),
    "unknown type": raw({"a": entry([2, 2], 0, 16, "F33")}, bytes(16)),
    "vector": raw({"a": entry([4], 0, 16)}, bytes(16)),
    "rows differ": raw({"a": entry([2, 2], 0, 16), "b": entry([1, 4], 16, 32)}, bytes(32)),
    "types differ": raw({"a": entry([2, 2], 0, 16), "b": entry([2, 4], 16, 32, "F16")}, bytes(32)),
    "no rows": raw({"a": entry([0, 2], 0, 0)}),
    "misaligned": raw(ODD + b" " * (1 - len(ODD) % 4 + 4), bytes(16)),
    "twice": raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry([0, 2], 0, 0)).encode(),) * 2)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}, "a": entry([2, 2], 0, 16)}, bytes(16)),
    "extra field": raw({"a": {**entry([2, 2], 0, 16), "x": 1}}, bytes(16)),
    "deep": raw(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match="valid safetensors file") as caught:
        ActivationStore.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", TYPES)
def test_pooling_is_the_masked_maximum(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 9, 5000)).astype(TYPES[dtype])
    mask = rng.random((6, 9)) < 0.5
    mask[:, 3] = True
    got = pooled_stats(x, mask)
    want = np.where(mask[:, :, None], x.astype(np.float32), -np.inf).max(1)
    assert got.pooled.dtype == x.dtype
    assert np.array_equal(got.pooled.astype(np.float32), want)
    with pytest.raises(ValueError, match="no classes"):
        _ = got.mean


def test_class_statistics_stream_and_merge():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(40, 3, 17)).astype(np.float32) + 50).bfloat16()
    y = rng.integers(2, size=40)
    mask = torch.ones(40, 3, dtype=torch.bool)
    whole = pooled_stats(x, mask, y)
    pooled = x.float().numpy().max(1).astype(np.float64)
    for c in (0, 1):
        assert whole.count[c] == (y == c).sum()
        np.testing.assert_allclose(whole.mean[c], pooled[y == c].mean(0), rtol=1e-12)
        np.testing.assert_allclose(whole.var[c], pooled[y == c].var(0), rtol=1e-9)
    parts = [pooled_stats(x[i : i + 13], mask[i : i + 13], y[i : i + 13]) for i in (0, 13, 26)]
    last = pooled_stats(x[39:], mask[39:], y[39:])
    # As if from other processes.
    parts = [pickle.loads(pickle.dumps(p)) for p in [*parts, last]]
    merged: PooledStats = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert np.array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.var, whole.var, rtol=1e-9)
    assert np.array_equal(merged.pooled, whole.pooled)


def test_pooling_checks_its_input():
    x = np.zeros((2, 3, 4), np.float32)
    mask = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="no token in row `1`"):
        pooled_stats(x, [[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="mask has shape"):
        pooled_stats(x, np.ones((3, 2)))
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        pooled_stats(x[0], mask)
    with pytest.raises(ValueError, match="class"):
        pooled_stats(x, mask, [0, 2])
    with pytest.raises(ValueError, match="one class a row"):
        pooled_stats(x, mask, [0])
    x[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"token `2`.*row `1`, column `3`"):
        pooled_stats(x, mask)
    mask[1, 2] = False
    assert (pooled_stats(x, mask).pooled == 0).all()
