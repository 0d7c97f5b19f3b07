"""The core beside what one would use instead: one table, the same data and the same number of threads.

    python benches/core.py                       # every row, full size (about half an hour)
    python benches/core.py --rows lloyd,probe    # some rows
    python benches/core.py --scale 0.1           # a tenth of the rows of every matrix
    python benches/core.py --json figures.json   # the figures as well

A peer that takes longer than a minute is timed once, everything else three times, in turns; the table shows medians.
Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import faiss
import fastkmeans
import numpy as np
import superkmeans
import threadpoolctl
import torch
from sklearn import cluster, linear_model, metrics

from nest_rs import _core
from nest_rs.numeric import KMeans, LogisticProbe, pooled_stats, select_rows, silhouette_samples

SLOW = 60.0
# Choices made for other programs slow the peers' BLAS down.
NOT_OURS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclass
class Entry:
    """One contestant: what it does, and what its result is worth."""

    name: str
    run: Callable[[], Any]
    value: Callable[[Any], str] = lambda result: ""
    seconds: list[float] = field(default_factory=list)
    shown: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def race(entries: list[Entry], repeats: int) -> list[Entry]:
    """Times all in turns; ours is the first."""
    for _ in range(repeats):
        for entry in entries:
            if entry.seconds and entry.seconds[0] > SLOW:
                continue
            time.sleep(0.3)  # threads of the one before still spin for a while
            began = time.perf_counter()
            result = entry.run()
            entry.seconds.append(time.perf_counter() - began)
            if not entry.shown:
                entry.shown = entry.value(result)
            del result
    return entries


def blobs(n: int, d: int, k: int, spread: float, seed: int = 0) -> np.ndarray:
    """Gaussian clusters that overlap: labels still move after dozens of iterations."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, d), dtype=np.float32) * np.float32(spread)
    x = rng.standard_normal((n, d), dtype=np.float32)
    x += centers[rng.integers(k, size=n)]
    return x


def inertia(x: np.ndarray, centers: np.ndarray) -> float:
    """The sum of squared distances to the nearest centre, the same way for all."""
    labels = KMeans(len(centers), init=centers)
    labels.cluster_centers_ = np.ascontiguousarray(centers, dtype=np.float32)
    nearest = labels.predict(x)
    total = 0.0
    for start in range(0, len(x), 10_000):
        rows = slice(start, start + 10_000)
        gap = x[rows] - labels.cluster_centers_[nearest[rows]]
        total += float(np.einsum("ij,ij->", gap, gap, dtype=np.float64))
    return total


def lloyd_peers(x: np.ndarray, init: np.ndarray | None, k: int, iterations: int, threads: int) -> list[Entry]:
    """Contestants for k-means: from `init`, or each with its own best seeding."""
    n, d = x.shape

    start: Any = "k-means++" if init is None else init

    def ours() -> np.ndarray:
        return KMeans(k, init=start, max_iter=iterations, tol=0, n_threads=threads).fit(x).cluster_centers_

    def sklearn() -> np.ndarray:
        model = cluster.KMeans(k, init=start, n_init=1, max_iter=iterations, tol=0, random_state=0)
        return model.fit(x).cluster_centers_

    def with_faiss() -> np.ndarray:
        model = faiss.Kmeans(d, k, niter=iterations, max_points_per_centroid=n, seed=1)
        model.train(x, init_centroids=init)
        return model.centroids

    def with_superkmeans() -> np.ndarray:
        model = superkmeans.SuperKMeans(
            k,
            d,
            hierarchical=False,
            iters=iterations,
            sampling_fraction=1.0,
            max_points_per_cluster=n,
            n_threads=threads,
            early_termination=False,
        )
        return model.train(x)

    def with_fastkmeans() -> np.ndarray:
        model = fastkmeans.FastKMeans(d, k, niter=iterations, tol=0, gpu=False, use_triton=False)
        model.train(x)
        return model.centroids

    def worth(centers: np.ndarray) -> str:
        return f"inertia {inertia(x, centers):.8g}"

    own = " (own start)" if init is not None else ""
    return [
        Entry("nest-rs", ours, worth),
        Entry("scikit-learn", sklearn, worth),
        Entry("faiss", with_faiss, worth),
        Entry("SuperKMeans" + own, with_superkmeans, worth),
        Entry("fastkmeans" + own, with_fastkmeans, worth),
    ]


