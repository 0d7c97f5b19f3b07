"""Threads, instruction sets, forks, signals and the GIL."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nest_rs import _core
from nest_rs.numeric import KMeans, LogisticProbe, pooled_stats, silhouette_samples

# Prints a hash of the bits of every kind of result.
SCRIPT = """
import hashlib, json, sys
import numpy as np
from nest_rs import _core
from nest_rs.numeric import KMeans, LogisticProbe, pooled_stats, silhouette_samples

rng = np.random.default_rng(0)
x = (rng.normal(size=(1500, 300)) + rng.integers(4, size=(1500, 1))).astype(np.float32)
x[:, 5] += 100
y = np.arange(1500) % 2
out = {}
for n_threads in json.loads(sys.argv[1]):
    parts = []
    for data in (x, x.astype(np.float16)):
        for metric in ("euclidean", "cosine"):
            fit = KMeans(9, metric=metric, n_init=2, n_threads=n_threads).fit(data)
            parts += [fit.labels_, fit.cluster_centers_, np.float64(fit.inertia_)]
            parts.append(fit.predict(data[::-1]))
    for metric in ("euclidean", "sqeuclidean", "cosine"):
        parts.append(silhouette_samples(x, fit.labels_, metric, n_threads=n_threads))
    for s in KMeans(2, n_threads=n_threads).sweep(x[:60], [2, 3, 4], n_init=3):
        parts += [s.labels, s.cluster_centers, np.float64(s.inertia), np.float64(s.silhouette)]
    probe = LogisticProbe(n_threads=n_threads).fit(x, y)
    parts += [probe.coef_, np.float64(probe.intercept_)]
    stats = pooled_stats(x.reshape(300, 5, 300), np.ones((300, 5)), y[:300], n_threads=n_threads)
    parts += [stats.pooled, stats.mean, stats.var]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts))
    out[str(n_threads)] = digest.hexdigest()
print(json.dumps([_core.isa(), out]))
"""


def bits(threads, isa=None):
    env = {k: v for k, v in os.environ.items() if k != "NEST_RS_ISA"}
    if isa:
        env["NEST_RS_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(threads)],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return json.loads(done.stdout)


def test_bits_do_not_depend_on_threads_or_instruction_set():
    best, by_threads = bits([1, 2, 8])
    assert len(set(by_threads.values())) == 1
    ladder = {
        "amx": ["avx512bf16", "avx512", "avx2", "portable"],
        "avx512bf16": ["avx512", "avx2", "portable"],
        "avx512": ["avx2", "portable"],
        "avx2": ["portable"],
        "neon": ["portable"],
    }
    for isa in ladder.get(best, []):
        used, digests = bits([2], isa)
        assert used == isa
        assert digests["2"] == by_threads["2"], isa


def test_an_unknown_instruction_set_is_an_error():
    code = "import numpy as np; from nest_rs.numeric import KMeans; KMeans(1).fit(np.zeros((2, 2)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NEST_RS_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ValueError: NEST_RS_ISA is `mmx`: this processor has" in done.stderr


def work(seed=0):
    x = np.random.default_rng(seed).normal(size=(3000, 64)).astype(np.float32)
    return KMeans(20, max_iter=20, n_threads=2).fit(x).inertia_


def child(queue):
    queue.put(work())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_after_its_parent_did():
    want = work()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=child, args=(queue,)) for _ in range(2)]
    for process in children:
        process.start()
    try:
        assert [queue.get(timeout=30) for _ in children] == [want, want]
    finally:
        for process in children:
            process.join(timeout=5)
            process.kill()
    assert work() == want


def test_threads_of_python_run_meanwhile():
    x = np.random.default_rng(0).normal(size=(30_000, 200)).astype(np.float32)
    ticks = 0
    stop = threading.Event()

    def tick():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    KMeans(64, max_iter=30, tol=0).fit(x)
    seconds = time.monotonic() - began
    stop.set()
    thread.join()
    assert ticks > 50 * seconds


def test_fits_run_side_by_side_in_threads():
    want = work()
    results = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [want] * 4


def test_ctrl_c_stops_a_long_fit():
    code = (
        "import numpy as np, signal\n"
        "from nest_rs.numeric import KMeans\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "x = np.random.default_rng(0).normal(size=(60_000, 512)).astype(np.float32)\n"
        "print('go', flush=True)\n"
        "try:\n"
        "    KMeans(512, max_iter=100_000, tol=0, n_init=200).fit(x)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "go\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stdout.readline() == "stopped\n"
        assert time.monotonic() - began < 0.5
        process.wait(timeout=20)
    finally:
        process.kill()
        process.stdout.close()


def test_a_million_rows_need_little_memory_beside_them():
    code = (
        "import numpy as np, resource\n"
        "from nest_rs.numeric import KMeans\n"
        "x = np.random.default_rng(0).random((1_000_000, 16), dtype=np.float32)\n"
        "KMeans(8, max_iter=2).fit(x[:1000])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "KMeans(32, max_iter=3, n_threads=2).fit(x)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    kilobytes = int(done.stdout)
    assert kilobytes < 64 * 1024 + 32 * 1_000_000 / 1024


def test_importing_starts_no_thread():
    code = "import os, nest_rs._core; print(len(os.listdir('/proc/self/task')))"
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert int(done.stdout) == 1


def test_the_same_call_twice_gives_the_same_bits():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(500, 40)).astype(np.float32)

    def digest():
        fit = KMeans(5, n_init=3).fit(x)
        probe = LogisticProbe().fit(x, np.arange(500) % 2)
        scores = silhouette_samples(x, fit.labels_)
        pooled = pooled_stats(x[None], np.ones((1, 500))).pooled
        parts = [fit.labels_, fit.cluster_centers_, probe.coef_, scores, pooled]
        return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()

    assert digest() == digest()
    assert _core.isa() in {"amx", "avx512bf16", "avx512", "avx2", "neon", "portable"}
