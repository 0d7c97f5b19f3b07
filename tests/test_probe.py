"""Reading neurons, scoring them, and grouping them: against plain torch and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, silhouette_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import write_tiny_model
from nest_rs import ActivationStore, NestError
from nest_rs.models import load_model
from nest_rs.neurons import SiteNeurons, load_neurons, save_neurons, select_and_cluster
from nest_rs.probe import collect_activations, fit_probes, load_probes, masked_max, max_pool, save_probes
from nest_rs.prompts import chat_ids
from nest_rs.sites import find_sites

CPU = torch.device("cpu")
PROMPTS = ["Hi", "bake bread", "how do I bake a loaf?", "help " * 30, "I can't", "why, and how, and when, and who?"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_max_pool_equals_a_masked_maximum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 19, 33, generator=generator).to(dtype)
    mask = torch.rand(7, 19, generator=generator) < 0.5
    mask[:, 3] = True
    pooled = max_pool(values, mask)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, values.masked_fill(~mask[..., None], float("-inf")).amax(dim=1))


@pytest.mark.parametrize("whole", [0, 3, 7])
def test_what_an_accelerator_pools_is_what_the_core_pools(whole: int) -> None:
    values = torch.randn(5, 7, 33)
    lengths = torch.randint(max(1, whole), 8, (5, 1))
    mask = torch.arange(7) < lengths
    assert torch.equal(masked_max(values, mask, whole), max_pool(values, mask))


def test_max_pool_reads_a_tensor_that_is_not_contiguous() -> None:
    values = torch.randn(5, 4, 6).transpose(0, 1)
    mask = torch.ones(4, 5, dtype=torch.bool)
    assert torch.equal(max_pool(values, mask), values.amax(dim=1))


def pooled_one_by_one(model: PreTrainedModel, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Each prompt alone, without padding."""
    seen: dict[str, list[torch.Tensor]] = {site.module: [] for site in find_sites(model)}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _m, _i, out, rows=rows: rows.append(out[0].amax(dim=0)))
        for name, rows in seen.items()
    ]
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in seen.items()}


def collected(
    model: PreTrainedModel, ids: list[list[int]], path: Path, *, pad: int = 0, batch_tokens: int = 4096
) -> dict[str, torch.Tensor]:
    collect_activations(model, find_sites(model), ids, path, pad=pad, batch_tokens=batch_tokens)
    store = ActivationStore.open(path)
    assert store.n_rows == len(ids)
    return {site: torch.from_numpy(np.array(store.read(site))) for site in store.sites}


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return sorted(chat_ids(tokenizer, PROMPTS), key=len)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_the_store_holds_the_maxima_of_each_prompt_alone(
    family: str, batch_tokens: int, tmp_path: Path, ids: list[list[int]]
) -> None:
    model = load_model(write_tiny_model(tmp_path / family, family), device=CPU, dtype=torch.float32)
    found = collected(model, ids, tmp_path / "store", batch_tokens=batch_tokens)
    wanted = pooled_one_by_one(model, ids)
    assert list(found) == list(wanted)
    for site, values in wanted.items():
        torch.testing.assert_close(found[site], values, atol=1e-5, rtol=1e-5)


def test_prompts_without_a_common_opening_are_read_as_well(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [[5, 6, 7], [8, 6, 7, 9], [9] * 11]
    found = collected(tiny_model, rows, tmp_path / "store")
    for site, values in pooled_one_by_one(tiny_model, rows).items():
        torch.testing.assert_close(found[site], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[[5, 6, 7]], [[5, 6, 7], [5, 6, 7]], [[5], [5, 6, 7]]])
