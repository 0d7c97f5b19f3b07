"""The patch as a LoRA adapter, loaded by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import write_tiny_model
from nest_rs import NestError, NestPatch
from nest_rs.cli import main
from nest_rs.patch import RowDelta
from test_deploy import UP, make_patch, tensors_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_merged_by_peft_the_bits_are_the_folds(dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", family, dtype)
    patch = make_patch(folder, ties=False, base={"id": str(folder), "revision": None})
    patch.save(tmp_path / "patch")
    assert main(["apply", str(tmp_path / "patch"), "--to-lora", "-o", str(tmp_path / "adapter")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)

    patch.apply(folder, out=tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=dtype)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path / "adapter")
    ids = torch.arange(40)[None]
    if dtype == torch.float32:
        with torch.no_grad():
            difference = (loaded(ids).logits - folded(ids).logits).abs().max()
        assert difference <= 1e-4
    merged = loaded.merge_and_unload().state_dict()
    for name, weight in tensors_of(tmp_path / "folded").items():
        assert torch.equal(merged[name].view(torch.uint8), weight.view(torch.uint8)), name


def test_learned_ties_are_merged_by_peft_within_a_rounding(tiny: Path, tmp_path: Path) -> None:
    patch = make_patch(tiny, size=0.5)
    patch.to_lora(tmp_path / "adapter")
    patch.apply(tiny, out=tmp_path / "folded")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "adapter")
    merged = loaded.merge_and_unload().state_dict()
    for name, weight in tensors_of(tmp_path / "folded").items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("clusters", "rank"), [(1, 1), (2, 8), (9, 16), (33, 64), (128, 128)])
def test_the_rank_is_one_that_servers_take(clusters: int, rank: int, tiny: Path, tmp_path: Path) -> None:
    rows = np.arange(96, dtype=np.int32) if clusters <= 96 else None
    if rows is None:
        tiny = write_tiny_model(tmp_path / "wide", intermediate_size=200)
        rows = np.arange(200, dtype=np.int32)
    cluster = (rows % clusters).astype(np.int16)
    patch = NestPatch({UP: RowDelta(rows, cluster, np.ones((clusters, 64), np.float32))}).seal(tiny)
    patch.to_lora(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == rank


def test_what_a_lora_cannot_hold_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "wide", intermediate_size=200)
    rows = np.arange(129, dtype=np.int32)
    patch = NestPatch({UP: RowDelta(rows, rows.astype(np.int16), np.ones((129, 64), np.float32))})
    with pytest.raises(NestError, match="not bound to a base"):
        patch.to_lora(tmp_path / "adapter")
    with pytest.raises(NestError, match="has `129` clusters"):
        patch.seal(folder).to_lora(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
