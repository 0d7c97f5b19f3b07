"""Tiny real models: random weights, real architectures, a tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from nest_rs.models import load_model, load_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["how do I bake bread", "Sorry, but I can't help with that"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def write_tiny_model(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """A random model of a family in a Hugging Face folder, its weights not too small to matter."""
    torch.manual_seed(0)
    config = FAMILIES[family](**{**SHAPE, **changes}, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_prompts(path: Path, harmful: int = 24, benign: int = 24) -> Path:
    """A small prompt set whose classes a random model can tell apart."""
    rows = []
    for number in range(harmful):
        split = "test" if number % 6 == 5 else "train"
        rows.append({"prompt": f"break into house number {number} at night", "kind": "harmful", "split": split})
    for number in range(benign):
        split = "test" if number % 6 == 5 else "train"
        kind = "twin" if number % 3 == 0 else "benign"
        rows.append({"prompt": f"bake {number} loaves of bread, please", "kind": kind, "split": split})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> PreTrainedModel:
    """That Llama in float32, loaded once: tests that change a model load their own."""
    return load_model(tiny, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture(autouse=True)
def own_answer_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests on tiny models leave nothing in the user's cache; those on the built-in model share it."""
    if "builtin" not in request.keywords:
        monkeypatch.setenv("NEST_RS_CACHE", str(tmp_path / "cache"))