Row = Callable[[float, int, int], list[Entry]]


def scaled(n: int, scale: float, least: int = 64) -> int:
    return max(least, int(n * scale))


def from_rows(shape: tuple[int, int, int], spread: float, iterations: int, *run: Any) -> list[Entry]:
    """k-means on blobs of `shape` (n, d, k), started from k of the rows."""
    (n, d, k), (scale, threads, repeats) = shape, run
    x = blobs(scaled(n, scale, 10 * k), d, k, spread)
    init = x[np.random.default_rng(1).choice(len(x), k, replace=False)]
    return race(lloyd_peers(x, init, k, iterations, threads), repeats)


def lloyd(*run: Any) -> list[Entry]:
    """k-means, 100,000 x 1,000, k = 256, 25 iterations, same start"""
    return from_rows((100_000, 1000, 256), 0.08, 25, *run)


def lloyd_spread(*run: Any) -> list[Entry]:
    """the same with clusters three times as far apart"""
    return from_rows((100_000, 1000, 256), 0.25, 25, *run)


def lloyd_tall(*run: Any) -> list[Entry]:
    """k-means, 1,000,000 x 128, k = 1,000, 10 iterations, same start"""
    return from_rows((1_000_000, 128, 1000), 0.3, 10, *run)


def fit(scale: float, threads: int, repeats: int) -> list[Entry]:
    """k-means with seeding, 100,000 x 1,000, k = 256, 25 iterations"""
    x = blobs(scaled(100_000, scale, 2560), 1000, 256, 0.08)
    return race(lloyd_peers(x, None, 256, 25, threads), repeats)


def sklearn_sweep(x: np.ndarray, ks: range, n_init: int) -> list[tuple[float, float]]:
    out = []
    for k in ks:
        model = cluster.KMeans(k, n_init=n_init, random_state=0).fit(x)
        out.append((float(model.inertia_), float(metrics.silhouette_score(x, model.labels_))))
    return out


def sweep(scale: float, threads: int, repeats: int) -> list[Entry]:
    """sweep of 5,000 x 2,000, k = 2 to 64, 10 restarts, a silhouette for each"""
    x = blobs(scaled(5000, scale, 130), 2000, 24, 0.1)
    ks = range(2, 65)

    def ours() -> list[tuple[float, float]]:
        swept = KMeans(2, n_threads=threads).sweep(x, ks, n_init=10)
        return [(one.inertia, one.silhouette or 0.0) for one in swept]

    def worth(pairs: list[tuple[float, float]]) -> str:
        return f"mean inertia {np.mean([p[0] for p in pairs]):.7g}, best silhouette {max(p[1] for p in pairs):.4f}"

    return race(
        [Entry("nest-rs", ours, worth), Entry("scikit-learn", lambda: sklearn_sweep(x, ks, 10), worth)], repeats
    )


def sites(scale: float, threads: int, repeats: int) -> list[Entry]:
    """the method's own work: 64 sites of 50 x 15,000, k = 2 to 8, 10 restarts, silhouettes"""
    data = [blobs(50, 15_000, 4, 0.2, seed) for seed in range(scaled(64, scale, 2))]
    ks = range(2, 9)

    def ours() -> list[tuple[float, float]]:
        model = KMeans(2, n_threads=threads)
        return [(one.inertia, one.silhouette or 0.0) for x in data for one in model.sweep(x, ks, n_init=10)]

    def sklearn() -> list[tuple[float, float]]:
        return [pair for x in data for pair in sklearn_sweep(x, ks, 10)]

    def worth(pairs: list[tuple[float, float]]) -> str:
        return f"mean inertia {np.mean([p[0] for p in pairs]):.7g}"

    return race([Entry("nest-rs", ours, worth), Entry("scikit-learn", sklearn, worth)], repeats)


