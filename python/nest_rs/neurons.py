"""Probe scores -> the selected neurons of each site, grouped into clusters (paper sections 3.3 and 3.4)."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nest_rs.errors import NestError, listed
from nest_rs.files import replacing
from nest_rs.numeric import ActivationStore, KMeans, select_rows

log = logging.getLogger(__name__)

Clustering = Literal["silhouette", "strong", "weak"]

# The arrays of SiteNeurons, as they are stored and read back.
_ARRAYS = ("rows", "cluster", "coef", "z", "mean_harmful", "mean_benign")


@dataclass(frozen=True)
class SiteNeurons:
    """The selected neurons of one site.

    Attributes:
        rows: Row numbers of the projection, ascending, int32 [n].
        cluster: Cluster of each row, from 0, int16 [n].
        coef: Probe coefficient of each row, float64 [n].
        z: The coefficient standardised over the site's rows, float64 [n].
        mean_harmful, mean_benign: Mean pooled activation over each class of probing prompts, float32 [n].
    """

    rows: NDArray[np.int32]
    cluster: NDArray[np.int16]
    coef: NDArray[np.float64]
    z: NDArray[np.float64]
    mean_harmful: NDArray[np.float32]
    mean_benign: NDArray[np.float32]

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.cluster.max()) + 1


def select_and_cluster(
    store: ActivationStore,
    coefs: Mapping[str, NDArray[np.float64]],
    harmful: NDArray[np.bool_],
    *,
    z: float = 3.0,
    positive: bool = True,
    clustering: Clustering = "silhouette",
    k_max: int | None = 2,
    min_silhouette: float = 0.1,
    standardize: bool = False,
    n_init: int = 10,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, SiteNeurons]:
    """Select the rows whose coefficient stands out, and group those that fire alike.

    Args:
        store: Pooled activations, [prompts, d_out] a site.
        coefs: Probe coefficients, float64 [d_out] a site.
        harmful: The class of each prompt in the store.
        z: Rows above this many standard deviations are selected.
        positive: Ask for a positive coefficient as well.
        clustering: `silhouette` picks k by the highest mean silhouette; `strong` is one cluster a neuron; `weak` one a
            site (the paper's ablation).
        k_max: The largest k tried; None for as many as the rows allow.
        min_silhouette: Below it the site keeps one cluster.
        standardize: Cluster on activations standardised over prompts (paper 4.2) and not on raw ones (3.4).
        n_init: k-means restarts.
        seed: Seed of k-means.
        threads: Threads of the core; the result does not depend on it.

    Returns:
        The sites that have neurons, in the order of `coefs`.

    Raises:
        NestError: no site has any.
    """
    chosen: dict[str, SiteNeurons] = {}
    empty = []
    for site, coef in coefs.items():
        rows = select_rows(coef, z=z, positive=positive).astype(np.int32)
        if not len(rows):
            empty.append(site)
            continue
        points = store.columns(site, rows)
        if clustering == "strong":
            cluster = np.arange(len(rows), dtype=np.int16)
        elif clustering == "weak":
            cluster = np.zeros(len(rows), dtype=np.int16)
        else:
            shaped = store.columns(site, rows, standardize=True) if standardize else points
            cluster = _by_silhouette(shaped, k_max, min_silhouette, n_init, seed, threads)
        chosen[site] = described(rows, cluster, coef, points, harmful)
    if not chosen:
        raise NestError(f"no neuron of any site stands out at z = `{z}`", mend="lower --z")
    if empty:
        log.warning("%d sites have no selected neuron and stay as they are: %s", len(empty), listed(empty, 3))
    return chosen


def described(
    rows: NDArray[np.int32],
    cluster: NDArray[np.int16],
    coef: NDArray[np.float64],
    points: NDArray[np.float32],
    harmful: NDArray[np.bool_],
) -> SiteNeurons:
    """Rows of a site with what the probe and the activations say of them.

    Args:
        rows: [n], ascending.
        cluster: [n].
        coef: The probe's coefficient of each of the site's rows.
        points: Pooled activations of the chosen rows, [n, prompts].
        harmful: Which prompts are, [prompts].
    """
    scores = (coef[rows] - coef.mean()) / coef.std()
    means = [points[:, side].mean(axis=1, dtype=np.float64).astype(np.float32) for side in (harmful, ~harmful)]
    return SiteNeurons(rows, cluster, coef[rows], scores, *means)


def without_rows(neurons: Mapping[str, SiteNeurons], taken: Mapping[str, NDArray[np.int32]]) -> dict[str, SiteNeurons]:
    """The neurons that are not among each site's `taken` rows, their clusters numbered anew.

    Raises:
        NestError: none is left.
    """
    left = {}
    for site, chosen in neurons.items():
        free = ~np.isin(chosen.rows, taken.get(site, np.empty(0, np.int32)))
        if free.any():
            kept = {name: getattr(chosen, name)[free] for name in _ARRAYS}
            kept["cluster"] = np.unique(kept["cluster"], return_inverse=True)[1].astype(np.int16)
            left[site] = SiteNeurons(**kept)
    if not left:
        raise NestError("all selected neurons are moved by the first patch", mend="lower --z")
    return left


def _by_silhouette(
    points: NDArray[np.float32], k_max: int | None, floor: float, n_init: int, seed: int, threads: int | None
) -> NDArray[np.int16]:
    distinct = len(np.unique(points, axis=0))
    # A silhouette needs at least one cluster of two, so k stops one short of the points.
    largest = min(k_max or len(points), len(points) - 1, distinct)
    ks = list(range(2, largest + 1))
    one = np.zeros(len(points), dtype=np.int16)
    if not ks:
        return one
    fits = KMeans(2, random_state=seed, n_threads=threads).sweep(points, ks, n_init)
    best = max(fits, key=lambda fit: (fit.silhouette or 0.0, -fit.k))  # ties go to the smaller k
    return best.labels.astype(np.int16) if (best.silhouette or 0.0) >= floor else one


def save_neurons(neurons: Mapping[str, SiteNeurons], path: Path) -> None:
    """Write `path` (safetensors) and a readable table beside it (`.csv`)."""
    tensors = {f"{site}.{name}": getattr(chosen, name) for site, chosen in neurons.items() for name in _ARRAYS}
    with replacing(path) as scratch:
        # One key alone: safetensors writes a metadata map in no fixed order.
        save_file(tensors, scratch, metadata={"sites": json.dumps(list(neurons))})
    with replacing(path.with_suffix(".csv")) as scratch, scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["site", *_ARRAYS])
        for site, chosen in neurons.items():
            for values in zip(*(getattr(chosen, name).tolist() for name in _ARRAYS), strict=True):
                table.writerow([site, *values])


def load_neurons(path: Path) -> dict[str, SiteNeurons]:
    """Read what `save_neurons` wrote.

    Raises:
        NestError: there is none.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise NestError(f"no neurons at `{path}`", mend="run the cluster stage first")
    with safe_open(path, framework="numpy") as file:
        sites = json.loads(file.metadata()["sites"])
    tensors = load_file(path)
    return {site: SiteNeurons(*(tensors[f"{site}.{name}"] for name in _ARRAYS)) for site in sites}
