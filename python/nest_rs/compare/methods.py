"""The methods of a comparison, each from the bench's base and data to a tuned model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nest_rs.compare.bench import Bench, Tuned
from nest_rs.compare.circuit_breaker import break_circuits
from nest_rs.compare.meter import Cost, metered
from nest_rs.files import read_json, write_json
from nest_rs.neurons import SiteNeurons, described, load_neurons, save_neurons
from nest_rs.numeric import ActivationStore
from nest_rs.probe import load_probes
from nest_rs.run import Run
from nest_rs.sites import find_sites

Rows = NDArray[np.int32]
Labels = NDArray[np.int16]

# The learning rates that each baseline may choose from, by its attack success and over-refusal on validation prompts.
GRIDS: dict[str, tuple[float, ...]] = {
    "lora": (3e-4, 1e-3, 3e-3),
    "lora-r1": (1e-3, 3e-3, 1e-2),
    "full": (1e-5, 3e-5, 1e-4),
    "circuit-breaker": (1e-4, 3e-4, 1e-3),
}


def base(bench: Bench) -> Tuned:
    """The model as it came."""
    return Tuned(bench.base)


def nest(bench: Bench) -> Tuned:
    """The run itself: probe, cluster, train, merge."""
    make_nest(bench)
    return _made(bench, bench.run)


def random_rows(bench: Bench) -> Tuned:
    """Control: as many other rows of each site, drawn from those not selected, in clusters of the same sizes."""

    def draw(site: SiteNeurons, d_out: int, rng: np.random.Generator) -> tuple[Rows, Labels]:
        rows = np.arange(d_out, dtype=np.int32)
        others = np.setdiff1d(rows, site.rows)
        pool = others if len(others) >= len(site.rows) else rows
        return np.sort(rng.choice(pool, len(site.rows), replace=False)), site.cluster

    return _control(bench, "random-rows", draw)


def random_clusters(bench: Bench) -> Tuned:
    """Control: the selected rows in clusters of the same sizes, members drawn at random."""

    def draw(site: SiteNeurons, d_out: int, rng: np.random.Generator) -> tuple[Rows, Labels]:
        return site.rows, rng.permutation(site.cluster)

    return _control(bench, "random-clusters", draw)


def lora(bench: Bench, rank: int, rate: float, share: float = 1.0) -> Tuned:
    """LoRA on the sites that NeST looks at, by the same losses on the same steps; lora_alpha = 2 r, no dropout."""
    from peft import LoraConfig, get_peft_model

    config, model = bench.config, bench.copy()
    data = bench.baseline_data.shortened(share)
    sites = [site.module for site in find_sites(model, config.projections, config.depth)]
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as scratch, metered(model.device) as cost:
        adapted = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sites, task_type="CAUSAL_LM")
        )
        trained, _ = adapted.get_nb_trainable_parameters()
        bench.run.fit(adapted, data, Path(scratch), learning_rate=rate, save=False)
    return Tuned(bench.finished(adapted.merge_and_unload()), trained, cost)


def full(bench: Bench, rate: float, share: float = 1.0) -> Tuned:
    """Full fine-tuning by the same losses on the same steps; weights in float32, whatever the compute dtype."""
    config = bench.config
    data = bench.baseline_data.shortened(share)
    # In bfloat16 most steps of such rates would be lost to rounding.
    model = bench.copy(float32=True).requires_grad_(True)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as scratch, metered(model.device) as cost:
        bench.run.fit(model, data, Path(scratch), learning_rate=rate, save=False, reference=bench.base)
    # The Trainer leaves its autocast around the model's forward pass; the weights go into a model without it.
    bare = bench.copy()
    bare.load_state_dict(model.state_dict())
    return Tuned(bare, model.num_parameters(), cost)


METHODS: dict[str, Callable[[Bench], Tuned]] = {
    "base": base,
    "nest": nest,
    "random-rows": random_rows,
    "random-clusters": random_clusters,
}
# These have a learning rate of their own.
BASELINES: dict[str, Callable[[Bench, float, float], Tuned]] = {
    "lora": lambda bench, rate, share: lora(bench, 8, rate, share),
    "lora-r1": lambda bench, rate, share: lora(bench, 1, rate, share),
    "full": full,
    "circuit-breaker": break_circuits,
}


def make_nest(bench: Bench) -> None:
    """Let the bench's run work up to its merged model, unless it has."""
    _stages(bench.run, ("probe", "cluster", "train", "merge"), bench)


def _control(
    bench: Bench, name: str, draw: Callable[[SiteNeurons, int, np.random.Generator], tuple[Rows, Labels]]
) -> Tuned:
    _stages(bench.run, ("probe", "cluster"), bench)
    run = bench.run.beside(bench.folder / name)
    run.folder.mkdir(exist_ok=True)
    probe = bench.run.folder / "probe"
    store = ActivationStore.open(probe / "activations.safetensors")
    coefs = load_probes(probe / "probes.safetensors", list(store.sites))
    harmful = np.array([kind == "harmful" for _, kind in read_json(probe / "prompts.json")])
    rng = np.random.default_rng(bench.config.seed)
    neurons = {}
    for site, chosen in load_neurons(bench.run.folder / "neurons.safetensors").items():
        rows, cluster = draw(chosen, len(coefs[site]), rng)
        neurons[site] = described(rows, cluster, coefs[site], store.columns(site, rows), harmful)
    save_neurons(neurons, run.folder / "neurons.safetensors")
    _stages(run, ("train", "merge"), bench)
    return _made(bench, run)


def _stages(run: Run, names: tuple[str, ...], bench: Bench) -> None:
    for name in names:
        if run.finished(name):
            continue
        if name == "train":
            run.__dict__["training_data"] = bench.run.training_data  # made before the clock starts
        with metered(run.model.device) as cost:
            run.stage(name)
        costs = run.folder / "cost.json"
        write_json(costs, {**(read_json(costs) if costs.is_file() else {}), name: vars(cost)})


def _made(bench: Bench, run: Run) -> Tuned:
    costs = [Cost(**cost) for cost in read_json(run.folder / "cost.json").values()]
    cost = Cost(round(sum(item.seconds for item in costs), 2), max(item.peak_mb for item in costs))
    return Tuned(bench.copy(folder=run.folder / "merged"), run.summary()["trainable_params"], cost)