def silhouette(scale: float, threads: int, repeats: int) -> list[Entry]:
    """Euclidean silhouettes, 20,000 x 512, k = 32"""
    x = blobs(scaled(20_000, scale, 320), 512, 32, 0.3)
    labels = KMeans(32, max_iter=5).fit(x).labels_
    kept: list[np.ndarray] = []

    def worth(samples: np.ndarray) -> str:
        kept.append(samples)
        return f"mean {samples.mean():.8f}, farthest from ours {np.abs(samples - kept[0]).max():.1e}"

    wide = x.astype(np.float64)
    return race(
        [
            Entry("nest-rs", lambda: silhouette_samples(x, labels, n_threads=threads), worth),
            Entry("scikit-learn", lambda: metrics.silhouette_samples(x, labels), worth),
            Entry("scikit-learn in float64", lambda: metrics.silhouette_samples(wide, labels), worth),
        ],
        repeats,
    )


def activations(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Max-pooled activations: positive on average, correlated, some columns telling the classes apart."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = rng.standard_normal((n, 64), dtype=np.float32) @ rng.standard_normal((64, d), dtype=np.float32) * 0.1
    x += rng.standard_normal((n, d), dtype=np.float32) + 1.5 + 0.5 * rng.standard_normal(d, dtype=np.float32)
    x[:, : d // 200] += 0.4 * y[:, None]
    return x.astype(np.float16), y


def gap_to_optimum(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: float) -> tuple[float, float]:
    """The norm of the gradient in w (a bound on the distance to the optimum) and that in b."""
    gradient, bias = w.copy(), 0.0
    for start in range(0, len(x), 500):
        rows = x[start : start + 500].astype(np.float64)
        margins = rows @ w + b
        residual = 0.5 * (1 + np.tanh(0.5 * margins)) - y[start : start + 500]
        gradient += rows.T @ residual
        bias += residual.sum()
    return float(np.linalg.norm(gradient)), float(bias)


def probe(scale: float, threads: int, repeats: int) -> list[Entry]:
    """logistic probe, 4,000 x 14,336 f16, C = 1"""
    x, y = activations(scaled(4000, scale, 200), 14_336)
    exact: list[set[int]] = []

    def ours() -> tuple[np.ndarray, float]:
        model = LogisticProbe(n_threads=threads).fit(x, y)
        return model.coef_, model.intercept_

    def sklearn(dtype: type, tol: float) -> tuple[np.ndarray, float]:
        model = linear_model.LogisticRegression(C=1.0, tol=tol, max_iter=100_000)
        model.fit(x.astype(dtype), y)
        return model.coef_[0].astype(np.float64), float(model.intercept_[0])

    def adam() -> tuple[np.ndarray, float]:
        torch.manual_seed(0)
        data, target = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        layer = torch.nn.Linear(data.shape[1], 1)
        optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3, weight_decay=1e-3)
        for _ in range(5000):
            optimiser.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(layer(data)[:, 0], target)
            loss.backward()
            optimiser.step()
        return layer.weight[0].detach().double().numpy(), float(layer.bias)

    def worth(fitted: tuple[np.ndarray, float]) -> str:
        rows = set(select_rows(fitted[0]).tolist())
        exact.append(rows)
        gradient, _ = gap_to_optimum(x, y, *fitted)
        off = gradient / np.linalg.norm(fitted[0])
        return f"gradient {off:.0e} |w|, {len(rows)} rows, {len(rows ^ exact[0])} not as ours"

    return race(
        [
            Entry("nest-rs", ours, worth),
            Entry("scikit-learn lbfgs", lambda: sklearn(np.float32, 1e-4), worth),
            Entry("scikit-learn lbfgs, tol 1e-9", lambda: sklearn(np.float32, 1e-9), worth),
            Entry("the same in float64", lambda: sklearn(np.float64, 1e-9), worth),
            Entry("torch Adam, 5,000 epochs", adam, worth),
        ],
        repeats,
    )


def pool(scale: float, threads: int, repeats: int) -> list[Entry]:
    """masked max-pool and class statistics, 32 x 512 x 14,336 bf16"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(scaled(32, scale, 2), 512, 14_336, generator=generator, dtype=torch.float32).bfloat16()
    batch, tokens, d = x.shape
    lengths = torch.randint(tokens // 2, tokens + 1, (batch,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    y = np.arange(batch) % 2
    target = torch.empty_like(x)
    out_of = x.view(torch.int16).numpy().view(np.uint16)

    def with_torch() -> Any:
        pooled = x.masked_fill(~mask[..., None], -torch.inf).amax(1).float()
        return [(pooled[y == c].mean(0), pooled[y == c].var(0, correction=0)) for c in (0, 1)]

    def in_torch_prompt_by_prompt() -> Any:
        pooled = torch.stack([row[:length].amax(0) for row, length in zip(x, lengths, strict=True)]).float()
        return [(pooled[y == c].mean(0), pooled[y == c].var(0, correction=0)) for c in (0, 1)]

    def with_numpy() -> Any:
        import ml_dtypes

        values = out_of.view(ml_dtypes.bfloat16)
        pooled = np.stack([row[keep].max(0) for row, keep in zip(values, mask.numpy(), strict=True)]).astype(np.float32)
        return [(pooled[y == c].mean(0), pooled[y == c].var(0)) for c in (0, 1)]

    kept, size = int(mask.sum()) * d * 2, x.numel() * 2
    entries = race(
        [
            Entry("nest-rs", lambda: pooled_stats(x, mask, y, n_threads=threads)),
            Entry("torch", with_torch),
            Entry("torch, prompt by prompt", in_torch_prompt_by_prompt),
            Entry("numpy", with_numpy),
            Entry("plain copy (read and written)", lambda: target.copy_(x)),
        ],
        repeats,
    )
    for entry in entries:
        moved = 2 * size if entry.name.startswith("plain") else kept
        entry.shown = f"{moved / entry.median / 1e9:.1f} GB/s"
    return entries


def assign(scale: float, threads: int, repeats: int) -> list[Entry]:
    """the assignment step of the first row, beside torch's f32 product of the same shape"""
    n, d, k = scaled(100_000, scale, 2560), 1000, 256
    x = blobs(n, d, k, 0.08)
    centers = KMeans(k, init=x[:k], max_iter=2, n_threads=threads).fit(x).cluster_centers_
    left, right = torch.from_numpy(x), torch.from_numpy(centers).T.contiguous()
    out = torch.empty(n, k)

    def ours() -> np.ndarray:
        return _core.kmeans_predict(x, "f32", centers, metric="euclidean", n_threads=threads)

    entries = race(
        [Entry(f"nest-rs ({_core.isa()})", ours), Entry("torch f32 product", lambda: torch.mm(left, right, out=out))],
        repeats + 2,
    )
    for entry in entries:
        entry.shown = f"{2 * n * d * k / entry.median / 1e9:.0f} GF/s"
    return entries


ROWS: dict[str, Row] = {
    row.__name__.replace("_", "-"): row
    for row in (lloyd, lloyd_spread, lloyd_tall, fit, sweep, sites, silhouette, probe, pool, assign)
}


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """The same number of threads for every library."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    with threadpoolctl.threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def processor() -> str:
    """What the system calls it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated: " + ", ".join(ROWS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows of every matrix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    unknown = set(options.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"no row `{'`, `'.join(sorted(unknown))}`: there are {', '.join(ROWS)}")

    print(f"{processor()}, {_core.isa()}, {options.threads} threads, scale {options.scale:g}")
    figures = []
    with limited(options.threads):
        for name in options.rows.split(","):
            row = ROWS[name]
            print(f"\n{name}: {row.__doc__}", flush=True)
            entries = row(options.scale, options.threads, options.repeats)
            base = entries[0].median
            for entry in entries:
                print(f"  {entry.name:32} {entry.median:9.3f} s {entry.median / base:7.2f}x  {entry.shown}", flush=True)
                figures.append(
                    {
                        "row": name,
                        "name": entry.name,
                        "seconds": entry.seconds,
                        "times_ours": entry.median / base,
                        "result": entry.shown,
                    }
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"isa": _core.isa(), "threads": options.threads, "scale": options.scale, "rows": figures}, file)


if __name__ == "__main__":
    if any(name in os.environ for name in NOT_OURS):
        environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    main()
