"""The accelerator does what the processor does; without one there is nothing to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_prompts
from nest_rs.models import load_model
from nest_rs.neurons import load_neurons
from nest_rs.numeric import ActivationStore
from nest_rs.patch import NestPatch
from nest_rs.probe import collect_activations
from nest_rs.run import tune
from nest_rs.sites import find_sites

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason="torch sees no accelerator")

# Two of a kind, as to how sums are ordered alone.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def device_model(tiny: Path) -> PreTrainedModel:
    assert ACCELERATOR is not None
    return load_model(tiny, device=ACCELERATOR, dtype=torch.float32)


def test_the_probe_reads_the_same(tiny_model: PreTrainedModel, device_model: PreTrainedModel, tmp_path: Path) -> None:
    sites = find_sites(tiny_model)
    generator = torch.Generator().manual_seed(0)
    # Behind one opening, and of lengths that differ within a batch.
    ids = [[7, 8, 9, *torch.randint(10, 400, (4 + n % 9,), generator=generator).tolist()] for n in range(64)]
    stores = []
    for name, model in (("cpu", tiny_model), ("device", device_model)):
        collect_activations(model, sites, ids, tmp_path / name, pad=0, batch_tokens=200)
        stores.append(ActivationStore.open(tmp_path / name))
    for site in sites:
        found, wanted = (store.read(site.module) for store in stores)
        np.testing.assert_allclose(found, wanted, **CLOSE)


def test_a_run_finds_the_same_neurons_and_moves_them_alike(
    tiny: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    settings = {
        "prompts": write_prompts(tmp_path / "prompts.jsonl"),
        "dtype": "float32",
        "epochs": 2.0,
        "batch_size": 8,
        "newton_requests": 16,
        "export": False,
        "limit": 2,
    }
    runs = {name: tmp_path / name for name in ("cpu", str(ACCELERATOR))}
    for device, folder in runs.items():
        tune(str(tiny), device=device, out=folder, **settings)
    neurons, patches = (
        [read(folder / name) for folder in runs.values()]
        for read, name in ((load_neurons, "neurons.safetensors"), (NestPatch.load, "patch"))
    )
    for site, wanted in neurons[0].items():
        assert neurons[1][site].rows.tolist() == wanted.rows.tolist()
        assert neurons[1][site].cluster.tolist() == wanted.cluster.tolist()
    for name, change in patches[0].tensors.items():
        moved = np.asarray(change.delta, dtype=np.float64), np.asarray(patches[1].tensors[name].delta, dtype=np.float64)
        # Adam's first steps are signs, so that what differs in the last bit may differ in a whole step.
        assert np.linalg.norm(moved[1] - moved[0]) < 0.2 * np.linalg.norm(moved[0])
