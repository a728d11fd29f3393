"""Sparse weights on a GPU: ``python benches/gpu_sparse.py [--only TEXT] [--out FOLDER]``.

Every row is checked before it is timed: integers against exact sums, the others against float64.
Times are medians of graph replays over copies of the weights that together exceed the L2 cache
several times, as in ``gpu.py``. ``x`` is the dense peer over the contender, in the same process:
cuBLAS float16 for numbers, ``torch._int_mm`` for int8, nibblas' own dense int4_g128 for groups.
PyTorch's CSR (cuSPARSE) and cuSPARSELt run beside it where they work. Products follow each other as
those of layers do, so each of nibblas' may begin while the one before it ends.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import cupy
import gpu_peers
import gpu_results
from gpu import BYTES, copies, cublas, microseconds, random_half, random_storage

import nibblas as nb
from nibblas.cuda import Storage
from nibblas.cuda._compile import cubin
from nibblas.cuda._launch import arch
from nibblas.cuda._sparse import SparsePanels
from nibblas.qtensor import _Storage

SHAPE, GROUPED = (28672, 7168), (28672, 8192)
GOALS = {0.4: 1.3, 0.3: 1.6, 0.2: 2.3, 0.1: 3.3}
# Flash-LLM and SpInfer over cuBLAS, built and run elsewhere on the same device, matrix and rows.
PUBLISHED = {
    (0.4, 8): "0.96, 0.89",
    (0.4, 16): "0.93, 0.86",
    (0.3, 8): "1.32, 0.90",
    (0.3, 16): "1.30, 0.87",
    (0.2, 8): "1.66, 0.91",
    (0.2, 16): "1.57, 0.89",
    (0.2, 64): "1.20, 0.69",
    (0.1, 8): "2.23, 0.93",
    (0.1, 16): "2.07, 0.90",
}


def kept_entries(n: int, k: int, density: float | None, seed: int = 0) -> Any:
    """Random places of a matrix; without a density two of every four."""
    random = cupy.random.default_rng(seed)
    if density is not None:
        return random.random((n, k), dtype=np.float32) < density
    pairs = [[i in p for i in range(4)] for p in itertools.combinations(range(4), 2)]
    return cupy.array(pairs)[random.integers(0, 6, (n, k // 4))].reshape(n, k)


def thinned(n: int, k: int, density: float | None, seed: int = 0) -> Any:
    """Random float16 weights of the device."""
    w = cupy.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)
    return cupy.where(kept_entries(n, k, density, seed + 1), w, 0).astype(np.float16)


def tensor(host: _Storage, numbers: Any = None) -> nb.QTensor:
    """Return a tensor whose numbers or codes may be on the device alone."""
    s = object.__new__(Storage)
    for name in _Storage.__slots__:
        setattr(s, name, getattr(host, name))
    s.number, s.device = 0, "cuda:0"
    s.panels = SparsePanels(host, 0, numbers)
    return nb.QTensor._wrap(s)


def half_tensor(fmt: str, w: Any) -> nb.QTensor:
    """Return a tensor of float16 weights of the device."""
    return tensor(_Storage(nb.Format(fmt), *w.shape, {}), w.view(np.uint16))


def byte_tensor(w: Any, fmt: str = "int8_2of4") -> nb.QTensor:
    """Return a sparse tensor of int8 weights of the device."""
    scales = {"scales": np.full((w.shape[0], 1), 2.0**-7, np.float32)}
    host = _Storage(nb.Format(fmt), *w.shape, scales)
    return tensor(host, w.view(np.uint8) ^ np.uint8(128))


def group_tensors(n: int, k: int, density: float) -> tuple[Storage, nb.QTensor]:
    """Return int4_g128 weights with dropped runs of 32, dense and sparse."""
    dense = random_storage("int4_g128", n, k)
    codes = dense.codes.reshape(n, k // 32, 16).copy()
    codes[np.random.default_rng(1).random((n, k // 32)) >= density] = 0x88
    thin = _Storage(dense.format, n, k, {**dense.arrays(), "codes": codes.reshape(n, -1)})
    sparse = thin.sparse(nb.Format("int4_g128_bsr32"))
    return Storage(thin, 0), tensor(sparse)


def rotated(q: nb.QTensor) -> list[nb.QTensor]:
    """Copies of a tensor that together exceed the cache."""
    s = q._storage
    assert isinstance(s, Storage)
    assert isinstance(s.panels, SparsePanels)
    out = [q]
    for _ in range(min(63, max(1, -(-BYTES // max(s.panels.nbytes, 1)) - 1))):
        twin = copy.copy(s.panels)
        twin.calls, twin.held = {}, {}
        for act, (records,) in s.panels.held.items():
            mine = copy.copy(records)
            mine.records = records.records.copy()
            twin.held[act] = [mine]
        other = object.__new__(Storage)
        for name in (*_Storage.__slots__, *Storage.__slots__):
            setattr(other, name, getattr(s, name))
        other.panels = twin
        out.append(nb.QTensor._wrap(other))
    return out


def check(q: nb.QTensor, w: Any, x: Any, compute: str = "f32") -> float:
    """Return the relative error of the last rows; raises where it is too large."""
    rows = slice(max(w.shape[0] - 2048, 0), w.shape[0])
    got = nb.matmul(x, q.T, dtype=np.float32, compute=compute)[:, rows]
    want = x.astype(np.float64) @ w[rows].astype(np.float64).T
    if compute == "int8":
        want = want.astype(np.float32) * np.float32(2.0**-7)
        if (got != want).any():
            raise AssertionError(f"{q.format}: integer sums differ")
    error = float(cupy.linalg.norm(got - want) / cupy.linalg.norm(want))
    if not error < 1e-5:
        raise AssertionError(f"{q.format}: relative error {error}")
    return error


def calls_of(tensors: list[nb.QTensor], x: Any, y: Any, compute: str) -> list[Callable[[], Any]]:
    return [lambda q=q: nb.matmul(x, q.T, compute=compute, out=y) for q in tensors]


def cusparselt(w: Any, m: int) -> float | None:
    """Time 2:4 products of float16 or int8 weights by PyTorch; None where it has none.

    The quickest of the layouts that it takes, with the algorithm that its own search finds.
    """
    try:
        import torch

        dense = torch.from_dlpack(w)
        count = max(2, -(-BYTES // (w.nbytes * 9 // 16)))
        packed = [torch._cslt_compress(dense) for _ in range(count)]
        rows = torch.ones(max(m, 16), w.shape[1], device="cuda").to(dense.dtype)
        times = []
        for x in [rows.t(), rows.t().contiguous()][: 2 if dense.dtype == torch.float16 else 1]:
            best = torch._cslt_sparse_mm_search(packed[0], x)
            calls = [
                lambda p=p, x=x, i=i: torch._cslt_sparse_mm(p, x, alg_id=i)
                for i in {0, best}
                for p in packed
            ]
            groups = [calls[i : i + count] for i in range(0, len(calls), count)]
            times += [gpu_peers.graph_time(g, 2000) for g in groups]
        return min(times)
    except Exception as e:
        print(f"cuSPARSELt: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
        return None


def csr(w: Any, m: int) -> float | None:
    """Time products of compressed rows by PyTorch; None where it has none."""
    try:
        import torch

        rows = torch.from_dlpack(w).to_sparse_csr()
        x = torch.ones(w.shape[1], m, device="cuda", dtype=rows.dtype)
        return gpu_peers.graph_time([lambda: rows @ x])
    except Exception as e:
        print(f"CSR: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
        return None


def int_mm(n: int, k: int, m: int) -> float | None:
    """Time cuBLAS int8, which takes no fewer than 17 rows; None without PyTorch."""
    try:
        return gpu_peers.int_mm(n, k, m)
    except (ImportError, RuntimeError) as e:
        print(f"_int_mm: {str(e).splitlines()[0]}", file=sys.stderr)
        return None


def compile_all(q: nb.QTensor, rows: tuple[int, ...], compute: str, kind: int) -> None:
    """Compile what some rows need, side by side."""
    plans = [q._storage.panels.plan(m, compute, kind) for m in rows]  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda p: cubin(f"{p.nest}.cu", arch(0), p.defines), plans))


class Table:
    """Rows so far; written after each."""

    def __init__(self, folder: Path | None, device: str) -> None:
        self.folder, self.device = folder, device
        self.rows: list[dict[str, Any]] = []

    def add(self, row: str, m: int, us: float, base: float, nbytes: int = 0, **more: Any) -> None:
        """Add a row; `base` is the time of the dense peer."""
        entry = {"row": row, "m": m, "us": us, "x": base / us, **more}
        if nbytes:
            entry["gb_s"] = nbytes / us / 1000
        self.rows.append(entry)
        rate = f"{entry['gb_s']:.0f} GB/s" if nbytes else ""
        goal = f"goal {more['goal']}x" if more.get("goal") else ""
        if goal and base / us < more["goal"]:
            goal += ", short of it"
        print(f"{row:34s} M={m:<4d} {us:8.2f} us {base / us:5.2f}x {rate} {goal}", flush=True)
        if self.folder:
            self.write(self.folder)

    def write(self, folder: Path) -> None:
        """Write JSON and a table."""
        head = [
            f"# {self.device}: sparse weights",
            "",
            "Made by `python benches/gpu_sparse.py --out benches/results`; its head says how.",
            "Numbers and int8: 28672 x 7168; groups: 28672 x 8192.",
            "Flash-LLM and SpInfer, over cuBLAS, are from runs of their own on the same device.",
        ]
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "row": lambda r: r["row"],
            "M": lambda r: str(r["m"]),
            "us": lambda r: f"{r['us']:.2f}",
            "x dense": lambda r: f"{r['x']:.2f}",
            "goal": lambda r: f"{r['goal']}x" if r.get("goal") else "",
            "Flash-LLM, SpInfer": lambda r: r.get("published") or "",
            "GB/s": lambda r: f"{r['gb_s']:.0f}" if "gb_s" in r else "",
        }
        gpu_results.write(folder, self.device, self.rows, head, columns, "-sparse")


def race(
    table: Table,
    name: str,
    q: nb.QTensor,
    w: Any,
    m: int,
    base: float,
    goal: float | None,
    published: str | None = None,
) -> None:
    """Check and time one row."""
    n, k = q.shape
    compute = "int8" if q.format.element.name == "int8" else "f32"
    x = random_half(m, k)
    if compute == "int8":
        x = cupy.random.randint(-127, 128, (m, k)).astype(np.int8)
    y = cupy.empty((m, n), np.float16 if compute == "f32" else np.float32)
    error = check(q, w, x, compute) if w is not None else None
    us = microseconds(calls_of(rotated(q), x, y, compute), 2000, 5)
    plan = str(nb.explain(x, q.T, compute=compute))
    nbytes = q._storage.panels.nbytes + x.nbytes + y.nbytes  # type: ignore[attr-defined]
    more = {"goal": goal, "error": error, "plan": plan, "published": published}
    table.add(name, m, us, base, nbytes, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    table = Table(options.out, device)
    pool = cupy.get_default_memory_pool()
    n, k = SHAPE
    base: dict[int, float] = {}

    def dense(m: int) -> float:
        if m not in base:
            base[m] = cublas(n, k, m)
            table.add("cuBLAS float16", m, base[m], base[m], 2 * n * k)
        return base[m]

    def wanted(name: str) -> bool:
        return options.only in name

    for density in (0.4, 0.3, 0.2, 0.1):
        name = f"f16_bitmap {density:.0%}"
        if wanted(name):
            w = thinned(n, k, density)
            q = half_tensor("f16_bitmap", w)
            rows = (8, 16, 64) if density == 0.2 else (8, 16)
            compile_all(q, rows, "f32", 0)
            for m in rows:
                goal = GOALS[density] if m < 32 else None
                race(table, name, q, w, m, dense(m), goal, PUBLISHED.get((density, m)))
                us = csr(w, m)
                if us is not None:
                    table.add(f"torch CSR {density:.0%}", m, us, dense(m))
            del w, q
            pool.free_all_blocks()
    if wanted("f16_2of4"):
        w = thinned(n, k, None)
        q = half_tensor("f16_2of4", w)
        compile_all(q, (8, 16, 32, 64), "f32", 0)
        for m in (8, 16, 32, 64):
            race(table, "f16_2of4", q, w, m, dense(m), 1.5)
            us = cusparselt(w, m)
            if us is not None:
                table.add("cuSPARSELt float16", m, us, dense(m), w.nbytes * 9 // 16)
        del w, q
        pool.free_all_blocks()
    if wanted("int8_2of4"):
        w = cupy.random.randint(-127, 128, (n, k), dtype=np.int32).astype(np.int8)
        w *= kept_entries(n, k, None)
        q = byte_tensor(w)
        compile_all(q, (8, 16, 32, 64), "int8", 4)
        for m in (8, 16, 32, 64):
            peer = int_mm(n, k, m)
            if peer is not None:
                table.add("cuBLAS int8", m, peer, peer, n * k)
            race(table, "int8_2of4", q, w, m, peer or dense(m), 1.5)
            us = cusparselt(w, m)
            if us is not None:
                table.add("cuSPARSELt int8", m, us, peer or dense(m), w.nbytes * 5 // 8)
        del w, q
        pool.free_all_blocks()
    for fmt, density in (("int8_bitmap", 0.5), ("int8_bitmap", 0.2), ("int8_block16x64", 0.5)):
        name = f"{fmt} {density:.0%}"
        if not wanted(name):
            continue
        w = cupy.random.randint(1, 128, (n, k), dtype=np.int32).astype(np.int8)
        high, wide = (1, 1) if fmt == "int8_bitmap" else (16, 64)
        w *= cupy.repeat(
            cupy.repeat(kept_entries(n // high, k // wide, density), high, axis=0), wide, axis=1
        )
        q = byte_tensor(w, fmt)
        # More rows of single entries are products of dense panels.
        rows = (8, 16, 32) if fmt == "int8_bitmap" else (8, 16, 64)
        compile_all(q, rows, "int8", 4)
        for m in rows:
            race(table, name, q, w, m, int_mm(n, k, m) or dense(m), None)
        del w, q
        pool.free_all_blocks()
    for density in (0.5, 0.25):
        name = f"f16_block16x64 {density:.0%}"
        if not wanted(name):
            continue
        blocks = kept_entries(n // 16, k // 64, density)
        w = thinned(n, k, 1.0)
        w[~cupy.repeat(cupy.repeat(blocks, 16, axis=0), 64, axis=1)] = 0
        q = half_tensor("f16_block16x64", w)
        compile_all(q, (8, 16, 64), "f32", 0)
        for m in (8, 16, 64):
            race(table, name, q, w, m, dense(m), None)
        del w, q
        pool.free_all_blocks()
    if wanted("int4_g128_bsr32"):
        thin, q = group_tensors(*GROUPED, 0.5)
        tail = nb.QTensor._wrap(_Storage(thin.format, thin.rows, thin.cols, thin.arrays()))
        w = cupy.asarray(tail[-2048:].dequantize())

        twins = copies(thin)
        for m in (1, 4, 8):
            x, y = random_half(m, GROUPED[1]), cupy.empty((m, GROUPED[0]), np.float16)
            got = nb.matmul(x, q.T, dtype=np.float32)[:, -2048:]
            want = x.astype(np.float64) @ w.astype(np.float64).T
            error = float(cupy.linalg.norm(got - want) / cupy.linalg.norm(want))
            if not error < 1e-4:
                raise AssertionError(f"int4_g128_bsr32: relative error {error}")
            us = microseconds(calls_of(twins, x, y, "f32"), 2000, 5)
            table.add("int4_g128, dense", m, us, us, thin.panels.nbytes)
            race(table, "int4_g128_bsr32 50%", q, None, m, us, 1.4)


if __name__ == "__main__":
    main()
