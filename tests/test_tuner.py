"""The PEFT tuner against dense weights, and inside the tools that take a PEFT method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from conftest import write_tiny_model
from nest_rs import NestConfig, NestPatch
from nest_rs.fold import merge_folder
from nest_rs.models import Base
from nest_rs.neurons import SiteNeurons
from nest_rs.sites import find_sites
from nest_rs.tuner import NestLinear

IDS = torch.tensor([[1, 40, 52, 300, 7, 9, 111, 5], [1, 8, 8, 250, 30, 31, 32, 33]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "phi3", "phi3")


@pytest.fixture(params=["llama", "phi3"])
def folder(request: pytest.FixtureRequest, tiny: Path, phi3: Path) -> Path:
    return tiny if request.param == "llama" else phi3


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def some_neurons(model: PreTrainedModel, seed: int = 0) -> dict[str, dict[str, list[int]]]:
    """Rows of every site, scattered and out of cluster order; the last ones of a fused matrix are its up half."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for site in find_sites(model):
        rows = np.sort(rng.choice(site.d_out, 7, replace=False))
        rows[[0, -1]] = 0, site.d_out - 1
        chosen[site.module] = {"rows": rows.tolist(), "cluster": [0, 2, 1, 0, 1, 2, 0]}
    return chosen


