"""Where neurons are found in each model family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from conftest import FAMILIES, SHAPE, write_tiny_model
from nest_rs import NestError
from nest_rs.sites import find_sites

D_IN, D_FF = SHAPE["hidden_size"], SHAPE["intermediate_size"]


def build(family: str, **changes: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family](**{**SHAPE, **changes}))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gate_and_up_of_each_layer_are_sites(family: str) -> None:
    sites = find_sites(build(family))
    assert [(site.layer, site.projection) for site in sites] == [
        (layer, projection) for layer in (0, 1) for projection in ("gate_proj", "up_proj")
    ]
    assert {(site.d_out, site.d_in) for site in sites} == {(D_FF, D_IN)}
    assert sites[2].module == "model.layers.1.mlp.gate_proj"
    assert sites[2].tensor == "model.layers.1.mlp.gate_proj.weight"


def test_a_fused_matrix_is_one_site_of_both_halves() -> None:
    model = build("phi3")
    sites = find_sites(model)
    assert [site.module for site in sites] == [f"model.layers.{layer}.mlp.gate_up_proj" for layer in (0, 1)]
    assert {(site.d_out, site.d_in) for site in sites} == {(2 * D_FF, D_IN)}
    # nothing of the feed-forward block is left out or counted twice
    assert sum(site.d_out for site in sites) == 2 * D_FF * model.config.num_hidden_layers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_site_names_its_tensor_in_the_checkpoint(family: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for site in find_sites(build(family)):
            assert file.get_slice(site.tensor).get_shape() == [site.d_out, site.d_in]


@pytest.mark.parametrize("projection", ["gate", "up"])
def test_one_projection_can_be_asked_for(projection: str) -> None:
    assert [site.projection for site in find_sites(build("llama"), (projection,))] == [f"{projection}_proj"] * 2


def test_layers_are_in_the_order_of_their_numbers() -> None:
    sites = find_sites(build("llama", num_hidden_layers=12), ("up",))
    assert [site.layer for site in sites] == list(range(12))


def test_a_model_without_known_sites_is_a_clear_error() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(NestError, match="no feed-forward sites in a model of class `GPT2LMHeadModel`"):
        find_sites(model)


def test_the_depth_picks_layers() -> None:
    model = build("llama", num_hidden_layers=6)
    assert [site.layer for site in find_sites(model, ("up",), (0.33, 1.0))] == [2, 3, 4, 5]
    assert [site.layer for site in find_sites(model, ("up",), (0.0, 0.5))] == [0, 1, 2]
    with pytest.raises(NestError, match=r"no layer of 6 lies between `0.9` and `0.95`"):
        find_sites(model, ("up",), (0.9, 0.95))
