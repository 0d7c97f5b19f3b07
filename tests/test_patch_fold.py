"""The patch file and what folding it into a checkpoint does to the bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import write_tiny_model
from nest_rs import NestError, NestPatch
from nest_rs.fold import merge_folder
from nest_rs.models import Base, load_model
from nest_rs.numeric import tensor_sha256
from nest_rs.patch import FORMAT, RowDelta, tied
from nest_rs.sites import find_sites

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UP = "model.layers.0.mlp.up_proj.weight"


def some_patch(folder: Path, **manifest: Any) -> NestPatch:
    rng = np.random.default_rng(0)
    tensors = {}
    for site in find_sites(load_model(folder, device=CPU, dtype=torch.float32)):
        rows = np.sort(rng.choice(site.d_out, 7, replace=False)).astype(np.int32)
        cluster = np.array([0, 2, 1, 0, 1, 2, 0], np.int16)
        tensors[site.tensor] = RowDelta(rows, cluster, rng.normal(size=(3, site.d_in)).astype(np.float32))
    return NestPatch(tensors, manifest)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def same(one: NestPatch, two: NestPatch) -> bool:
    return one.tensors.keys() == two.tensors.keys() and all(
        np.array_equal(getattr(change, name), getattr(two.tensors[tensor], name))
        and getattr(change, name).dtype == getattr(two.tensors[tensor], name).dtype
        for tensor, change in one.tensors.items()
        for name in ("rows", "cluster", "delta")
    )


def test_a_patch_is_read_back_as_it_was(tiny: Path, tmp_path: Path) -> None:
    patch = some_patch(tiny, base={"id": "x", "revision": None}, note="caf\u00e9")
    patch.save(tmp_path / "patch.safetensors")
    again = NestPatch.load(tmp_path / "patch.safetensors")
    assert same(patch, again)
    assert again.manifest == {"base": {"id": "x", "revision": None}, "note": "caf\u00e9"}
    assert (again.neurons, again.clusters, again.trainable_params) == (4 * 7, 4 * 3, 4 * 3 * 64)


def test_learned_ties_are_read_back_and_belong_to_the_id(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    fixed = some_patch(tiny)
    ties = {name: rng.normal(size=(7, 3)).astype(np.float32) for name in fixed.tensors}
    learned = NestPatch({name: replace(change, tie=ties[name]) for name, change in fixed.tensors.items()})
    learned.save(tmp_path / "patch.safetensors")
    again = NestPatch.load(tmp_path / "patch.safetensors")
    assert again.id == learned.id != fixed.id
    assert all(np.array_equal(change.tie, ties[name]) for name, change in again.tensors.items())
    assert again.trainable_params == 4 * (3 * 64 + 7 * 3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_give_the_same_bits_in_numpy_and_torch(k: int) -> None:
    rng = np.random.default_rng(k)
    delta, tie = rng.normal(size=(k, 64)).astype(np.float32), rng.normal(size=(9, k)).astype(np.float32)
    cluster = np.arange(9) % k
    found = tied(delta, cluster, tie)
    other = tied(torch.from_numpy(delta), torch.from_numpy(cluster), torch.from_numpy(tie)).numpy()
    assert found.tobytes() == other.tobytes()
    by_hand = [[reduce(np.add, [t * u for t, u in zip(row, column, strict=True)]) for column in delta.T] for row in tie]
    assert found.tobytes() == np.array(by_hand, np.float32).tobytes()
    hot = np.eye(k, dtype=np.float32)[cluster]
    assert np.array_equal(tied(delta, cluster, hot), tied(delta, cluster))


def test_a_patch_is_an_ordinary_safetensors_file(tiny: Path, tmp_path: Path) -> None:
    some_patch(tiny, seed=3).save(tmp_path / "patch.safetensors")
    with safe_open(tmp_path / "patch.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["nest_patch"])
        assert manifest == {"format": FORMAT, "seed": 3, "sha256": some_patch(tiny, seed=3).id}
        assert file.get_tensor(f"{UP}.rows").dtype == torch.int32
        assert file.get_tensor(f"{UP}.cluster").dtype == torch.int16
        assert file.get_tensor(f"{UP}.delta").shape == (3, 64)


def test_the_same_patch_is_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name, manifest in (("a", {"x": 1, "y": {"b": 2, "a": 1}}), ("b", {"y": {"a": 1, "b": 2}, "x": 1})):
        patch = some_patch(tiny, **manifest)
        if name == "b":  # neither the order of tensors nor that of keys matters
            patch.tensors = dict(reversed(patch.tensors.items()))
        patch.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


Arrays = dict[str, Any]


def rows(values: list[int], dtype: type = np.int32) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({f"{UP}.rows": np.array(values, dtype)})


def cluster(values: list[int], dtype: type = np.int16) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({f"{UP}.cluster": np.array(values, dtype)})


def delta(values: Any, dtype: type = np.float32) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({f"{UP}.delta": np.array(values, dtype)})


def tie(values: Any, dtype: type = np.float32) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({f"{UP}.tie": np.array(values, dtype)})


HOSTILE: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "no rows": (lambda arrays: arrays.pop(f"{UP}.rows"), f"lacks the array `{UP}.rows`"),
    "no cluster": (lambda arrays: arrays.pop(f"{UP}.cluster"), f"lacks the array `{UP}.cluster`"),
    "no delta": (lambda arrays: arrays.pop(f"{UP}.delta"), f"lacks the array `{UP}.delta`"),
    "a strange array": (lambda arrays: arrays.update({"x.other": np.zeros(2)}), "the unknown array `x.other`"),
    "an array too many": (
        lambda arrays: arrays.update({f"{UP}.other": np.zeros(2)}),
        f"the unknown array `{UP}.other`",
    ),
    "rows of 64 bits": (rows([1, 2, 3], np.int64), "inconsistent"),
    "clusters of 32 bits": (cluster([0, 1, 1], np.int32), "inconsistent"),
    "deltas of 16 bits": (delta(np.zeros((2, 64)), np.float16), "inconsistent"),
    "deltas of 64 bits": (delta(np.zeros((2, 64)), np.float64), "inconsistent"),
    "rows out of order": (rows([3, 2, 5]), "inconsistent"),
    "a row twice": (rows([2, 2, 5]), "inconsistent"),
    "a negative row": (rows([-1, 2, 5]), "inconsistent"),
    "rows that wrap around": (rows([2_147_483_647, -2_147_483_648, 5]), "inconsistent"),
    "no row": (rows([]), "inconsistent"),
    "a row too few": (rows([1, 2]), "inconsistent"),
    "a matrix of rows": (rows([[1], [2], [3]]), "inconsistent"),  # type: ignore[list-item]
    "a cluster past k": (cluster([0, 1, 2]), "inconsistent"),
    "a negative cluster": (cluster([0, -1, 1]), "inconsistent"),
    "a vector of deltas": (delta(np.zeros(64)), "inconsistent"),
    "no delta at all": (delta(np.zeros((0, 64))), "inconsistent"),
    "NaN": (delta(np.full((2, 64), np.nan)), "inconsistent"),
    "ties of 64 bits": (tie(np.zeros((3, 2)), np.float64), "inconsistent"),
    "ties of too few rows": (tie(np.zeros((2, 2))), "inconsistent"),
    "ties to too many deltas": (tie(np.zeros((3, 3))), "inconsistent"),
    "a vector of ties": (tie(np.zeros(3)), "inconsistent"),
    "a tie that is not finite": (tie(np.full((3, 2), np.inf)), "inconsistent"),
    "infinity": (delta(np.full((2, 64), np.inf)), "inconsistent"),
}


def write_arrays(path: Path, spoil: Callable[[Arrays], Any], metadata: dict[str, str] | None) -> Path:
    arrays: Arrays = {}
    rows([1, 2, 3])(arrays)
    cluster([0, 1, 1])(arrays)
    delta(np.zeros((2, 64)))(arrays)
    spoil(arrays)
    save_file(arrays, path, metadata=metadata)
    return path


# The id of the unspoiled arrays without any manifest.
ID = "63983381229836e6658a33de5b75bd6656187d43987feb12b5d097eb34ed4d8c"
GOOD = {"nest_patch": json.dumps({"format": FORMAT, "sha256": ID})}


def test_the_unspoiled_patch_is_read(tmp_path: Path) -> None:
    patch = NestPatch.load(write_arrays(tmp_path / "patch", lambda arrays: None, GOOD))
    assert (patch.neurons, patch.clusters) == (3, 2)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_patch_is_refused(name: str, tmp_path: Path) -> None:
    spoil, message = HOSTILE[name]
    with pytest.raises(NestError, match=message):
        NestPatch.load(write_arrays(tmp_path / "patch", spoil, GOOD))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is not a NeST patch"),
        ({"other": "x"}, "is not a NeST patch"),
        ({"nest_patch": "not JSON"}, "is not a NeST patch"),
        ({"nest_patch": "[1]"}, "is not a NeST patch"),
        ({"nest_patch": "{}"}, "is not a NeST patch"),
        (
            {"nest_patch": '{"format": "nest-patch/2"}'},
            "has the format `nest-patch/2`; this version reads nest-patch/1",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(metadata: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(NestError, match=message):
        NestPatch.load(write_arrays(tmp_path / "patch", lambda arrays: None, metadata))


@pytest.mark.parametrize("content", [None, b"", b"\0" * 7, b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "patch").write_bytes(content)
    with pytest.raises(NestError, match=r"cannot read the patch|is not a NeST patch"):
        NestPatch.load(tmp_path / "patch")


def test_a_patch_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "patch", metadata=GOOD)
    with pytest.raises(NestError, match="moves nothing"):
        NestPatch.load(tmp_path / "patch")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_rows_of_the_patch_move(dtype: torch.dtype, family: str, shards: int, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", family, dtype)
    if shards > 1:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=f"{size // 3000 + 1}KB")
        assert len(list(folder.glob("*.safetensors"))) >= 3
    before = read_all(folder)
    patch = some_patch(folder)
    report = merge_folder(Base("base", folder), patch, tmp_path / "merged", card="a card")
    after = read_all(tmp_path / "merged")

    assert after.keys() == before.keys()
    assert report.keys() == patch.tensors.keys()
    for name, values in before.items():
        wanted = values.clone()
        if name in patch.tensors:
            change = patch.tensors[name]
            moved = torch.from_numpy(change.rows).long()
            wanted[moved] = (values[moved].float() + torch.from_numpy(change.moves)).to(dtype)
            assert report[name] == {
                "sha256_before": sha256(values),
                "sha256_after": sha256(wanted),
                "rows": 7,
                "changed": int((bits(wanted) != bits(values)).sum()),
            }
        assert after[name].dtype == dtype
        assert torch.equal(bits(after[name]), bits(wanted)), name


def test_headers_and_other_files_stay_and_the_card_is_ours(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "README.md").write_text("the base's card")
    (base / "LICENSE.txt").write_text("terms")
    (base / "pytorch_model.bin").write_bytes(b"stale after the fold")
    merge_folder(Base("base", base), some_patch(base), tmp_path / "merged", card="a card")
    merged = tmp_path / "merged"
    assert (merged / "README.md").read_text() == "a card"
    assert (merged / "LICENSE.txt").read_text() == "terms"
    assert not (merged / "pytorch_model.bin").exists()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    heads = []
    for folder in (base, merged):
        content = (folder / "model.safetensors").read_bytes()
        heads.append(content[: 8 + int.from_bytes(content[:8], "little")])
    assert heads[0] == heads[1]


def test_plain_transformers_loads_the_result(tiny: Path, tmp_path: Path) -> None:
    patch = some_patch(tiny)
    merge_folder(Base("base", tiny), patch, tmp_path / "merged", card="")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for name, change in patch.tensors.items():
        model.get_parameter(name).data[torch.from_numpy(change.rows).long()] += torch.from_numpy(change.moves)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("how do I bake bread", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, model(ids).logits)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_base_without_the_tensor_is_refused(tiny: Path, tmp_path: Path) -> None:
    phi3 = write_tiny_model(tmp_path / "phi3", "phi3")
    with pytest.raises(NestError, match=r"the base `phi` has no tensor `model\.layers\.0\.mlp\.gate_proj\.weight`, "):
        merge_folder(Base("phi", phi3), some_patch(tiny), tmp_path / "merged", card="")
    assert left_behind(tmp_path) == ["phi3"]


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"hidden_size": 32}])
def test_a_base_of_another_shape_is_refused(changes: dict[str, int], tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", **changes)
    with pytest.raises(NestError, match="mlp"):
        merge_folder(Base("other", other), some_patch(tiny), tmp_path / "merged", card="")
    assert left_behind(tmp_path) == ["other"]


def test_a_base_with_other_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    patch = some_patch(tiny)
    patch = patch.seal(tiny)
    assert {name: seal["sha256_before"] for name, seal in patch.manifest["tensors"].items()} == tensor_sha256(
        tiny / "model.safetensors", patch.tensors
    )
    merge_folder(Base("tiny", tiny), patch, tmp_path / "right", card="")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = load_file(other / "model.safetensors")
    weights[UP][90, 7] += 1
    save_torch_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NestError, match=f"`{UP}`"):
        merge_folder(Base("other", other), patch, tmp_path / "merged", card="")
    assert left_behind(tmp_path) == ["other", "right"]


def test_an_existing_output_is_kept_unless_told(tiny: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "mine").write_text("x")
    with pytest.raises(NestError, match=r"the output `.*merged` exists; name another one or remove it"):
        merge_folder(Base("tiny", tiny), some_patch(tiny), merged, card="")
    assert left_behind(merged) == ["mine"]
    merge_folder(Base("tiny", tiny), some_patch(tiny), merged, card="", overwrite=True)
    assert "mine" not in left_behind(merged)
    assert (merged / "model.safetensors").is_file()
    assert left_behind(tmp_path) == ["merged"]


def test_an_empty_output_folder_is_used(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge_folder(Base("tiny", tiny), some_patch(tiny), tmp_path / "merged", card="")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