def tuned(folder: Path, dtype: torch.dtype = torch.float32, scale: float = 0.5, learn_ties: bool = False) -> PeftModel:
    """A model with random deltas, and random ties if they are learned."""
    model = load(folder, dtype)
    config = NestConfig(neurons=some_neurons(model), learn_ties=learn_ties, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "nest_delta" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    for name, parameter in peft.named_parameters():
        if "nest_tie" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return peft.eval()


def dense(folder: Path, peft: PeftModel, adapter: str = "default") -> PreTrainedModel:
    """The base with W + dW written into its weights, row by row."""
    model = load(folder)
    for name, layer in nest_layers(peft).items():
        weight = model.get_parameter(f"{name}.weight").data
        delta = layer.nest_delta[adapter].detach().float()
        clusters = layer.nest_cluster[adapter].tolist()
        for index, (row, cluster) in enumerate(zip(layer.nest_rows[adapter].tolist(), clusters, strict=True)):
            if adapter in layer.nest_tie:
                first, second, third = layer.nest_tie[adapter].detach()[index]
                weight[row] += first * delta[0] + second * delta[1] + third * delta[2]
            else:
                weight[row] += delta[cluster]
    return model


both = pytest.mark.parametrize("learn_ties", [False, True], ids=["fixed", "learned"])


def nest_layers(peft: PeftModel) -> dict[str, NestLinear]:
    found = {name: module for name, module in peft.named_modules() if isinstance(module, NestLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).clone()


@pytest.mark.parametrize("dtype", DTYPES)
@both
def test_zero_deltas_change_no_bit(folder: Path, dtype: torch.dtype, learn_ties: bool) -> None:
    base = load(folder, dtype)
    peft = get_peft_model(load(folder, dtype), NestConfig(neurons=some_neurons(base), learn_ties=learn_ties))
    assert torch.equal(logits(base), logits(peft))


@both
def test_the_forward_pass_equals_dense_weights(folder: Path, learn_ties: bool) -> None:
    peft = tuned(folder, learn_ties=learn_ties)
    wanted = logits(dense(folder, peft))
    torch.testing.assert_close(logits(peft), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - logits(load(folder))).abs().max() > 0.1


def test_only_the_deltas_are_trainable(folder: Path) -> None:
    base = load(folder)
    sites = find_sites(base)
    peft = get_peft_model(base, NestConfig(neurons=some_neurons(base)))
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    assert names == [f"base_model.model.{site.module}.nest_delta.default" for site in sites]
    trainable, total = peft.get_nb_trainable_parameters()
    assert trainable == sum(3 * site.d_in for site in sites)
    assert total == trainable + load(folder).num_parameters()


def test_learned_ties_begin_as_fixed_ones_and_are_trained(folder: Path) -> None:
    base = load(folder)
    peft = get_peft_model(base, NestConfig(neurons=some_neurons(base), learn_ties=True))
    sites = find_sites(load(folder))
    assert peft.get_nb_trainable_parameters()[0] == sum(3 * site.d_in + 7 * 3 for site in sites)
    for layer in nest_layers(peft).values():
        assert layer.nest_tie["default"].requires_grad
        assert layer.nest_tie["default"].dtype == torch.float32
        assert layer.nest_tie["default"].argmax(dim=1).tolist() == layer.nest_cluster["default"].tolist()
        assert layer.nest_tie["default"].sum() == layer.nest_tie["default"].square().sum() == 7


@both
def test_gradients_equal_those_of_dense_weights(folder: Path, learn_ties: bool) -> None:
    peft = tuned(folder, learn_ties=learn_ties)
    peft.train()
    peft(input_ids=IDS, labels=IDS).loss.backward()
    model = dense(folder, peft)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in nest_layers(peft).items():
        full = model.get_parameter(f"{name}.weight").grad
        found = layer.nest_delta["default"].grad
        assert full is not None
        assert found is not None
        rows = full[layer.nest_rows["default"]]
        wanted = torch.zeros_like(found)
        if learn_ties:
            for index, tie in enumerate(layer.nest_tie["default"].detach()):
                wanted += tie[:, None] * rows[index]
            found_tie = layer.nest_tie["default"].grad
            wanted_tie = torch.stack([(rows * delta).sum(dim=1) for delta in layer.nest_delta["default"].detach()], 1)
            scale = float(wanted_tie.abs().max())
            torch.testing.assert_close(found_tie, wanted_tie, atol=1e-6 + 1e-4 * scale, rtol=1e-4)
            assert scale > 0
        else:
            wanted.index_add_(0, layer.nest_cluster["default"], rows)
        torch.testing.assert_close(found, wanted, atol=1e-6 + 1e-4 * float(wanted.abs().max()), rtol=1e-4)
        assert float(wanted.abs().max()) > 0
        assert layer.base_layer.weight.grad is None


@both
def test_it_trains_under_bfloat16_autocast(tiny: Path, learn_ties: bool) -> None:
    peft = tuned(tiny, scale=0.1, learn_ties=learn_ties)
    exact = logits(peft)
    peft.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = peft(input_ids=IDS, labels=IDS)
    out.loss.backward()
    distance = (out.logits.float() - exact).norm() / exact.norm()
    assert 0 < distance < 0.05
    for layer in nest_layers(peft).values():
        for learned in (layer.nest_delta, layer.nest_tie) if learn_ties else (layer.nest_delta,):
            parameter = learned["default"]
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_on_half_precision_weights_stay_float32(tiny: Path, dtype: torch.dtype) -> None:
    peft = tuned(tiny, dtype, scale=0.1)
    assert {layer.nest_delta["default"].dtype for layer in nest_layers(peft).values()} == {torch.float32}
    out = logits(peft)
    assert out.dtype == dtype
    wanted = logits(dense(tiny, tuned(tiny, scale=0.1)))
    assert (out.float() - wanted).norm() / wanted.norm() < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, tiny: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        peft = tuned(tiny)
        peft.train()
        if checkpointing:
            peft.enable_input_require_grads()
            peft.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([layer.nest_delta["default"].grad for layer in nest_layers(peft).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@both
def test_an_adapter_is_saved_and_read_back(folder: Path, tmp_path: Path, learn_ties: bool) -> None:
    peft = tuned(folder, learn_ties=learn_ties)
    peft.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(nest_layers(peft)) * (2 if learn_ties else 1)
    assert {tuple(values.shape) for values in saved.values()} == ({(3, 64), (7, 3)} if learn_ties else {(3, 64)})
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(config, NestConfig)
    assert config.neurons == some_neurons(load(folder))
    again = PeftModel.from_pretrained(load(folder), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(peft))
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_every_bit(folder: Path, dtype: torch.dtype) -> None:
    peft = tuned(folder, dtype)
    before = {name: bits(layer.base_layer.weight) for name, layer in nest_layers(peft).items()}
    peft.merge_adapter()
    for name, layer in nest_layers(peft).items():
        moved = (bits(layer.base_layer.weight) != before[name]).any(dim=1).nonzero().flatten()
        assert moved.tolist() == sorted(layer.nest_rows["default"].tolist())
    peft.unmerge_adapter()
    for name, layer in nest_layers(peft).items():
        assert torch.equal(bits(layer.base_layer.weight), before[name])


def test_a_merged_model_speaks_as_the_tuned_one(folder: Path) -> None:
    peft = tuned(folder)
    attached = logits(peft)
    peft.merge_adapter()
    torch.testing.assert_close(logits(peft), attached, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(peft), logits(dense(folder, peft)))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_merge_and_unload_gives_the_bits_of_the_file_fold(
    family: str, dtype: torch.dtype, learn_ties: bool, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "base", family, dtype)
    peft = tuned(folder, dtype, learn_ties=learn_ties)
    merge_folder(Base("base", folder), NestPatch.from_model(peft), tmp_path / "merged", card="")
    folded = load_file(tmp_path / "merged" / "model.safetensors")
    merged = peft.merge_and_unload()
    assert not any(isinstance(module, NestLinear) for module in merged.modules())
    state = merged.state_dict()
    assert set(folded) == set(state)
    for name, values in folded.items():
        assert torch.equal(bits(values), bits(state[name])), name


def test_unloading_without_merging_gives_the_base_back(tiny: Path) -> None:
    peft = tuned(tiny)
    base = peft.unload()
    assert not any(isinstance(module, NestLinear) for module in base.modules())
    assert torch.equal(logits(base), logits(load(tiny)))


def test_a_disabled_adapter_is_the_base(tiny: Path) -> None:
    peft = tuned(tiny)
    attached = logits(peft)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), logits(load(tiny)))
    assert torch.equal(logits(peft), attached)


def test_disabling_a_merged_adapter_is_the_base_bit_for_bit(tiny: Path) -> None:
    peft = tuned(tiny, torch.bfloat16)
    peft.merge_adapter()
    with peft.disable_adapter():
        assert torch.equal(logits(peft), logits(load(tiny, torch.bfloat16)))


def test_the_base_looks_untouched_while_the_rows_stand_in_its_weight(tiny: Path) -> None:
    peft = tuned(tiny, torch.bfloat16)
    base = load(tiny, torch.bfloat16).state_dict()
    attached = logits(peft)
    for name, layer in nest_layers(peft).items():
        assert not torch.equal(layer.base_layer.weight, base[f"{name}.weight"])
        assert torch.equal(layer.get_base_layer().weight, base[f"{name}.weight"])
    assert torch.equal(logits(peft), attached)
    saved = peft.state_dict()
    for name in nest_layers(peft):
        assert torch.equal(saved[f"base_model.model.{name}.base_layer.weight"], base[f"{name}.weight"])
    again = copy.deepcopy(peft)
    torch.testing.assert_close(logits(again), attached, atol=0.3, rtol=0.05)  # a copy adds the rows in bfloat16
    for name, layer in nest_layers(again).items():
        assert torch.equal(layer.get_base_layer().weight, base[f"{name}.weight"])


@both
def test_what_is_trained_is_what_is_folded_in_bfloat16_too(tiny: Path, learn_ties: bool) -> None:
    peft = tuned(tiny, torch.bfloat16, scale=0.01, learn_ties=learn_ties)
    attached = logits(peft)
    assert torch.equal(logits(peft.merge_and_unload()), attached)


@both
def test_a_weight_that_cannot_be_written_gives_the_same_outputs_and_gradients(tiny: Path, learn_ties: bool) -> None:
    written, added = tuned(tiny, learn_ties=learn_ties), tuned(tiny, learn_ties=learn_ties)
    for layer in nest_layers(added).values():
        # as FSDP2 does for the time of a forward pass: another tensor in the weight's place
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data.clone(), requires_grad=False)
    for peft in (written, added):
        peft(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(added), logits(written), atol=1e-5, rtol=1e-5)
    for one, other in zip(nest_layers(written).values(), nest_layers(added).values(), strict=True):
        for learned in ("nest_delta", "nest_tie") if learn_ties else ("nest_delta",):
            found, wanted = (getattr(layer, learned)["default"].grad for layer in (other, one))
            torch.testing.assert_close(found, wanted, atol=1e-6 + 1e-4 * float(wanted.abs().max()), rtol=1e-4)


def test_a_merge_that_would_overflow_leaves_the_weight_as_it_was(tiny: Path) -> None:
    peft = tuned(tiny, torch.float16)
    before = {name: bits(layer.base_layer.weight) for name, layer in nest_layers(peft).items()}
    name, layer = next(iter(nest_layers(peft).items()))
    layer.nest_delta["default"].data.fill_(1e6)
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(bits(layer.base_layer.weight), before[name])


@pytest.fixture
def two(tiny: Path) -> PeftModel:
    """A second adapter on the first layer alone, sharing some rows with the first."""
    peft = tuned(tiny)
    neurons = {
        name: {"rows": [0, 4, 95], "cluster": [0, 1, 1]}
        for name in some_neurons(load(tiny))
        if name.startswith("model.layers.0")
    }
    peft.add_adapter("second", NestConfig(neurons=neurons))
    generator = torch.Generator().manual_seed(5)
    for layer in nest_layers(peft).values():
        if "second" in layer.nest_delta:
            layer.nest_delta["second"].data.copy_(torch.randn(2, 64, generator=generator) / 2)
    return peft.eval()


def test_two_adapters_do_not_disturb_each_other(two: PeftModel, tiny: Path) -> None:
    first = logits(tuned(tiny))
    assert torch.equal(logits(two), first)
    two.set_adapter("second")
    only = {name: layer for name, layer in nest_layers(two).items() if "second" in layer.nest_delta}
    assert len(only) == 2
    model = load(tiny)
    for name, layer in only.items():
        weight = model.get_parameter(f"{name}.weight").data
        for row, cluster in ((0, 0), (4, 1), (95, 1)):
            weight[row] += layer.nest_delta["second"].data[cluster]
    torch.testing.assert_close(logits(two), logits(model), atol=1e-5, rtol=1e-5)
    names = [name for name, parameter in two.named_parameters() if parameter.requires_grad]
    assert len(names) == 2
    assert all(name.endswith("nest_delta.second") for name in names)
    two.set_adapter("default")
    assert torch.equal(logits(two), first)


def test_two_merged_adapters_come_off_bit_for_bit(two: PeftModel, tiny: Path) -> None:
    two.base_model.merge_adapter(["default", "second"])
    base = load(tiny).state_dict()
    layers = nest_layers(two)
    assert not torch.equal(
        layers["model.layers.0.mlp.up_proj"].base_layer.weight, base["model.layers.0.mlp.up_proj.weight"]
    )
    two.unmerge_adapter()
    for name, layer in layers.items():
        assert torch.equal(layer.base_layer.weight, base[f"{name}.weight"])


def test_a_deleted_adapter_is_gone(two: PeftModel, tiny: Path) -> None:
    two.delete_adapter("second")
    assert torch.equal(logits(two), logits(tuned(tiny)))
    assert not any("second" in name for name, _ in two.named_parameters())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"rows": [1, 2], "cluster": [0]}, "2 rows and 1 clusters"),
        ({"rows": [], "cluster": []}, "0 rows and 0 clusters"),
        ({"rows": [3, 3], "cluster": [0, 0]}, "must be distinct and not negative"),
        ({"rows": [-1, 3], "cluster": [0, 0]}, "must be distinct and not negative"),
        ({"rows": [1, 2], "cluster": [0, 2]}, "numbered from 0 without a gap"),
        ({"rows": [1, 2], "cluster": [1, 1]}, "numbered from 0 without a gap"),
        ({"rows": [1, 2], "cluster": [-1, 0]}, "numbered from 0 without a gap"),
    ],
)
def test_bad_neurons_are_refused(chosen: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NestConfig(neurons={"model.layers.0.mlp.up_proj": chosen})


@pytest.mark.parametrize(
    ("module", "rows", "message"),
    [
        ("model.layers.0.mlp.up_proj", [96], "row `96` is out of range for a layer of 96 rows"),
        ("model.layers.9.mlp.up_proj", [0], "not found in the base model"),
        ("model.layers.0.input_layernorm", [0], "NEST moves rows of linear layers only"),
    ],
)
def test_neurons_that_do_not_fit_the_model_are_refused(module: str, rows: list[int], message: str, tiny: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(load(tiny), NestConfig(neurons={module: {"rows": rows, "cluster": [0]}}))


def test_a_config_is_built_from_selected_neurons() -> None:
    score = np.zeros(2)
    mean = np.zeros(2, dtype=np.float32)
    site = SiteNeurons(np.array([3, 9], np.int32), np.array([1, 0], np.int16), score, score, mean, mean)
    config = NestConfig.from_neurons({"a.up_proj": site}, task_type="CAUSAL_LM")
    assert config.neurons == {"a.up_proj": {"rows": [3, 9], "cluster": [1, 0]}}
    assert config.target_modules == ["a.up_proj"]


@both
def test_a_patch_holds_what_the_model_learned(folder: Path, learn_ties: bool) -> None:
    peft = tuned(folder, learn_ties=learn_ties)
    patch = NestPatch.from_model(peft, note="x")
    assert patch.manifest == {"note": "x"}
    for site in find_sites(load(folder)):
        change = patch.tensors[site.tensor]
        layer = nest_layers(peft)[site.module]
        assert [str(array.dtype) for array in (change.rows, change.cluster, change.delta)] == [
            "int32",
            "int16",
            "float32",
        ]
        assert np.array_equal(change.delta, layer.nest_delta["default"].detach().numpy())
        assert change.rows.tolist() == layer.nest_rows["default"].tolist()
        assert (change.tie is not None) == learn_ties
        if change.tie is not None:
            assert np.array_equal(change.tie, layer.nest_tie["default"].detach().numpy())
    assert patch.trainable_params == peft.get_nb_trainable_parameters()[0]


def as_lora(folder: Path, peft: PeftModel) -> PeftModel:
    """The same change as an ordinary LoRA: B one-hot and frozen, A the deltas, zero-padded to r = 8, alpha = r."""
    layers = nest_layers(peft)
    lora = get_peft_model(load(folder), LoraConfig(r=8, lora_alpha=8, target_modules=list(layers)))
    for name, layer in layers.items():
        module = lora.base_model.model.get_submodule(name)
        hot = torch.zeros_like(module.lora_B["default"].weight)
        hot[layer.nest_rows["default"], layer.nest_cluster["default"]] = 1
        module.lora_B["default"].weight.data.copy_(hot)
        module.lora_B["default"].weight.requires_grad_(False)
        module.lora_A["default"].weight.data.zero_()
        module.lora_A["default"].weight.data[:3] = layer.nest_delta["default"].data
    return lora.eval()


def test_it_is_a_lora_with_a_frozen_one_hot_b(folder: Path) -> None:
    peft = tuned(folder)
    lora = as_lora(folder, peft)
    torch.testing.assert_close(logits(lora), logits(peft), atol=1e-5, rtol=1e-5)
    for model in (peft, lora):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in nest_layers(peft).items():
        found = layer.nest_delta["default"].grad
        wanted = lora.base_model.model.get_submodule(name).lora_A["default"].weight.grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted[:3], atol=1e-6 + 1e-4 * scale, rtol=1e-4)
        assert not wanted[3:].any()  # the padding never moves


def test_the_sft_trainer_changes_nothing_but_deltas(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = load(tiny)
    rows: list[dict[str, Any]] = [
        {"prompt": f"break into house {n}", "completion": "I'm sorry, but I can't help with that"} for n in range(4)
    ]
    trainer = SFTTrainer(
        model=load(tiny),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=NestConfig(neurons=some_neurons(base), task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    peft = trainer.model
    layers = nest_layers(peft)
    assert len(layers) == 4
    for layer in layers.values():
        assert layer.nest_delta["default"].abs().max() > 0
    state = peft.unload().state_dict()
    for name, values in base.state_dict().items():
        assert torch.equal(bits(values), bits(state[name])), name


@both
def test_a_compiled_graph_gives_the_same_logits(tiny: Path, learn_ties: bool) -> None:
    peft = tuned(tiny, learn_ties=learn_ties)
    compiled = torch.compile(peft, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(peft), atol=1e-5, rtol=1e-5)
