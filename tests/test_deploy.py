"""Putting a patch on a deployed model, taking it off to the bit, and telling whether it is there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from conftest import SHAPE, write_tiny_model
from nest_rs import NestError, NestPatch
from nest_rs.cli import main
from nest_rs.fold import merge_folder
from nest_rs.models import Base
from nest_rs.patch import RowDelta, sketch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shard(folder: Path, dtype: torch.dtype) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=f"{size // 3000 + 1}KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def make_patch(
    folder: Path,
    names: list[str] | None = None,
    *,
    seed: int = 0,
    size: float = 0.02,
    first: int = 0,
    ties: bool = True,
    **manifest: Any,
) -> NestPatch:
    """A sealed patch of seven rows in three clusters a feed-forward matrix, its deltas as large as trained ones.

    With `ties`, those of the up projections are learned.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, weight in tensors_of(folder).items():
        if name in names if names else name.endswith(("gate_proj.weight", "up_proj.weight")):
            rows = np.sort(rng.choice(np.arange(first, first + 40), 7, replace=False)).astype(np.int32)
            cluster = np.array([0, 2, 1, 0, 1, 2, 0], np.int16)
            delta = rng.normal(0, size, (3, weight.shape[-1])).astype(np.float32)
            tie = np.eye(3, dtype=np.float32)[cluster] + rng.normal(0, 0.5, (7, 3)).astype(np.float32)
            tensors[name] = RowDelta(rows, cluster, delta, tie=tie if ties and "up_proj" in name else None)
    return NestPatch(tensors, manifest).seal(folder)


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


# On and off.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "shards"), [("llama", 1), ("llama", 3), ("phi3", 3)])
def test_a_patch_goes_on_in_place_and_comes_off_bit_for_bit(
    dtype: torch.dtype, family: str, shards: int, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "base", family, dtype)
    if shards > 1:
        shard(folder, dtype)
    patch = make_patch(folder)
    patch.save(tmp_path / "patch")
    patch = NestPatch.load(tmp_path / "patch")
    before = hashes(folder)
    merge_folder(Base("base", folder), patch, tmp_path / "merged", card="")

    assert patch.verify(folder).state == "clean"
    report = patch.apply(folder).tensors
    assert patch.verify(folder).state == "patched"
    after = {name: value for name, value in hashes(folder).items() if name.endswith("safetensors")}
    assert after == {name: value for name, value in hashes(tmp_path / "merged").items() if name.endswith("safetensors")}
    for name, entry in report.items():
        assert entry["elements"] == 7 * 64
        assert entry["kept"] == pytest.approx(1, abs=0.02 if dtype == torch.bfloat16 else 1e-3), name
        seal = patch.manifest["tensors"][name]
        assert seal["sha256_after"] == hashlib.sha256(tensors_of(folder)[name].view(torch.uint8).numpy()).hexdigest()

    patch.remove(folder)
    assert hashes(folder) == before
    patch.apply(folder)
    shutil.rmtree(folder / ".nest-rs")  # without the undo record, from the residuals
    patch.remove(folder)
    assert hashes(folder) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 0.02, 1.0, 100.0])
