"""A patch as an ordinary PEFT LoRA adapter, for the servers that load those today.

W + B A with A [r, d] the deltas (a row a cluster, the rest zero) and B [rows, r] the ties. One-hot ties make every
product exact, so the merged weights are the fold's to the bit where PEFT adds in float32 and rounds once
(`merge_and_unload()` without `safe_merge`, on a model in float32 or bfloat16, the adapter kept in float32 as it does by
default). A weight of -0 is the one exception: PEFT adds 0 to every row, which makes it +0. With learned ties the sum is
the library's, and a weight may differ in its last place. The native patch stays the source of truth: an adapter cannot
be verified, or removed to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nest_rs.errors import NestError
from nest_rs.files import new_folder

if TYPE_CHECKING:
    from nest_rs.patch import NestPatch

# Servers take these; one rank for all modules, as they allocate by the largest.
RANKS = (1, 8, 16, 32, 64, 128)


def write_lora(patch: NestPatch, out: Path, *, overwrite: bool = False) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        patch: A sealed patch (its manifest knows the shapes).
        out: A new folder.
        overwrite: Replace `out`.

    Raises:
        NestError: not sealed, more than 128 clusters in one matrix, or a stack of expert matrices.
    """
    if not patch.sealed:
        raise NestError("the patch is not bound to a base, so the shapes of its matrices are not known")
    most = max(len(change.delta) for change in patch.tensors.values())
    rank = next((r for r in RANKS if r >= most), None)
    if rank is None:
        raise NestError(f"a matrix of the patch has `{most}` clusters", mend=f"LoRA ranks go up to {RANKS[-1]}")
    arrays: dict[str, NDArray[np.float32]] = {}
    modules = []
    for name, change in sorted(patch.tensors.items()):
        if not name.endswith(".weight"):
            raise NestError(f"`{name}` is a stack of expert matrices, which a LoRA adapter does not reach")
        module = name.removesuffix(".weight")
        modules.append(module)
        a = np.zeros((rank, change.delta.shape[1]), np.float32)
        a[: len(change.delta)] = change.delta
        b = np.zeros((patch.manifest["tensors"][name]["shape"][0], rank), np.float32)
        b[change.rows, : len(change.delta)] = change.ties
        arrays[f"base_model.model.{module}.lora_A.weight"] = a
        arrays[f"base_model.model.{module}.lora_B.weight"] = b
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": (patch.manifest.get("base") or {}).get("id"),
        "revision": (patch.manifest.get("base") or {}).get("revision"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    with new_folder(out, overwrite=overwrite) as scratch:
        save_file(arrays, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        (scratch / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out
