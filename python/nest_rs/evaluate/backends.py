"""Engines that write greedy answers in place of a torch model: ONNX Runtime, on an export, and vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from nest_rs.errors import NestError
from nest_rs.files import read_json
from nest_rs.models import Base

if TYPE_CHECKING:
    import torch

# Prompts of one length that ONNX Runtime decodes together.
_TOGETHER = 32


@runtime_checkable
class Backend(Protocol):
    """Writes greedy answers.

    Attributes:
        context: Tokens that prompt and answer may take together.
    """

    context: int

    def answer(self, ids: Sequence[list[int]], max_new_tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """Token ids of each answer, the end token included where it ended, in the order of the prompts."""


def open_backend(name: str, folder: Path, dtype: torch.dtype) -> Backend:
    """`onnx` on an export, or `vllm` on a Hugging Face folder.

    Raises:
        NestError: its packages are not installed, or the folder is not what it reads.
    """
    return OnnxBackend(folder) if name == "onnx" else VllmBackend(folder, dtype)


def find_export(folder: Path) -> Base:
    """An ONNX export as a base to name results by.

    Raises:
        NestError: the folder is none.
    """
    if not (folder / "genai_config.json").is_file():
        raise NestError(f"no ONNX export in `{folder}`", mend="make one with nest-rs export")
    return Base(str(folder), folder)


def until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and with the first that ends an answer."""
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def of_one_length(ids: Sequence[list[int]], size: int) -> list[list[int]]:
    """Batches, by index, of at most `size` prompts of one length, for a graph that knows no padding."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    groups = [list(group) for _, group in groupby(order, key=lambda index: len(ids[index]))]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


class OnnxBackend:
    """onnxruntime-genai on an export; prompts of one length are decoded together, as its graph knows no padding."""

    def __init__(self, folder: Path) -> None:
        if not importlib.util.find_spec("onnxruntime_genai"):
            raise NestError("`--backend onnx` needs onnxruntime-genai", mend="pip install 'nest-rs[onnx]'")
        import onnxruntime_genai as genai

        find_export(folder)
        settings = read_json(folder / "genai_config.json")["model"]
        ends = settings["eos_token_id"]
        self.ends = {ends} if isinstance(ends, int) else {*ends}
        self.context = int(settings["context_length"])
        self._model = genai.Model(str(folder))

    def answer(self, ids: Sequence[list[int]], max_new_tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """See `Backend`."""
        answers: list[list[int]] = [[] for _ in ids]
        for batch in of_one_length(ids, _TOGETHER):
            for index, tokens in zip(batch, self._decode([ids[i] for i in batch], max_new_tokens), strict=True):
                answers[index] = tokens
            advance(len(batch))
        return answers

    def _decode(self, ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        import onnxruntime_genai as genai

        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=len(ids[0]) + max_new_tokens,
            do_sample=False,
            batch_size=len(ids),
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        generator = genai.Generator(self._model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        told = [generator.get_sequence(row)[len(ids[0]) :].tolist() for row in range(len(ids))]
        return [until_end(tokens, self.ends) for tokens in told]


class VllmBackend:
    """vLLM's offline engine on a Hugging Face folder."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        if not importlib.util.find_spec("vllm"):
            raise NestError("`--backend vllm` needs vLLM", mend="pip install 'nest-rs[vllm]'")
        import vllm

        self._llm: Any = vllm.LLM(model=str(folder), dtype=str(dtype).removeprefix("torch."))
        self.context = int(self._llm.llm_engine.model_config.max_model_len)

    def answer(self, ids: Sequence[list[int]], max_new_tokens: int, advance: Callable[[int], None]) -> list[list[int]]:
        """See `Backend`."""
        import vllm

        greedy = vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        out = self._llm.generate([{"prompt_token_ids": row} for row in ids], greedy, use_tqdm=False)
        advance(len(ids))
        return [list(found.outputs[0].token_ids) for found in out]