def test_the_residual_is_exact_for_deltas_of_any_size(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", dtype=dtype)
    patch, before = make_patch(folder, size=size), hashes(folder)
    patch.apply(folder)
    shutil.rmtree(folder / ".nest-rs")
    patch.remove(folder)
    assert hashes(folder) == before


def test_a_copy_is_patched_and_the_target_stays(base: Path, tmp_path: Path) -> None:
    patch, before = make_patch(base), hashes(base)
    patch.apply(base, out=tmp_path / "out")
    assert hashes(base) == before
    assert patch.verify(tmp_path / "out").state == "patched"
    assert {name for name in hashes(tmp_path / "out") if not name.startswith(".nest-rs")} == set(before)
    patch.remove(tmp_path / "out", out=tmp_path / "again")
    assert hashes(tmp_path / "again") == before
    with pytest.raises(NestError, match=r"the output `.*out` exists"):
        patch.apply(base, out=tmp_path / "out")
    with pytest.raises(NestError, match="lies in the target"):
        patch.apply(base, out=base / "out")


def test_two_patches_on_disjoint_rows_go_on_and_off_in_any_order(base: Path) -> None:
    before = hashes(base)
    one, two = make_patch(base, seed=1), make_patch(base, seed=2, first=45)
    one.apply(base)
    assert (two.verify(base).state, two.verify(base).others) == ("other", (one.id,))
    two.apply(base)
    for patch, other in ((one, two), (two, one)):
        assert (patch.verify(base).state, patch.verify(base).others) == ("patched", (other.id,))
    one.remove(base)
    assert (one.verify(base).state, two.verify(base).state) == ("other", "patched")
    two.remove(base)
    assert hashes(base) == before


def test_another_patch_is_known_by_its_own_file_where_its_undo_record_is_gone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = (make_patch(base, seed=seed, first=first) for seed, first in ((1, 0), (2, 45), (3, 10)))
    for name, patch in (("one", one), ("two", two), ("three", three)):
        patch.save(tmp_path / name)
    one.apply(base)
    shutil.rmtree(base / ".nest-rs")
    assert two.verify(base).state == "tampered"
    assert two.verify(base, others=[three]).state == "tampered"
    found = two.verify(base, others=[three, two, one])
    assert (found.state, found.others) == ("other", (one.id,))
    two.apply(base)
    found = two.verify(base, others=[one])
    assert (found.state, found.others) == ("patched", (one.id,))
    commands = ["verify", str(tmp_path / "two"), str(base)]
    assert main(commands) == 5
    assert main([*commands, "--others", str(tmp_path / "one"), str(tmp_path / "three")]) == 0
    assert f"and by `{one.id[:16]}`" in capsys.readouterr().out
    spoil(base, UP, 95)
    assert two.verify(base, others=[one]).state == "tampered"


def test_patches_on_the_same_rows_are_refused(base: Path) -> None:
    one, two = make_patch(base, seed=1), make_patch(base, seed=2)
    one.apply(base)
    before = hashes(base)
    with pytest.raises(NestError, match=f"carries the patch `{one.id[:16]}` on the same rows"):
        two.apply(base)
    with pytest.raises(NestError, match="carries this patch already"):
        one.apply(base)
    assert two.verify(base).state == "other"
    assert hashes(base) == before


def test_a_patch_that_is_not_on_does_not_come_off(base: Path) -> None:
    patch, before = make_patch(base), hashes(base)
    with pytest.raises(NestError, match="does not carry this patch"):
        patch.remove(base)
    assert hashes(base) == before


def spoil(folder: Path, name: str, row: int) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][row, 3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("touched", [False, True])
def test_verify_names_the_first_differing_tensor(base: Path, patched: bool, touched: bool) -> None:
    patch = make_patch(base)
    if patched:
        patch.apply(base)
    row = int(patch.tensors[UP].rows[0]) if touched else 90
    spoil(base, UP, row)
    found = patch.verify(base)
    assert (found.state, found.tensor) == ("tampered", UP)


def test_an_unsealed_patch_is_refused(base: Path) -> None:
    patch = NestPatch(make_patch(base).tensors)
    with pytest.raises(NestError, match="not bound to a base"):
        patch.apply(base)


def test_a_model_of_less_precision_is_patched_with_the_help_of_the_base(base: Path, tmp_path: Path) -> None:
    patch = make_patch(base)
    half = write_tiny_model(tmp_path / "half", dtype=torch.bfloat16)
    before = hashes(half)
    with pytest.raises(NestError, match="stored as `BF16`, which does not tell the base's rows exactly; pass --base"):
        patch.apply(half)
    patch.apply(half, base=base)
    merge_folder(Base("base", base), patch, tmp_path / "merged", card="")
    for name, weight in tensors_of(tmp_path / "merged").items():
        assert torch.equal(weight.bfloat16(), tensors_of(half)[name]), name
    assert patch.verify(half, base=base).state == "patched"
    shutil.rmtree(half / ".nest-rs")
    patch.remove(half, base=base)
    assert hashes(half) == before


# Experts.


def fused(folder: Path, disk: str, names: tuple[str, str]) -> dict[str, torch.Tensor]:
    """The stacks of experts as transformers holds them, from the matrices on disk."""
    weights = tensors_of(folder)
    return {
        f"model.layers.{layer}.mlp.experts.gate_up_proj": torch.cat(
            [weights[f"model.layers.{layer}.{disk}.experts.{e}.{name}.weight"] for e in range(4) for name in names]
        )
        for layer in range(2)
    }


@pytest.mark.parametrize(
    ("kind", "disk", "names"),
    [
        (Qwen3MoeConfig, "mlp", ("gate_proj", "up_proj")),
        (MixtralConfig, "block_sparse_moe", ("w1", "w3")),
    ],
)
def test_experts_that_are_one_stack_in_memory_and_many_matrices_on_disk(
    kind: type[Any], disk: str, names: tuple[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    config = kind(**{**SHAPE, "intermediate_size": 32, **sizes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "moe")
    stacks = fused(tmp_path / "moe", disk, names)
    rng = np.random.default_rng(0)
    deltas = {
        name: RowDelta(
            np.sort(rng.choice(len(stack), 30, replace=False)).astype(np.int32),
            np.repeat(np.arange(2, dtype=np.int16), 15),
            rng.normal(0, 0.02, (2, 64)).astype(np.float32),
        )
        for name, stack in stacks.items()
    }
    patch = NestPatch(deltas).seal(tmp_path / "moe")
    before = hashes(tmp_path / "moe")
    patch.apply(tmp_path / "moe")
    assert patch.verify(tmp_path / "moe").state == "patched"
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16)
    for name, stack in stacks.items():
        change = patch.tensors[name]
        rows = torch.from_numpy(change.rows).long()
        stack[rows] = (stack[rows].float() + torch.from_numpy(change.moves)).bfloat16()
        assert torch.equal(memory.get_parameter(name).flatten(0, 1), stack)
    patch.remove(tmp_path / "moe")
    assert hashes(tmp_path / "moe") == before


# Crashes.


def test_a_process_killed_at_any_moment_leaves_the_old_model_the_new_one_or_a_journal(base: Path) -> None:
    patch = make_patch(base)
    old = hashes(base)
    patch.apply(base)
    new = {name: value for name, value in hashes(base).items() if name in old}
    patch.remove(base)

    def apply_in_child() -> int:
        child = os.fork()
        if not child:
            try:
                patch.apply(base)
            finally:
                os._exit(0)
        return child

    started = time.perf_counter()
    os.waitpid(apply_in_child(), 0)  # in a child that shares much memory with its parent, all takes longer
    span = 1.5 * (time.perf_counter() - started)
    patch.remove(base)
    rng = random.Random(0)
    seen = {"old": 0, "new": 0, "journal": 0}
    for _ in range(200):
        child = apply_in_child()
        time.sleep(rng.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        journal = (base / ".nest-rs" / "journal").exists()
        state = patch.verify(base).state  # the next command mends what there is to mend
        assert state in ("clean", "patched")
        now = {name: value for name, value in hashes(base).items() if name in old}
        assert now == (old if state == "clean" else new)
        seen["journal" if journal else "new" if state == "patched" else "old"] += 1
        if state == "patched":
            patch.remove(base)
        assert hashes(base) == old
    assert seen["old"]
    assert seen["new"] + seen["journal"]


def full_disk(limit: int, work: Any) -> int:
    """Run in a child that can write no file past `limit` bytes; 0 if that was said in one line."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
        except NestError as error:
            os._exit(0 if "\n" not in str(error) else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("limit", [0, 100, 1000, 10_000])
def test_a_full_disk_leaves_the_target_as_it_was(base: Path, tmp_path: Path, limit: int) -> None:
    patch, before = make_patch(base), hashes(base)
    assert full_disk(limit, lambda: patch.apply(base)) == 0
    assert hashes(base) == before
    assert full_disk(limit, lambda: patch.apply(base, out=tmp_path / "out")) == 0
    assert hashes(base) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    patch.apply(base)
    after = hashes(base)
    assert full_disk(limit, lambda: patch.remove(base)) == 0
    assert hashes(base) == after


def test_another_process_at_work_is_respected(base: Path) -> None:
    import fcntl

    patch, before = make_patch(base), hashes(base)
    handle = os.open(base, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(NestError, match="another process is changing it"):
        patch.apply(base)
    os.close(handle)
    assert hashes(base) == before
    patch.apply(base)


# Patches among themselves.


def test_patches_are_compared_and_composed(tiny: Path, base: Path, tmp_path: Path) -> None:
    one, two = make_patch(base, seed=1), make_patch(base, [GATE], seed=2, first=45)
    assert one.diff(one) == {}
    found = one.diff(two)
    assert found[GATE]["rows_here"] == found[GATE]["rows_there"] == 7
    assert found[UP] == {"rows_here": 7, "rows_there": 0, "rows_both": 0, "distance": found[UP]["distance"]}
    up = one.tensors[UP]
    assert up.tie is not None
    dense = np.stack([sum(tie[c] * up.delta[c] for c in range(3)) for tie in up.tie])
    assert found[UP]["distance"] == pytest.approx(float(np.linalg.norm(dense)), rel=1e-6)

    both = one.compose(two, base=base)
    assert not one.compose(two).sealed
    both.save(tmp_path / "both")
    both = NestPatch.load(tmp_path / "both")
    both.apply(base, out=tmp_path / "at-once")
    one.apply(base)
    two.apply(base)
    assert hashes(base)["model.safetensors"] == hashes(tmp_path / "at-once")["model.safetensors"]
    with pytest.raises(NestError, match=r"both patches move the row `\d+`"):
        one.compose(make_patch(tiny, seed=3))


@pytest.mark.parametrize("ties", [(True, True), (True, False), (False, True)])
def test_patches_with_learned_ties_are_composed(ties: tuple[bool, bool], base: Path, tmp_path: Path) -> None:
    one, two = (make_patch(base, seed=1 + i, first=45 * i, ties=learned) for i, learned in enumerate(ties))
    one.compose(two, base=base).apply(base, out=tmp_path / "at-once")
    one.apply(base)
    two.apply(base)
    assert hashes(base)["model.safetensors"] == hashes(tmp_path / "at-once")["model.safetensors"]


def test_patches_of_different_bases_are_not_composed(base: Path, tmp_path: Path) -> None:
    one = make_patch(base, [GATE], seed=1)
    spoil(base, GATE, 90)
    with pytest.raises(NestError, match="made for different bases"):
        one.compose(make_patch(base, [GATE], seed=2, first=45))


def test_a_sketch_is_two_signed_sums() -> None:
    rows = np.eye(4, dtype=np.float32)
    # SplitMix64's first outputs from the state 0 end in ...af, ...d2 (as published with the algorithm).
    mixed = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    signs = [[-1.0 if value >> j & 1 else 1.0 for j in range(2)] for value in mixed]
    assert sketch(rows).tolist() == signs


# The command line.


def test_the_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = make_patch(base, base={"id": str(base), "revision": None})
    other = make_patch(base, seed=5)
    patch.save(tmp_path / "patch.safetensors")
    other.save(tmp_path / "other.safetensors")
    before = hashes(base)
    one, two, target = str(tmp_path / "patch.safetensors"), str(tmp_path / "other.safetensors"), str(base)

    assert main(["verify", one, target]) == 3
    assert capsys.readouterr().out == "clean: the patch's base\n"
    assert main(["apply", one, target]) == 2
    assert "pass either --in-place or -o OUT" in capsys.readouterr().err
    assert main(["apply", one, target, "--in-place", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][UP]["rows"] == 7
    assert main(["verify", one, target]) == 0
    assert main(["verify", two, target]) == 4
    assert f"patched by another patch: `{patch.id[:16]}`" in capsys.readouterr().out
    assert main(["inspect", target, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(entry["id"], entry["in_place"]) for entry in found["patches"]] == [(patch.id, True)]
    assert main(["remove", one, target, "--in-place"]) == 0
    assert hashes(base) == before
    assert main(["apply", one, target, "-o", str(tmp_path / "out")]) == 0
    assert main(["verify", one, str(tmp_path / "out")]) == 0
    spoil(tmp_path / "out", UP, 95)
    assert main(["verify", one, str(tmp_path / "out")]) == 5
    assert f"tampered: the first differing tensor is `{UP}`" in capsys.readouterr().out
    assert main(["inspect", one, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["id"], facts["rows"], facts["clusters"]) == (patch.id, 28, 12)
    assert 0 < facts["residual_bits_per_element"] < 4
    assert main(["verify", one, str(tmp_path / "nothing")]) == 2
    assert main(["inspect", str(tmp_path / "nothing")]) == 2


def test_a_patch_is_found_in_the_folder_of_a_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = make_patch(base)
    folder = tmp_path / "run" / "patch"
    folder.mkdir(parents=True)
    patch.save(folder / "nest_patch.safetensors")
    assert NestPatch.load(folder).id == patch.id
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == patch.id
    assert main(["apply", str(tmp_path / "run"), str(base), "--in-place"]) == 2
    assert f"the folder `{tmp_path / 'run'}` holds no patch" in capsys.readouterr().err
