"""Packed rows against padded batches and against each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conftest import SHAPE, write_tiny_model
from nest_rs.models import load_model
from nest_rs.packing import ATTENTION, attention, is_packed, pack
from nest_rs.prefix import shared_prefix
from nest_rs.train import Example, Steps, answer_logits, collate, sft_loss, train_deltas, training_attention
from test_train import PAD, deltas, examples, peft_model

CPU = torch.device("cpu")
TEXT = [Example([40], [41, 42, 43, 44, 45, 46]), Example([50], [51, 52])]
ASKED = examples(9, 3)
LONG = [Example([1, 20, 21, 110, *range(30, 80)], [60, 61]), Example([1, 20, 21, 111, *range(40, 77)], [62])]
# Two long requests among short ones, so that attention pads them apart.
ASKED[2:2], ASKED[8:8] = LONG[:1], LONG[1:]


def batches() -> list[dict[str, Any]]:
    """Requests behind a shared opening, and texts of which none is behind anything."""
    return [collate(ASKED, PAD, shared_prefix([item.prompt for item in ASKED])), collate(TEXT, PAD)]


def make_steps(count: int = 6) -> Steps:
    return Steps([*LONG, *examples(11, 1)], examples(9, 2), TEXT, batch_size=8, steps=count, seed=0, pad=PAD)


def test_a_row_holds_every_token_once() -> None:
    found = batches()
    row = pack(found, torch.float32)
    assert row.inputs["input_ids"].shape == row.inputs["position_ids"].shape
    own = [batch["attention_mask"][:, batch["prefix"].shape[1] :].bool() for batch in found]
    assert row.inputs["input_ids"].shape[1] == 192  # the next multiple of 64 that holds 182
    assert 3 + sum(int(mask.sum()) for mask in own) == 182
    for batch, mask, slots in zip(found, own, row.slots, strict=True):
        for name in ("input_ids", "position_ids"):
            assert torch.equal(row.inputs[name][0, slots[mask]], batch[name][mask])
    taken = torch.cat([slots[mask] for slots, mask in zip(row.slots, own, strict=True)])
    assert len(taken.unique()) == len(taken)


def test_long_sequences_are_padded_apart_from_short_ones() -> None:
    _, asked, text = pack(batches(), torch.float32).inputs["packing"]
    assert [bias.shape[0] for bias in asked.biases] == [8, 3]
    assert asked.biases[0].shape[1] < asked.biases[1].shape[1] == 56  # the next multiple of 8 that holds 53
    assert [bias.shape[0] for bias in text.biases] == [2]
    for item in (asked, text):
        assert torch.equal(item.slots[item.places], torch.arange(len(item.places)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_packed_logits_equal_those_of_each_sequence_alone(family: str, tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / family, family), device=CPU, dtype=torch.float32)
    with torch.no_grad(), attention(model, ATTENTION):
        assert is_packed(model)
        found = answer_logits(model, *batches())
    assert not is_packed(model)
    for items, logits in zip((ASKED, TEXT), found, strict=True):
        for item, told in zip(items, logits.split([len(item.answer) for item in items]), strict=True):
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([item.prompt + item.answer]), use_cache=False).logits[0]
            torch.testing.assert_close(told, alone[len(item.prompt) - 1 : -1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_padded_ones(checkpointing: bool, tiny: Path) -> None:
    found = []
    for name in ("eager", ATTENTION):
        model = peft_model(tiny)
        if checkpointing and name == ATTENTION:  # which drops the cache that padded batches lean on
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            model.train()
        asked, text = batches()
        with attention(model, name):
            one, two = answer_logits(model, asked, text)
            (sft_loss(one, asked["labels"]) + sft_loss(two, text["labels"])).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for padded, packed in zip(*found, strict=True):
        assert padded is not None
        assert padded.abs().max() > 0
        torch.testing.assert_close(packed, padded, atol=1e-5 * float(padded.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_rows_in_half_precision_and_under_autocast(dtype: torch.dtype, tiny_model: PreTrainedModel) -> None:
    with torch.no_grad():
        wanted = answer_logits(tiny_model, *batches())
        with attention(tiny_model, ATTENTION), torch.autocast("cpu", dtype):
            mixed = answer_logits(tiny_model, *batches())
    for one, other in zip(mixed, wanted, strict=True):
        assert float((one.float() - other).norm()) < 0.03 * float(other.norm())


def test_a_training_packs_and_moves_the_deltas_as_one_that_pads(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for packs in (True, False):
        model, seen = peft_model(tiny), []
        model.get_base_model().model.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append("packing" in kwargs), with_kwargs=True
        )
        if not packs:
            monkeypatch.setattr("nest_rs.train._packs", lambda *_: False)
        train_deltas(
            model,
            tokenizer,
            make_steps(),
            output_dir=str(tmp_path / str(packs)),
            learning_rate=1e-3,
            benign_loss="kl",
            benign_weight=1.0,
            margin_weight=1.0,
            text_weight=1.0,
            first_weight=0.5,
            seed=0,
        )
        assert any(seen) == packs
        assert not is_packed(model)
        found.append(deltas(model))
    for name, packed in found[0].items():
        padded = found[1][name]
        assert float((packed - padded).norm()) < 1e-2 * float(padded.norm())


UNFIT = {
    "soft cap": Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=1.0),
    "sinks": GptOssConfig(**SHAPE, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "short window": MistralConfig(**SHAPE, sliding_window=4),
    "convolutions": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "states": FalconH1Config(**SHAPE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
}
FIT = {
    "long window": MistralConfig(**SHAPE, sliding_window=64),
    "mixed windows": Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    ),
}


def chosen_attention(config: Any, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    with training_attention(model, make_steps()):
        return str(model.config.get_text_config()._attn_implementation)


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_of_another_attention_is_trained_padded(kind: str) -> None:
    assert chosen_attention(UNFIT[kind]) == "eager"


@pytest.mark.parametrize("kind", FIT)
def test_windows_that_hold_every_sequence_are_packed(kind: str) -> None:
    assert chosen_attention(FIT[kind]) == ATTENTION


def test_a_deep_model_is_packed_whose_roundings_add_up_in_bfloat16() -> None:
    # Two of the library's own implementations differ by a tenth here.
    assert chosen_attention(LlamaConfig(**{**SHAPE, "num_hidden_layers": 16}), torch.bfloat16) == ATTENTION


def test_the_attention_is_put_back_after_an_error(tiny_model: PreTrainedModel) -> None:
    before = tiny_model.config._attn_implementation

    def stop() -> None:
        with training_attention(tiny_model, make_steps()):
            assert is_packed(tiny_model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert tiny_model.config._attn_implementation == before


def test_dropout_of_the_attention_is_that_of_the_model(tiny: Path) -> None:
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad(), attention(model, ATTENTION):
        still = answer_logits(model, *batches())
        assert all(torch.equal(*pair) for pair in zip(still, answer_logits(model, *batches()), strict=True))
        model.train()
        assert not torch.allclose(still[0], answer_logits(model, *batches())[0])