def test_prompts_that_are_each_others_opening_are_read_as_well(
    rows: list[list[int]], tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    found = collected(tiny_model, rows, tmp_path / "store")
    for site, values in pooled_one_by_one(tiny_model, rows).items():
        torch.testing.assert_close(found[site], values, atol=1e-5, rtol=1e-5)


def test_the_padding_token_does_not_matter(tiny_model: PreTrainedModel, ids: list[list[int]], tmp_path: Path) -> None:
    found = [collected(tiny_model, ids, tmp_path / f"store-{pad}", pad=pad) for pad in (0, 77)]
    for site in found[0]:
        assert torch.equal(found[0][site], found[1][site])


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_half_precision_activations_are_stored_as_they_are(
    dtype: torch.dtype, name: str, tiny: Path, ids: list[list[int]], tmp_path: Path
) -> None:
    model = load_model(tiny, device=CPU, dtype=dtype)
    found = collected(model, ids, tmp_path / "store")
    assert ActivationStore.open(tmp_path / "store").dtype == name
    for site, values in pooled_one_by_one(model, ids).items():
        assert torch.equal(found[site].to(dtype).float(), found[site])
        torch.testing.assert_close(found[site], values.float(), atol=0.1, rtol=0.1)


def test_hooks_are_gone_afterwards(tiny_model: PreTrainedModel, ids: list[list[int]], tmp_path: Path) -> None:
    collected(tiny_model, ids, tmp_path / "store")
    modules = dict(tiny_model.named_modules())
    assert [site.module for site in find_sites(tiny_model) if modules[site.module]._forward_hooks] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site_and_leave_no_store(
    value: float, tiny: Path, ids: list[list[int]], tmp_path: Path
) -> None:
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    model.model.layers[1].mlp.gate_proj.weight.data[3, 5] = value
    (tmp_path / "out").mkdir()
    with pytest.raises(NestError, match=r"`model\.layers\.1\.mlp\.gate_proj`"):
        collected(model, ids, tmp_path / "out" / "store")
    assert not (tmp_path / "out" / "store").exists()
    assert not model.model.layers[1].mlp.gate_proj._forward_hooks


class StoppedError(Exception):
    pass


def counting(model: PreTrainedModel, module: str, stop_at: int | None = None) -> list[int]:
    """The rows of each batch that a module sees; the call with the number `stop_at` does not return."""
    calls: list[int] = []

    def count(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.append(len(inputs[0]))
        if len(calls) == stop_at:
            raise StoppedError

    model.get_submodule(module).register_forward_pre_hook(count)
    return calls


def test_no_more_of_the_model_runs_than_the_sites_need(tiny: Path, ids: list[list[int]], tmp_path: Path) -> None:
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    wanted = collected(model, ids, tmp_path / "all")
    sites = find_sites(model, depth=(0.0, 0.5))
    below = counting(model, "model.layers.0.mlp.up_proj")
    above = [counting(model, name) for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp", "lm_head")]
    collect_activations(model, sites, ids, tmp_path / "store", pad=0, batch_tokens=60)
    assert len(below) > 2
    assert above == [[1], [1], [1]]  # the opening that all prompts share, whose keys and values are wanted in full
    store = ActivationStore.open(tmp_path / "store")
    for site in sites:
        found = torch.from_numpy(store.read(site.module))
        torch.testing.assert_close(found, wanted[site.module], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [None, "base", "prompts"])
def test_an_interrupted_probe_goes_on_where_it_stopped(
    change: str | None, tiny: Path, ids: list[list[int]], tmp_path: Path
) -> None:
    path, whole = tmp_path / "store", tmp_path / "whole"
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    all_calls = counting(model, "model.layers.1.mlp.up_proj")
    collect_activations(model, find_sites(model), ids, whole, pad=0, batch_tokens=60, base="a")

    model = load_model(tiny, device=CPU, dtype=torch.float32)
    counting(model, "model.layers.1.mlp.up_proj", stop_at=4)
    with pytest.raises(StoppedError):
        collect_activations(model, find_sites(model), ids, path, pad=0, batch_tokens=60, base="a")
    assert not path.exists()

    model = load_model(tiny, device=CPU, dtype=torch.float32)
    calls = counting(model, "model.layers.1.mlp.up_proj")
    base = "b" if change == "base" else "a"
    again = ids[::-1] if change == "prompts" else ids
    collect_activations(model, find_sites(model), again, path, pad=0, batch_tokens=60, base=base)
    # The opening, then two batches, were run before the fourth call; both were written.
    assert calls == ([1, *all_calls[3:]] if change is None else calls)
    assert (len(calls) < len(all_calls)) == (change is None)
    if change is None:
        assert path.read_bytes() == whole.read_bytes()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["store", "whole"]


def test_a_batch_too_large_for_the_memory_is_halved(
    tiny: Path, ids: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny, device=CPU, dtype=torch.float32)
    wanted = collected(model, ids, tmp_path / "whole")

    most = 2

    def run_out(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    model.model.layers[1].register_forward_pre_hook(run_out)
    with caplog.at_level("WARNING", logger="nest_rs"):
        found = collected(model, ids, tmp_path / "store")
    for site, values in wanted.items():
        torch.testing.assert_close(found[site], values, atol=1e-5, rtol=1e-5)
    assert "out of memory: going on with 2048 tokens a batch" in caplog.messages
    most = 0
    with pytest.raises(NestError, match="out of memory"):
        collected(model, [[5, 6], [7, 8]], tmp_path / "none")  # no opening, so the batch comes first


# A store with known neurons: 60 prompts, and a site a kind of difficulty.
N, WIDTH, BLIND = 60, 400, "blind"


@pytest.fixture(scope="module")
def harmful() -> NDArray[np.bool_]:
    return np.arange(N) % 2 == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, harmful: NDArray[np.bool_]) -> ActivationStore:
    rng = np.random.default_rng(7)
    sites = {}
    for name in ("noise", "two", "scaled", BLIND):
        sites[name] = rng.normal(size=(N, WIDTH)).astype(np.float32)
    sites["noise"][:, 5:12] += 1.5 * harmful[:, None]
    pattern = rng.normal(size=(2, N)).astype(np.float32) * 2
    for number, row in enumerate([3, 50, 77, 120, 300, 301]):
        sites["two"][:, row] = 2.0 * harmful + pattern[number % 2] + rng.normal(size=N) * 0.1
    sites["scaled"] *= np.linspace(0.5, 3.0, WIDTH, dtype=np.float32)
    sites["scaled"][:, 300:306] += 5 * harmful[:, None]
    path = tmp_path_factory.mktemp("store") / "activations.safetensors"
    with ActivationStore.create(path, dict.fromkeys(sites, WIDTH), N, dtype="f32") as writer:
        for name, values in sites.items():
            writer.write(name, 0, values)
    return ActivationStore.open(path)


@pytest.fixture(scope="module")
def coefs(store: ActivationStore, harmful: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    found = fit_probes(store, harmful, c=1.0, threads=None)[0]
    # no row of a flat site can stand out
    return {**found, BLIND: np.tile([-1.0, 1.0], WIDTH // 2)}


SITES = ("noise", "two", "scaled")


@pytest.fixture(scope="module")
def oracle(store: ActivationStore, harmful: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    return {
        site: LogisticRegression(C=1.0, tol=1e-12, max_iter=200_000)
        .fit(store.read(site).astype(np.float64), harmful)
        .coef_[0]
        for site in SITES
    }


@pytest.mark.parametrize("site", SITES)
def test_coefficients_equal_those_of_scikit_learn(
    site: str, coefs: dict[str, NDArray[np.float64]], oracle: dict[str, NDArray[np.float64]]
) -> None:
    ours, theirs = coefs[site], oracle[site]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) >= 0.9999
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_accuracies_are_those_of_the_probes(store: ActivationStore, harmful: NDArray[np.bool_]) -> None:
    accuracy = fit_probes(store, harmful, c=1e-6, threads=None)[1]
    for site in SITES:
        values = store.read(site).astype(np.float64)
        model = LogisticRegression(C=1e-6, tol=1e-12, max_iter=200_000).fit(values, harmful)
        assert accuracy[site] == pytest.approx(model.score(values, harmful))
    assert min(accuracy.values()) < 1


@pytest.mark.parametrize("z", [2.0, 3.0])
@pytest.mark.parametrize("positive", [True, False])
def test_rows_equal_those_of_scikit_learn(
    z: float,
    positive: bool,
    store: ActivationStore,
    harmful: NDArray[np.bool_],
    coefs: dict[str, NDArray[np.float64]],
    oracle: dict[str, NDArray[np.float64]],
) -> None:
    chosen = select_and_cluster(store, {site: coefs[site] for site in SITES}, harmful, z=z, positive=positive)
    for site, theirs in oracle.items():
        scores = (theirs - theirs.mean()) / theirs.std()
        rows = np.flatnonzero((scores > z) & ((theirs > 0) | (not positive)))
        assert len(rows)
        assert chosen[site].rows.tolist() == rows.tolist()
        np.testing.assert_allclose(chosen[site].z, scores[rows], rtol=1e-3)
        np.testing.assert_allclose(chosen[site].coef, theirs[rows], rtol=1e-2)
        values = store.read(site)[:, rows]
        np.testing.assert_allclose(chosen[site].mean_harmful, values[harmful].mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(chosen[site].mean_benign, values[~harmful].mean(axis=0), rtol=1e-5, atol=1e-6)


def silhouette_choice(points: NDArray[np.float32], k_max: int | None, floor: float = 0.1) -> NDArray[np.int_]:
    """The paper's rule with scikit-learn: the best mean silhouette, ties to the smaller k, one cluster below 0.1."""
    best, labels = floor, np.zeros(len(points), dtype=int)
    for k in range(2, min(k_max or len(points), len(points) - 1) + 1):
        found = KMeans(k, n_init=30, random_state=0, tol=0).fit(points)
        score = silhouette_score(points, found.labels_)
        if score > best or (score == best and not labels.any()):
            best, labels = score, found.labels_
    return labels


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("k_max", [2, 4, None])
def test_clusters_equal_the_choice_of_scikit_learn(
    k_max: int | None,
    standardize: bool,
    store: ActivationStore,
    harmful: NDArray[np.bool_],
    coefs: dict[str, NDArray[np.float64]],
) -> None:
    chosen = select_and_cluster(
        store, {site: coefs[site] for site in SITES}, harmful, z=2.0, k_max=k_max, standardize=standardize, n_init=100
    )
    counts = {}
    for site, found in chosen.items():
        points = store.read(site)[:, found.rows].T.astype(np.float64)
        if standardize:
            points = (points - points.mean(axis=1, keepdims=True)) / points.std(axis=1, keepdims=True)
        wanted = silhouette_choice(points, k_max)
        assert adjusted_rand_score(wanted, found.cluster) == 1.0, site
        assert sorted(set(found.cluster.tolist())) == list(range(found.clusters))
        counts[site] = found.clusters
    assert counts["two"] >= 2


def test_the_floor_of_the_silhouette_keeps_one_cluster(
    store: ActivationStore, harmful: NDArray[np.bool_], coefs: dict[str, NDArray[np.float64]]
) -> None:
    def clusters(floor: float) -> int:
        return select_and_cluster(store, {"two": coefs["two"]}, harmful, z=2.0, min_silhouette=floor)["two"].clusters

    assert (clusters(0.1), clusters(0.999)) == (2, 1)


def test_strong_is_a_cluster_a_neuron_and_weak_one_a_site(
    store: ActivationStore, harmful: NDArray[np.bool_], coefs: dict[str, NDArray[np.float64]]
) -> None:
    one = {"two": coefs["two"]}
    strong = select_and_cluster(store, one, harmful, z=2.0, clustering="strong")["two"]
    weak = select_and_cluster(store, one, harmful, z=2.0, clustering="weak")["two"]
    assert strong.rows.tolist() == weak.rows.tolist()
    assert strong.cluster.tolist() == list(range(len(strong.rows)))
    assert weak.cluster.tolist() == [0] * len(weak.rows)
    assert (strong.clusters, weak.clusters) == (len(strong.rows), 1)


def test_a_site_without_neurons_is_left_out_with_one_warning(
    store: ActivationStore,
    harmful: NDArray[np.bool_],
    coefs: dict[str, NDArray[np.float64]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("WARNING", logger="nest_rs"):
        chosen = select_and_cluster(store, coefs, harmful, z=2.0)
    assert set(chosen) == set(SITES)
    assert [record.getMessage() for record in caplog.records] == [
        "1 sites have no selected neuron and stay as they are: `blind`"
    ]


def test_no_neuron_at_all_is_an_error(
    store: ActivationStore, harmful: NDArray[np.bool_], coefs: dict[str, NDArray[np.float64]]
) -> None:
    with pytest.raises(NestError, match=r"no neuron of any site stands out at z = `90.0`; lower --z"):
        select_and_cluster(store, coefs, harmful, z=90.0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("k_max", [2, None])
def test_one_or_two_rows_are_one_cluster(
    count: int, k_max: int | None, store: ActivationStore, harmful: NDArray[np.bool_]
) -> None:
    coef = np.zeros(WIDTH)
    coef[10 : 10 + count] = 1.0
    chosen = select_and_cluster(store, {"two": coef}, harmful, k_max=k_max)["two"]
    assert chosen.rows.tolist() == list(range(10, 10 + count))
    assert chosen.cluster.tolist() == [0] * count


def test_neurons_that_fire_the_same_are_one_cluster(tmp_path: Path, harmful: NDArray[np.bool_]) -> None:
    values = np.tile(np.arange(N, dtype=np.float32)[:, None], (1, WIDTH))
    with ActivationStore.create(tmp_path / "store", {"same": WIDTH}, N, dtype="f32") as writer:
        writer.write("same", 0, values)
    coef = np.zeros(WIDTH)
    coef[:5] = 1.0
    for standardize in (False, True):
        chosen = select_and_cluster(
            ActivationStore.open(tmp_path / "store"), {"same": coef}, harmful, k_max=None, standardize=standardize
        )
        assert chosen["same"].cluster.tolist() == [0] * 5


def test_the_same_neurons_at_any_number_of_threads(
    store: ActivationStore, harmful: NDArray[np.bool_], coefs: dict[str, NDArray[np.float64]]
) -> None:
    for threads in (1, 2):
        again, _ = fit_probes(store, harmful, c=1.0, threads=threads)
        assert all(np.array_equal(again[site], coefs[site]) for site in SITES)
    one, two = (
        select_and_cluster(store, coefs, harmful, z=2.0, k_max=None, seed=3, threads=threads) for threads in (1, 2)
    )
    assert {site: found.cluster.tolist() for site, found in one.items()} == {
        site: found.cluster.tolist() for site, found in two.items()
    }


def test_one_class_only_is_an_error(store: ActivationStore) -> None:
    with pytest.raises(NestError, match="`1` classes"):
        fit_probes(store, np.ones(N, dtype=bool), c=1.0, threads=None)


def test_probes_are_read_back_in_the_order_asked_for(coefs: dict[str, NDArray[np.float64]], tmp_path: Path) -> None:
    save_probes(coefs, tmp_path / "probes.safetensors")
    again = load_probes(tmp_path / "probes.safetensors", ["two", "noise"])
    assert list(again) == ["two", "noise"]
    assert all(np.array_equal(again[site], coefs[site]) for site in again)
    with pytest.raises(NestError, match="no probes at"):
        load_probes(tmp_path / "none", ["two"])


@pytest.fixture(scope="module")
def neurons(
    store: ActivationStore, harmful: NDArray[np.bool_], coefs: dict[str, NDArray[np.float64]]
) -> dict[str, SiteNeurons]:
    return select_and_cluster(store, {site: coefs[site] for site in SITES}, harmful, z=2.0)


def test_neurons_are_read_back_as_they_were(neurons: dict[str, SiteNeurons], tmp_path: Path) -> None:
    save_neurons(neurons, tmp_path / "neurons.safetensors")
    again = load_neurons(tmp_path / "neurons.safetensors")
    assert list(again) == list(neurons)
    for site, chosen in neurons.items():
        for name in ("rows", "cluster", "coef", "z", "mean_harmful", "mean_benign"):
            ours, theirs = getattr(chosen, name), getattr(again[site], name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
    table = (tmp_path / "neurons.csv").read_text().splitlines()
    assert table[0] == "site,rows,cluster,coef,z,mean_harmful,mean_benign"
    assert len(table) == 1 + sum(len(chosen.rows) for chosen in neurons.values())
    assert table[1].startswith(f"noise,{neurons['noise'].rows[0]},{neurons['noise'].cluster[0]},")


def test_the_same_neurons_are_the_same_bytes(neurons: dict[str, SiteNeurons], tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_neurons(neurons, tmp_path / f"{name}.safetensors")
    for suffix in (".safetensors", ".csv"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_run_without_neurons_says_which_stage_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NestError, match="run the cluster stage first"):
        load_neurons(tmp_path / "neurons.safetensors")
