"""Race on a GPU: ``python benches/gpu.py [--quick] [--only TEXT] [--out FOLDER]``.

Every row is checked against float64 (or, for integer products, the CPU's bits) before it is timed.
Times are medians of CUDA-graph replays over copies of the weights that together exceed the L2
cache several times, so that weights come from memory; launch gaps inside the graph are in every
number, for every contender alike. ``x`` is cuBLAS float16 (``cupy.matmul``) over the contender, in
the same process.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import cupy
import gpu_peers
import gpu_results
import report

import nibblas as nb
from nibblas.cuda import Storage
from nibblas.cuda._compile import cubin
from nibblas.cuda._launch import arch
from nibblas.cuda._plan import plan
from nibblas.cuda._product import _problem
from nibblas.qtensor import _Storage

BYTES = 320 << 20
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]


def random_storage(fmt: str, n: int, k: int, seed: int = 0) -> _Storage:
    """Random codes and scales, without the time that quantising takes."""
    rng = np.random.default_rng(seed)
    f = nb.Format(fmt)
    if f.element.levels == 1 << f.bits:
        codes = np.frombuffer(rng.bytes(n * f.row_bytes(k)), np.uint8).reshape(n, -1)
    else:
        codes = nb.quantize(rng.normal(size=(n, k)).astype(np.float32), fmt)._storage.codes
    scales = rng.uniform(0.5, 1.5, (n, f.groups(k))).astype(np.float32) / 64
    zeros = None
    if f.has_zeros:
        zeros = rng.integers(0, f.element.levels, scales.shape).astype(np.uint8)
    typed: Any = scales.astype(np.float16) if f.scale == "f16" else scales
    if f.scale in ("e8m0", "e4m3"):
        low, high = (118, 122) if f.scale == "e8m0" else (40, 60)
        typed = rng.integers(low, high, scales.shape).astype(np.uint8)
    if f.scale == "i8":
        typed = rng.integers(8, 17, scales.shape).astype(np.uint8)
    arrays = {"codes": codes, "scales": typed}
    if f.scale == "i8":
        arrays["row_scales"] = np.full(n, 0.01, np.float32)
    return _Storage(f, n, k, arrays if zeros is None else arrays | {"zeros": zeros})


def copies(storage: Storage) -> list[nb.QTensor]:
    """Copies of a tensor that together exceed the cache."""
    out = [storage]
    for _ in range(max(1, -(-BYTES // max(storage.panels.nbytes, 1)) - 1)):
        if len(out) == 64:
            break
        twin = copy.copy(storage.panels)
        twin.planes = [p.copy() for p in twin.planes]
        twin.scales = twin.scales.copy()
        other = object.__new__(Storage)
        for name in (*_Storage.__slots__, *Storage.__slots__):
            setattr(other, name, getattr(storage, name))
        other.panels = twin
        out.append(other)
    return [nb.QTensor._wrap(s) for s in out]


def microseconds(calls: list[Callable[[], Any]], least: float = 3000.0, rounds: int = 7) -> float:
    """Median time of one call, the calls taking turns inside a captured graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for c in calls:
            c()
        stream.synchronize()

        def graph(turns: int) -> Any:
            stream.begin_capture()
            for _ in range(turns):
                for c in calls:
                    c()
            return stream.end_capture()

        def once(g: Any) -> float:
            a, b = cupy.cuda.Event(), cupy.cuda.Event()
            a.record(stream)
            g.launch(stream)
            b.record(stream)
            b.synchronize()
            return float(cupy.cuda.get_elapsed_time(a, b)) * 1000

        g = graph(1)
        once(g)
        t = max(once(g), 1.0)
        turns = int(min(max(1, least / t), max(1, 400 // len(calls))))
        g = graph(turns)
        once(g)
        times = [once(g) for _ in range(rounds)]
    return statistics.median(times) / (turns * len(calls))


def products(tensors: list[nb.QTensor], x: Any, compute: str, y: Any) -> list[Callable[[], Any]]:
    return [lambda q=q: nb.matmul(x, q.T, compute=compute, out=y) for q in tensors]


def check(storage: _Storage, device: nb.QTensor, x: Any, compute: str) -> float:
    """Largest error of some rows over the largest value; raises where it is too large."""
    rows = slice(max(storage.rows - 96, 0), storage.rows)
    part = nb.QTensor._wrap(storage)[rows]
    got = nb.matmul(x, device.T, compute=compute, dtype=np.float32)[:, rows].get()
    host = x.get().astype(np.float32) if x.dtype.itemsize == 2 else x.get()
    if compute == "int8":
        want = nb.matmul(host, part.T, compute="int8", dtype=np.float32)
        if got.tobytes() != want.tobytes():
            raise AssertionError(f"{storage.format}: integer result differs from the CPU's")
        return 0.0
    exact = host.astype(np.float64) @ part.dequantize().astype(np.float64).T
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    if not error < 1e-3:
        raise AssertionError(f"{storage.format}: relative error {error}")
    return error


def random_half(n: int, k: int) -> Any:
    return cupy.random.standard_normal((n, k), dtype=np.float32).astype(np.float16)


def cublas(n: int, k: int, m: int) -> float:
    """Float16 through cuBLAS: PyTorch's where it is there, since CuPy's calls are not captured."""
    try:
        return gpu_peers.cublas(n, k, m)
    except ImportError:
        pass
    count = max(2, -(-BYTES // (2 * n * k)))
    ws = [random_half(n, k) for _ in range(count)]
    x, y = random_half(m, k), cupy.empty((m, n), np.float16)
    for w in ws:
        cupy.matmul(x, w.T, out=y)
    a, b = cupy.cuda.Event(), cupy.cuda.Event()
    a.record()
    for _ in range(20):
        for w in ws:
            cupy.matmul(x, w.T, out=y)
    b.record()
    b.synchronize()
    return float(cupy.cuda.get_elapsed_time(a, b)) * 1000 / (20 * count)


def compile_all(wanted: list[tuple[str, str, int, int, int]], device: int) -> None:
    """Compile what the rows need, on all cores."""
    kernels = set()
    for fmt, compute, n, k, m in wanted:
        panels = Storage(random_storage(fmt, 64, 256), device).panels
        groups = max(nb.Format(fmt).groups(k), 1)
        p = _problem(panels, m, compute, 0)[0]
        p = p._replace(n_padded=-(-n // 64) * 64, chunks=-(-k // 128), groups=groups)
        made = plan(p)
        kernels.add((f"{made.nest}.cu", arch(device), made.defines))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: cubin(*kernel), kernels))


def rows(quick: bool) -> list[tuple[str, str, int, int, int]]:
    """Return (format, compute, N, K, M) of every row."""
    out = []
    for n, k in SHAPES:
        for m in [1, 16, 64, 1024] if quick else [1, 8, 16, 32, 64, 128, 1024]:
            out.append(("int4_g128", "f32", n, k, m))
            if m in (1, 16, 64, 1024):
                out.append(("int4_g128", "int8", n, k, m))
                out.append(("int8", "int8", n, k, m))
            if m in (1, 8):
                for fmt in ("int2_g128", "bipolar1_g128", "int3_g128", "int8"):
                    out.append((fmt, "f32", n, k, m))
            if m >= 1024:
                out.append(("int4", "int8", n, k, m))
                out.append(("int4_g128_si8", "int8", n, k, m))
            if m in (1, 16) and n == 28672:
                for fmt in ("nf4_g128", "mxfp4", "e3m2_g128", "mxfp6_e3m2"):
                    out.append((fmt, "f32", n, k, m))
        if n == 14336:
            out.append(("int4_g128", "f32", n, k, 4096))
        if (n, k) in ((4096, 4096), (14336, 4096)):
            out += [("int8", "int8", n, k, 4096), ("int4", "int8", n, k, 4096)]
    return out


def activation_rows() -> list[dict[str, Any]]:
    """Time what int8 products do first: rows of float16 to int8, read once and written once."""
    table = []
    tensor = nb.QTensor._wrap(Storage(random_storage("int8", 64, 4096), 0))
    for m in (4096, 8192, 32768):
        x, y = random_half(m, 4096), cupy.empty((m, 64), np.float16)
        nb.matmul(x, tensor.T, compute="int8", out=y)
        call = list(tensor._storage.panels.calls.values())[-1]
        out, scale = cupy.empty((m, 4096), np.uint8), cupy.empty(m, np.float32)

        def quantise(call: Any = call, x: Any = x, out: Any = out, scale: Any = scale) -> None:
            call.stream = cupy.cuda.get_current_stream().ptr
            call._prepare(x.data.ptr, out.data.ptr, scale)

        us = microseconds([quantise])
        row = {"row": "nibblas activations to int8", "n": m, "k": 4096, "m": m, "us": us}
        table.append({**row, "gb_s": (x.nbytes + out.nbytes) / us / 1000, "tops": 0.0})
    return table


def bit_rows() -> list[tuple[int, int, int, int]]:
    """Return (bits of both sides, N, K, M)."""
    sizes = [(4096, 4096, 1), (4096, 4096, 16), (4096, 4096, 4096), (8192, 8192, 8192)]
    return [(b, *size) for b in (1, 2) for size in sizes]


def bits_entries(bits: int, n: int, k: int, m: int) -> list[dict[str, Any]]:
    """Time the raw sums of two bipolar tensors, both packed; the weights are not rotated.

    For few rows also from float16, quantising them as part of the work.
    """
    sides = [
        nb.QTensor._wrap(Storage(random_storage(f"bipolar{bits}", r, k, r), 0)) for r in (m, n)
    ]
    x, w = sides
    y = cupy.empty((m, n), np.int32)
    nb.matmul(x, w.T, dtype=np.int32, out=y)
    want = x[: min(m, 64)].codes().astype(np.int64) @ w[-64:].codes().astype(np.int64).T
    if (y[: min(m, 64), -64:].get() != want).any():
        raise AssertionError(f"bipolar{bits}: wrong sums")
    name = f"nibblas W{bits}A{bits} bit planes, "
    timed = {"raw sums": microseconds([lambda: nb.matmul(x, w.T, dtype=np.int32, out=y)])}
    if m <= 16:
        half, form = random_half(m, k), f"bipolar{bits}"

        def both() -> None:
            nb.cuda.activations(half, form).matmul(w.T, dtype=np.int32, out=y)

        both()
        want = nb.quantize(half.get(), form).codes().astype(np.int64)
        if (y[:, -64:].get() != want @ w[-64:].codes().astype(np.int64).T).any():
            raise AssertionError(f"bipolar{bits}: wrong sums from float16")
        timed["from float16"] = microseconds([both])
    flops = 2.0 * m * n * k
    return [
        {"row": name + what, "n": n, "k": k, "m": m, "us": us, "tops": flops / us / 1e6}
        for what, us in timed.items()
    ]


FIRST = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np, cupy, nibblas as nb
q = nb.quantize(np.ones((256, 512), np.float32), "int4_g128").to("cuda:0")
for m in (1, 200):
    x, out = cupy.ones((m, 512), np.float16), cupy.ones((m, 256), np.float16)
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    nb.matmul(x, q.T, out=out)
    cupy.cuda.Device().synchronize()
    print(time.perf_counter() - start)
"""


def host_rows() -> list[dict[str, Any]]:
    """Return what the host spends: on calls, and on a kernel the first time it is used."""
    q = nb.QTensor._wrap(Storage(random_storage("int4_g128", 64, 128), 0))
    x, y = random_half(1, 128), cupy.empty((1, 64), np.float16)
    empty = cupy.RawKernel('extern "C" __global__ void empty() {}', "empty")
    calls: dict[str, Callable[[], Any]] = {
        "nibblas product": lambda: nb.matmul(x, q.T, out=y),
        "nibblas.cuda.graph of it": nb.cuda.graph(lambda: nb.matmul(x, q.T, out=y)),
        "CuPy RawKernel, empty": lambda: empty((1,), (32,), ()),
    }
    table = []
    for name, call in calls.items():
        call()
        times = []
        for _ in range(25):
            # Few enough for the queue of the device to take them.
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            times.append((time.perf_counter() - start) / 200 * 1e6)
        table.append({"row": name, "us": statistics.median(times)})
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first product, compiling", "first product, from the cache"):
            run = subprocess.run(
                [sys.executable, "-c", FIRST, str(Path(nb.__file__).parents[1])],
                env={**os.environ, "NIBBLAS_CUDA_CACHE": folder, "CUDA_CACHE_DISABLE": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            for m, seconds in zip((1, 200), run.stdout.split(), strict=True):
                table.append({"row": f"{name}, M = {m}", "us": float(seconds) * 1e6})
    return table


def write(
    folder: Path, name: str, rows: list[dict[str, Any]], host: list[dict[str, Any]] | None = None
) -> None:
    """Write the rows so far as JSON and as a table."""
    rows = sorted(rows, key=lambda r: (r["n"], r["k"], r["m"], r["row"]))
    how = "Made by `python benches/gpu.py --out benches/results`; how is said in its first lines."
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "row": lambda r: r["row"],
        "N x K": lambda r: f"{r['n']}x{r['k']}",
        "M": lambda r: str(r["m"]),
        "us": lambda r: f"{r['us']:.2f}",
        "x cuBLAS f16": lambda r: f"{r['x']:.2f}" if "x" in r else "",
        "GB/s": lambda r: f"{r['gb_s']:.0f}" if "gb_s" in r else "",
        "T/s": lambda r: f"{r['tops']:.0f}",
    }
    tail = gpu_results.goals(rows)
    if host:
        lines = [[r["row"], f"{r['us']:.2f}"] for r in host]
        tail += "\n## Host\n\n" + report.table(["call", "us"], lines) + "\n"
    head = [f"# {name}", "", how]
    gpu_results.write(folder, name, rows, head, columns, tail=tail, more={"host": host or []})


def plot(folder: Path, name: str, table: list[dict[str, Any]]) -> None:
    """Draw times over cuBLAS against rows of activations, a picture per shape."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    shapes = [s for s in SHAPES if any((r["n"], r["k"]) == s and "x" in r for r in table)]
    if not shapes:
        return
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.2 * len(shapes), 4.6), squeeze=False)
    for ax, (n, k) in zip(axes[0], shapes, strict=True):
        lanes: dict[str, list[tuple[int, float]]] = {}
        for r in table:
            if (r["n"], r["k"]) == (n, k) and "x" in r and r["row"] != "cublas f16":
                lanes.setdefault(r["row"], []).append((r["m"], r["x"]))
        for i, (row, points) in enumerate(sorted(lanes.items())):
            ours = row.startswith("nibblas")
            style = {"marker": "o" if ours else "x", "ls": "-" if ours else ":", "ms": 4}
            ax.plot(*zip(*sorted(points), strict=True), label=row, color=f"C{i % 10}", **style)
        ax.axhline(1, color="black", lw=0.8)
        ax.set(xscale="log", yscale="log", xlabel="rows of activations", title=f"{n} x {k}")
        ax.set_xticks(ticks := sorted({m for p in lanes.values() for m, _ in p}), map(str, ticks))
        ax.set_yticks(marks := [0.5, 0.7, 1, 1.5, 2, 3, 4, 5], map(str, marks))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6, loc="upper right")
    axes[0][0].set_ylabel("times faster than cuBLAS float16")
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(folder / f"{gpu_results.stem(name)}.png", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's kernels out")
    options = parser.parse_args()
    index = cupy.cuda.Device().id
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    table: list[dict[str, Any]] = []
    base: dict[tuple[int, int, int], float] = {}
    held: tuple[str, int, int] | None = None
    tensors: list[nb.QTensor] = []
    storage: _Storage | None = None
    wanted = [
        r for r in rows(options.quick) if options.only in f"{r[0]} {r[1]} {r[2]}x{r[3]} M={r[4]}"
    ]
    wanted.sort(key=lambda r: (r[2], r[3], r[0]))
    print(f"{name}, CuPy {cupy.__version__}")
    began = time.perf_counter()
    compile_all(wanted, index)
    print(f"kernels compiled: {time.perf_counter() - began:.0f} s", flush=True)
    for n, k, m in sorted({r[2:] for r in wanted}):
        base[n, k, m] = cublas(n, k, m)
        peers = {"cublas f16": base[n, k, m]}
        if not options.no_torch:
            peers |= gpu_peers.peers(n, k, m)
        for peer, us in peers.items():
            flops = 2.0 * m * n * k
            print(f"{peer:28s} {n:6d}x{k:<6d} M={m:<5d} {us:9.2f} us", flush=True)
            entry = {"row": peer, "n": n, "k": k, "m": m, "us": us, "x": base[n, k, m] / us}
            table.append({**entry, "tops": flops / us / 1e6})
    for fmt, compute, n, k, m in wanted:
        if held != (fmt, n, k):
            tensors = []
            cupy.get_default_memory_pool().free_all_blocks()
            storage = random_storage(fmt, n, k)
            tensors = copies(Storage(storage, index))
            held = (fmt, n, k)
        assert storage is not None
        x, y = random_half(m, k), cupy.empty((m, n), np.float16)
        error = check(storage, tensors[0], x[:300] if compute == "int8" else x, compute)
        us = microseconds(products(tensors, x, compute, y))
        nbytes = tensors[0]._storage.panels.nbytes + x.nbytes + y.nbytes
        r = {
            "row": f"nibblas {fmt} {compute}",
            "n": n,
            "k": k,
            "m": m,
            "us": us,
            "x": base[n, k, m] / us,
            "gb_s": nbytes / us / 1000,
            "tops": 2.0 * m * n * k / us / 1e6,
            "error": error,
            "plan": str(nb.explain(x, tensors[0].T, compute=compute)),
        }
        found = [r]
        if compute == "int8" and m >= 1024:
            # As the peers of these rows are timed.
            ready = nb.cuda.activations(x)
            nb.matmul(x, tensors[0].T, compute="int8", out=(twin := cupy.empty_like(y)))
            if (ready.matmul(tensors[0].T, out=y) != twin).any():
                raise AssertionError(f"{fmt}: another result with activations quantised before")
            calls = [lambda q=q, a=ready, y=y: a.matmul(q.T, out=y) for q in tensors]
            us = microseconds(calls)
            row, speed = f"{r['row']}, quantised before", 2.0 * m * n * k / us / 1e6
            found.append({**r, "row": row, "us": us, "x": base[n, k, m] / us, "tops": speed})
            del found[1]["gb_s"]
        for r in found:
            table.append(r)
            rate = f"{r['gb_s']:7.0f} GB/s" if "gb_s" in r else ""
            print(
                f"{r['row']:28s} {n:6d}x{k:<6d} M={m:<5d} {r['us']:9.2f} us  {r['x']:5.2f}x  "
                f"{rate} {r['tops']:7.1f} T/s  err {error:.1e}",
                flush=True,
            )
        if options.out:
            write(options.out, name, table)
    tensors = []
    cupy.get_default_memory_pool().free_all_blocks()
    for r in [] if options.only else activation_rows():
        table.append(r)
        print(f"{r['row']} {r['m']}x4096 {r['us']:.2f} us {r['gb_s']:.0f} GB/s", flush=True)
    for bits, n, k, m in [] if options.only else bit_rows():
        for r in bits_entries(bits, n, k, m):
            table.append(r)
            pops = r["tops"] / 1000
            print(f"{r['row']} {n}x{k} M={m} {r['us']:.2f} us {pops:.2f} POPS", flush=True)
        if options.out:
            write(options.out, name, table)
    host = [] if options.only else host_rows()
    for r in host:
        print(f"host: {r['row']} {r['us']:.2f} us", flush=True)
    if options.out:
        write(options.out, name, table, host)
        plot(options.out, name, table)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
