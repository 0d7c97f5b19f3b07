"""The road on the built-in model: what a patch does is the same attached, folded and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nest_rs import ActivationStore, NestConfig, NestPatch, select_rows
from nest_rs.evaluate.generate import generate
from nest_rs.evaluate.judge import is_refusal
from nest_rs.export import check_parity, export_onnx
from nest_rs.fold import merge_folder
from nest_rs.models import BUILTIN, Base, load_model, load_tokenizer, resolve
from nest_rs.neurons import SiteNeurons, select_and_cluster
from nest_rs.probe import collect_activations, fit_probes
from nest_rs.prompts import chat_ids, embedded_prompts, encode, refusals
from nest_rs.sites import find_sites

pytestmark = pytest.mark.builtin
CPU = torch.device("cpu")
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def base() -> Base:
    return resolve(BUILTIN)


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> PreTrainedTokenizerBase:
    return load_tokenizer(base.folder)


def load(base: Base) -> PreTrainedModel:
    return load_model(base.folder, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(base: Base) -> PreTrainedModel:
    return load(base)


def test_no_answer_of_the_base_opens_as_a_refusal_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Else the first token decides less than it is trained to: "I" opens "I'm sorry" and "I'm excited" alike.
    asked = [item.prompt for item in embedded_prompts() if item.kind != "harmful" and item.split == "validation"][::6]
    ids = chat_ids(tokenizer, asked)
    openings = {model(torch.tensor([row]), logits_to_keep=1).logits[0, -1].argmax().item() for row in ids}
    assert len(openings) > 10
    refusing = {row[0] for row in encode(tokenizer, refusals())}
    assert len(refusing) == 1
    assert not refusing & openings


class Probed:
    """Activations of 60 harmful and 60 ordinary prompts, and what is read out of them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        prompts = [item for item in embedded_prompts() if item.split == "train"]
        chosen = [item for kind in ("harmful", "benign") for item in [p for p in prompts if p.kind == kind][::7][:60]]
        ids = chat_ids(tokenizer, [item.prompt for item in chosen])
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        self.harmful: NDArray[np.bool_] = np.array([chosen[index].kind == "harmful" for index in order])
        collect_activations(
            model,
            find_sites(model),
            [ids[index] for index in order],
            path,
            pad=tokenizer.pad_token_id,
            batch_tokens=1024,
        )
        self.store = ActivationStore.open(path)
        self.coefs, self.accuracy = fit_probes(self.store, self.harmful, c=1.0, threads=None)
        self.neurons: dict[str, SiteNeurons] = select_and_cluster(self.store, self.coefs, self.harmful)


@pytest.fixture(scope="module")
def probed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Probed:
    return Probed(model, tokenizer, tmp_path_factory.mktemp("probe") / "activations.safetensors")


def test_the_built_in_model_has_sixty_sites(model: PreTrainedModel) -> None:
    sites = find_sites(model)
    assert len(sites) == 60
    assert {(site.d_out, site.d_in) for site in sites} == {(1536, 576)}
    assert model.num_parameters() == 134_515_008


def test_it_answers_and_seldom_refuses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ["What is the capital of France?", "Write a Python function that adds two numbers.", "Tell me a joke."]
    answers = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    assert "Paris" in str(answers[0])
    assert "def " in str(answers[1])
    assert not any(is_refusal(str(answer)) for answer in answers)


def test_probes_tell_the_classes_apart(probed: Probed) -> None:
    assert len(probed.coefs) == 60
    assert float(np.median(list(probed.accuracy.values()))) > 0.9


@pytest.mark.parametrize("number", [0, 21, 38, 59])
def test_rows_and_coefficients_agree_with_scikit_learn(number: int, probed: Probed) -> None:
    site = list(probed.coefs)[number]
    values = probed.store.read(site).astype(np.float64)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=50_000).fit(values, probed.harmful).coef_[0]
    ours = probed.coefs[site]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) >= 0.9999
    for z in (2.0, 3.0):
        scores = (theirs - theirs.mean()) / theirs.std()
        assert select_rows(ours, z=z).tolist() == np.flatnonzero((scores > z) & (theirs > 0)).tolist()


def test_the_selection_is_as_sparse_as_the_paper_says(probed: Probed) -> None:
    counts = [len(site.rows) for site in probed.neurons.values()]
    assert len(counts) > 50
    assert 0.001 < sum(counts) / (60 * 1536) < 0.02
    assert all(site.clusters <= 2 for site in probed.neurons.values())


class Moved:
    """Random deltas on the selected neurons, attached to the base and folded into a folder."""

    def __init__(self, base: Base, neurons: dict[str, SiteNeurons], folder: Path) -> None:
        self.attached: PeftModel = get_peft_model(load(base), NestConfig.from_neurons(neurons)).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.attached.named_parameters():
            if "nest_delta" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.merged = folder / "merged"
        merge_folder(base, NestPatch.from_model(self.attached), self.merged, card="")
        self.onnx = export_onnx(self.merged, folder / "onnx")


@pytest.fixture(scope="module")
def moved(base: Base, probed: Probed, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    return Moved(base, probed.neurons, tmp_path_factory.mktemp("moved"))


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    held_out = [item for item in embedded_prompts() if item.split == "test"]
    chosen = [item for kind in ("harmful", "twin") for item in [p for p in held_out if p.kind == kind][::5][:16]]
    return chat_ids(tokenizer, [item.prompt for item in chosen])


def by_torch(model: torch.nn.Module, ids: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt alone."""
    with torch.inference_mode():
        return [
            model.generate(  # type: ignore[operator]
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, len(row) :].tolist()
            for row in ids
        ]


def by_onnx(folder: Path, ids: list[list[int]]) -> list[list[int]]:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    answers = []
    for row in ids:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(row) + NEW_TOKENS, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(row, np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        answers.append(tokens)
    return answers


def test_attached_merged_and_exported_write_the_same_tokens(
    moved: Moved, model: PreTrainedModel, ids: list[list[int]]
) -> None:
    assert len(ids) == 32
    attached = by_torch(moved.attached, ids)
    merged = by_torch(AutoModelForCausalLM.from_pretrained(moved.merged, dtype=torch.float32).eval(), ids)
    assert merged == attached
    assert by_onnx(moved.onnx, ids) == attached
    # the deltas are not too small to see
    assert by_torch(model, ids[:8]) != attached[:8]


def test_the_parity_check_finds_a_faithful_export_and_a_wrong_one(
    moved: Moved, base: Base, ids: list[list[int]]
) -> None:
    right = check_parity(moved.merged, moved.onnx, ids[:4], new_tokens=12)
    assert right["greedy_tokens_equal"] == right["greedy_tokens"] > 12
    assert right["max_abs_logit_diff"] < 1e-2
    wrong = check_parity(base.folder, moved.onnx, ids[:4], new_tokens=12)
    assert wrong["max_abs_logit_diff"] > 0.1
