"""Patch a 16 GB checkpoint in place and on a copy, with `cp` and PEFT's merge beside it.

Usage: python benches/patch.py [--folder DIR] [--layers 32] [--peft-layers 2]

Makes a checkpoint of an 8B Llama's shape (bf16, shards of 4 GB, random bytes of finite weights, nothing sparse) under
DIR (needs twice its size in free space), a patch of 64 sites x 50 rows, and measures each step in a process of its own:
wall seconds, and the peak of private memory (RSS without file pages, from /proc/self/smaps_rollup, sampled every 5 ms).
PEFT's `merge_and_unload` and `save_pretrained` run on the same shape with fewer layers, as it must fit in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN, VOCAB, HEADS, KV = 4096, 14336, 128256, 32, 8
SHARD = 4 * 2**30


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-3-8B with some number of layers."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    head = HIDDEN // HEADS
    for layer in range(layers):
        block = f"model.layers.{layer}"
        out |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.mlp.down_proj.weight": (HIDDEN, FFN),
            f"{block}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{block}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
            f"{block}.self_attn.k_proj.weight": (KV * head, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (KV * head, HIDDEN),
        }
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_checkpoint(folder: Path, layers: int) -> int:
    """A sharded bf16 checkpoint; returns its bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # Normal weights of deviation 0.02, cut from one pool at random places: no two rows are alike, and it is quick.
    pool = rng.normal(0, 0.02, 1 << 25).astype(np.float32)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        count = 2 * int(np.prod(shape))
        if size + count > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    total, table = 0, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in shard.items():
            count = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count]}
            table[name] = file
            at += count
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            left = at // 2
            while left:
                start = int(rng.integers(0, len(bits) - 1))
                part = bits[start : start + left]
                part.tofile(out)
                left -= len(part)
            os.fsync(out.fileno())
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def make_patch(folder: Path, layers: int, out: Path, *, rows: int = 50, clusters: int = 4) -> None:
    """A sealed patch of `rows` rows of each gate and up projection."""
    from nest_rs.patch import NestPatch, RowDelta

    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        for projection in ("gate", "up"):
            chosen = np.sort(rng.choice(FFN, rows, replace=False)).astype(np.int32)
            delta = rng.normal(0, 0.004, (clusters, HIDDEN)).astype(np.float32)
            cluster = (np.arange(rows) % clusters).astype(np.int16)
            tensors[f"model.layers.{layer}.mlp.{projection}_proj.weight"] = RowDelta(chosen, cluster, delta)
    NestPatch(tensors, {"base": {"id": "bench", "revision": None}}).seal(folder).save(out)


def read_through(folder: Path) -> None:
    """Read every file once: what is copied next stands in the page cache as far as that has room."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


class Memory:
    """The peak of this process's anonymous memory while it lives."""

    def __enter__(self) -> Memory:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            text = Path("/proc/self/smaps_rollup").read_text()
            anonymous = next(line for line in text.splitlines() if line.startswith("Anonymous:"))
            self.peak = max(self.peak, int(anonymous.split()[1]) * 1024)
            if self._stop.wait(0.005):
                return


def step(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    """Run one step of `child` in a new process; seconds include its start."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", name, "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    return {"process_seconds": round(seconds, 3), **json.loads(done.stdout.splitlines()[-1])}


def child(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    """One measured step."""
    folder = Path(arguments["folder"])
    with Memory() as memory:
        started = time.perf_counter()
        if name == "peft":
            import torch
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            merged = PeftModel.from_pretrained(model, arguments["adapter"]).merge_and_unload()
            merged.save_pretrained(arguments["out"])
        else:
            from nest_rs.patch import NestPatch

            patch = NestPatch.load(arguments["patch"])
            if name == "apply":
                patch.apply(folder)
            elif name == "copy":
                patch.apply(folder, out=Path(arguments["out"]))
            elif name == "remove":
                patch.remove(folder)
            else:
                print(patch.verify(folder).state, file=sys.stderr)
        seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "peak_mb": round(memory.peak / 1e6, 1)}


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nest-rs-bench")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peft-layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", action="store_true", help="only make the checkpoint and the patch under --folder")
    parser.add_argument("--keep", action="store_true", help="measure on what --make left, and leave it")
    parser.add_argument("--child")
    parser.add_argument("--arguments", type=json.loads)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.arguments)))
        return
    root: Path = options.folder
    results: dict[str, Any] = {}
    try:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
            write_checkpoint(root / "base", options.layers)
            make_patch(root / "base", options.layers, root / "patch")
        if options.make:
            return
        results["bytes"] = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
        results["patch_bytes"] = (root / "patch").stat().st_size
        os.sync()
        base = {"folder": str(root / "base"), "patch": str(root / "patch"), "out": str(root / "out")}
        results["apply"], results["remove"] = [], []
        for _ in range(options.repeats):
            results["apply"].append(step("apply", base))
            results["remove"].append(step("remove", base))
        if options.repeats:
            results["verify"] = step("verify", base)
        results["cp"], results["copy"] = [], []
        for turn in range(options.copies):
            for name in ("cp", "copy") if turn % 2 else ("copy", "cp"):
                shutil.rmtree(root / "out", ignore_errors=True)
                read_through(root / "base")
                os.sync()
                if name == "copy":
                    results["copy"].append(step("copy", base))
                else:
                    started = time.perf_counter()
                    subprocess.run(["cp", "-r", str(root / "base"), str(root / "out")], check=True)
                    results["cp"].append({"seconds": round(time.perf_counter() - started, 3)})
        shutil.rmtree(root / "out", ignore_errors=True)
        if options.peft_layers:
            from nest_rs.patch import NestPatch

            write_checkpoint(root / "small", options.peft_layers)
            make_patch(root / "small", options.peft_layers, root / "small-patch")
            NestPatch.load(root / "small-patch").to_lora(root / "adapter")
            small = {"folder": str(root / "small"), "patch": str(root / "small-patch")}
            results["small_bytes"] = sum(path.stat().st_size for path in (root / "small").glob("*.safetensors"))
            results["small_apply"] = step("apply", small)
            results["small_remove"] = step("remove", small)
            results["small_copy"] = step("copy", {**small, "out": str(root / "out")})
            shutil.rmtree(root / "out", ignore_errors=True)
            results["small_peft"] = step("peft", {**small, "adapter": str(root / "adapter"), "out": str(root / "out")})
    finally:
        if not (options.keep or options.make):
            shutil.rmtree(root, ignore_errors=True)
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
