"""Sparse weights beside dense ones: `python benches/sparse.py`, in less than three minutes.

Every case times a sparse weight, our own dense one with the same values, and the CSR products of
scipy and PyTorch where they are installed, in turns. Cold weights rotate over copies of 512 MB,
more than the caches hold. Writes benches/results/sparse.json, the table of docs/sparse.md (between
its marks) and the chart docs/sparse.svg: speed over dense against density.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from formats import replace, table
from harness import COLD_BYTES, machine

import nibblas as nb
from nibblas.qtensor import QTensor, _Storage

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/sparse.md"
PLOT = ROOT / "docs/sparse.svg"
SIZE = 4096


@dataclass
class Case:
    """A sparse format beside the dense one, at some densities."""

    name: str
    value: str
    structure: str
    pattern: str
    compute: str
    m: int
    cold: bool
    densities: tuple[float, ...]
    reach: dict[float, float] = field(default_factory=dict)


CURVE = (0.1, 0.2, 0.4, 0.5, 0.75)
DELTA = "DeltaLinear, int8"
CASES = [
    Case("f32 bitmap", "f32", "bitmap", "unstructured", "f32", 1, True, CURVE,
         {0.4: 1.6, 0.2: 2.8, 0.1: 4.5}),
    Case("f32 bitmap", "f32", "bitmap", "unstructured", "f32", 16, False, (0.1, 0.2, 0.4)),
    Case("f32 bitmap", "f32", "bitmap", "unstructured", "f32", 256, False, (0.1, 0.2, 0.3)),
    Case("f16 bitmap", "f16", "bitmap", "unstructured", "f32", 1, True, (0.1, 0.2, 0.5)),
    Case("int8 bitmap", "int8", "bitmap", "unstructured", "int8", 1, True, CURVE,
         {0.5: 1.25, 0.2: 2.2}),
    Case("int8 bitmap", "int8", "bitmap", "unstructured", "int8", 16, False, (0.2, 0.5)),
    Case("int8 2:4", "int8", "2of4", "2:4", "int8", 1, True, (0.5,)),
    Case("int4_g32 bsr32", "int4_g32", "bsr32", "group32", "int8", 1, True, (0.25, 0.5, 0.75),
         {0.5: 1.6}),
    Case("int4 bsr32", "int4", "bsr32", "group32", "int8", 1, True, (0.25, 0.5, 0.75), {0.5: 1.6}),
    Case("int8 block16x64", "int8", "block16x64", "block16x64", "int8", 256, False,
         (0.1, 0.25, 0.5, 0.75), {0.5: 1.7, 0.25: 3.0}),
    Case("int4_g32 block16x64", "int4_g32", "block16x64", "block16x64", "int8", 256, False,
         (0.1, 0.25, 0.5, 0.75), {0.5: 1.7, 0.25: 3.0}),
    Case("int4_g128 block16x64", "int4_g128", "block16x64", "block16x64", "int8", 256, False,
         (0.1, 0.25, 0.5, 0.75)),
    Case("int4 block16x64", "int4", "block16x64", "block16x64", "int8", 256, False,
         (0.25, 0.5)),
    Case("int8 block16x64", "int8", "block16x64", "block16x64", "int8", 32, False, (0.25, 0.5)),
]  # fmt: skip


def pruned(full: np.ndarray, pattern: str, density: float) -> np.ndarray:
    """Drop units at random, equally many in each row: what is dropped changes no time."""
    n, k = full.shape
    rng = np.random.default_rng(int(1000 * density))
    if pattern == "2:4":
        return nb.prune(full, pattern)
    unit = {"unstructured": (1, 1), "group32": (1, 32), "block16x64": (16, 64)}[pattern]
    rows, cols = n // unit[0], k // unit[1]
    one = np.zeros(cols, np.bool_)
    one[rng.permutation(cols)[: round(density * cols)]] = True
    turned = (np.arange(cols) + rng.integers(0, cols, (rows, 1))) % cols
    keep = one[turned].repeat(unit[0], 0).repeat(unit[1], 1)
    return np.where(keep, full, np.float32(0))


def copies_of(q: QTensor, count: int) -> list[QTensor]:
    """Return copies that share no panels."""
    s = q._storage
    made = [_Storage(s.format, s.rows, s.cols, s.arrays(), None) for _ in range(count)]
    return [QTensor._wrap(part, False).pack() for part in made]


def rotating(tensors: list[QTensor], x: np.ndarray, compute: str) -> Callable[[], None]:
    out = nb.matmul(x, tensors[0].T, compute=compute)
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(tensors)
        nb.matmul(x, tensors[turn].T, compute=compute, out=out)

    return call


def dense_call(
    value: str, w: np.ndarray, x: np.ndarray, case: Case
) -> tuple[Callable[[], None], int]:
    q = nb.quantize(w, value)
    count = max(1, COLD_BYTES // q.nbytes) if case.cold else 1
    return rotating(copies_of(q, count), x, case.compute), q.nbytes


def peers(w: np.ndarray, x: np.ndarray, cold: bool) -> dict[str, Callable[[], object]]:
    """Return the CSR products that are installed, on float32."""
    found: dict[str, Callable[[], object]] = {}
    column = np.ascontiguousarray(x.T)
    try:
        import scipy.sparse
    except ImportError:
        return found
    first = scipy.sparse.csr_array(w)
    count = max(1, COLD_BYTES // (8 * first.nnz)) if cold else 1
    matrices = [first.copy() for _ in range(count)]
    found["scipy CSR"] = _turns([lambda m=m: m @ column for m in matrices])
    try:
        import torch
    except ImportError:
        return found
    warnings.filterwarnings("ignore", message="Sparse")
    torch.set_num_threads(nb.get_num_threads())
    tensors = [
        torch.sparse_csr_tensor(*map(torch.tensor, (m.indptr, m.indices, m.data)), size=w.shape)
        for m in matrices
    ]
    other = torch.from_numpy(column)
    found["torch CSR"] = _turns([lambda t=t: t @ other for t in tensors])
    return found


def _turns(calls: list[Callable[[], object]]) -> Callable[[], object]:
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def interleave(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Time all calls in turns, for about `budget` seconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    end, turn = time.perf_counter() + budget, 0
    while turn < 7 or (time.perf_counter() < end and turn < 400):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            begin = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - begin)
        turn += 1
    return taken


def summary(name: str, taken: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Medians, and the median of the ratios to `base` within each turn."""
    out: dict[str, Any] = {"name": name, "base": base}
    for who, times in taken.items():
        ratios = sorted(b / t for b, t in zip(taken[base], times, strict=True))
        out[who] = {
            "us": round(1e6 * statistics.median(times), 1),
            "over_dense": round(statistics.median(ratios), 3),
            "p10": round(ratios[len(ratios) // 10], 3),
            "p90": round(ratios[-1 - len(ratios) // 10], 3),
        }
    return out


def run_case(case: Case, budget: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(7)
    full = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    x = rng.standard_normal((case.m, SIZE), dtype=np.float32)
    dense, dense_bytes = dense_call(case.value, full, x, case)
    rows = []
    for density in case.densities:
        w = pruned(full, case.pattern, density)
        q = nb.quantize(w, f"{case.value}_{case.structure}")
        want = nb.matmul(x, nb.quantize(w, case.value).T, compute=case.compute)
        got = nb.matmul(x, q.T, compute=case.compute)
        if not np.array_equal(got, want):
            raise AssertionError(f"{case.name} at density {density}: not the bits of dense")
        count = max(1, COLD_BYTES // q.nbytes) if case.cold else 1
        calls: dict[str, Callable[[], object]] = {
            "dense": dense,
            "sparse": rotating(copies_of(q, count), x, case.compute),
        }
        if case.value == "f32" and density in case.reach:
            calls |= peers(w, x, case.cold)
        row = summary(case.name, interleave(calls, budget), "dense")
        row |= {"density": density, "m": case.m, "cold": case.cold, "compute": case.compute}
        row |= {"bytes": q.nbytes, "dense_bytes": dense_bytes}
        row["reach"] = case.reach.get(density)
        rows.append(row)
        _print(row)
    return rows


def run_delta(budget: float) -> list[dict[str, Any]]:
    """Delta inference and skipped zeros, one row, beside the dense int8 product."""
    rng = np.random.default_rng(8)
    q = nb.quantize(rng.standard_normal((SIZE, SIZE), dtype=np.float32), "int8")
    rows = []
    for cold in (False, True):
        tensors = copies_of(q, COLD_BYTES // q.nbytes if cold else 1)
        for part in (0.02, 0.1, 0.5):
            scale = 0.03
            layers = [nb.DeltaLinear(t, scale=scale) for t in tensors]
            x = rng.standard_normal(SIZE).astype(np.float32)
            frames = [x]
            for _ in range(2 * len(layers) + 7):
                moved = rng.random(SIZE) < part
                frames.append(
                    np.where(moved, rng.standard_normal(SIZE), frames[-1]).astype(np.float32)
                )
            for layer in layers:
                layer(frames[0])
            sparse_x = np.where(rng.random(SIZE) < part, x, 0).astype(np.float32)
            state = {"turn": 0}

            def delta(layers: Any = layers, frames: Any = frames, state: Any = state) -> None:
                # Each layer sees the frames one after the other, so that `part` of them change.
                turn = state["turn"] = state["turn"] + 1
                layers[turn % len(layers)](frames[(turn // len(layers)) % len(frames)])

            def skip(tensors: Any = tensors, x: Any = sparse_x, state: Any = state) -> None:
                nb.matmul(
                    x, tensors[state["turn"] % len(tensors)].T, compute="int8", skip_zeros=True
                )

            calls = {"dense": rotating(tensors, x, "int8"), "delta": delta, "skip_zeros": skip}
            skip()
            row = summary(DELTA, interleave(calls, budget), "dense")
            row |= {"changed": part, "m": 1, "cold": cold, "reach": 3.0 if part == 0.1 else None}
            rows.append(row)
            _print(row)
    return rows


def _print(row: dict[str, Any]) -> None:
    ratios = ", ".join(
        f"{who} {v['over_dense']:.2f}x ({v['us']:.0f} us)"
        for who, v in row.items()
        if isinstance(v, dict)
    )
    where = f"M = {row['m']}, {row.get('density', row.get('changed'))}"
    goal = f"; goal {row['reach']}x" if row.get("reach") else ""
    print(f"{row['name']} at {where}{' cold' if row['cold'] else ''}: {ratios}{goal}", flush=True)


def _ratio(v: dict[str, float]) -> str:
    return f"{v['over_dense']:.2f}x ({v['p10']:.2f} to {v['p90']:.2f})"


def lines(result: dict[str, Any]) -> str:
    """Return the table of docs/sparse.md: the rows that have a goal, and those of few inputs."""
    head = [
        "weights",
        "M",
        "kept",
        "dense, us",
        "sparse, us",
        "over dense (p10 to p90)",
        "goal",
        "bytes, dense over sparse",
        "CSR over dense: scipy, torch",
    ]
    out = []
    for row in result["rows"]:
        ours = row.get("sparse") or row.get("delta")
        where = "cold" if row["cold"] else "hot"
        if "changed" in row:
            share = f"{100 * row['changed']:g} % of the inputs"
            for name, v in (("DeltaLinear int8", ours), ("skip_zeros int8", row["skip_zeros"])):
                goal = f"{row['reach']:g}x" if row["reach"] and v is ours else ""
                out.append([f"{name}, {where}", "1", share, f"{row['dense']['us']:.0f}",
                            f"{v['us']:.0f}", _ratio(v), goal, "", ""])  # fmt: skip
        elif row["reach"]:
            csr = [f"{row[p]['over_dense']:.2f}x" for p in ("scipy CSR", "torch CSR") if p in row]
            out.append([f"{row['name']}, {where}", str(row["m"]), f"{100 * row['density']:g} %",
                        f"{row['dense']['us']:.0f}", f"{ours['us']:.0f}", _ratio(ours),
                        f"{row['reach']:g}x", f"{row['dense_bytes'] / row['bytes']:.2f}",
                        ", ".join(csr)])  # fmt: skip
    return table(head, out)


def draw(result: dict[str, Any]) -> None:
    """Draw speed over dense against density; logarithmic, dense at 1."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sparse"
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8.5, 5), layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        where = "cold" if row["cold"] else "hot"
        if "density" in row:
            label, share, ours = f"{row['name']}, M = {row['m']}, {where}", "density", "sparse"
        else:
            label, share, ours = f"DeltaLinear int8, {where}", "changed", "delta"
        curves.setdefault(label, []).append((row[share], row[ours]["over_dense"]))
    for i, (label, points) in enumerate(curves.items()):
        xs, ys = zip(*sorted(points), strict=True)
        style = {"marker": "osv^D"[i % 5], "linestyle": "--" if "Delta" in label else "-"}
        ax.plot(xs, ys, markersize=4, linewidth=1.2, label=label, **style)
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="entries kept (DeltaLinear: inputs that changed)",
        ylabel="speed over the same product of dense weights",
    )
    ax.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 0.75], ["2 %", "5 %", "10 %", "20 %", "50 %", "75 %"])
    ax.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5x", "1x", "2x", "4x", "8x", "16x"])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    fig.legend(fontsize=7, loc="outside right center")
    fig.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Measure, or draw again what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benches/results", help="folder of the JSON"
    )
    parser.add_argument("--name", default="sparse", help="name of the JSON (default sparse)")
    parser.add_argument(
        "--only", default="", help="cases whose name holds this; the others keep their figures"
    )
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of each comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="only write table and chart again")
    parser.add_argument("--no-page", action="store_true", help="leave table and chart as they are")
    args = parser.parse_args()
    kept = args.out / f"{args.name}.json"
    result = {"machine": machine(), "threads": args.threads, "size": SIZE, "rows": []}
    if kept.exists() and (args.draw or args.only):
        result = json.loads(kept.read_text())
    if not args.draw:
        nb.set_num_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        jobs = [(c.name, c.m, lambda c=c: run_case(c, args.budget)) for c in CASES]
        for name, m, job in [*jobs, (DELTA, 1, lambda: run_delta(args.budget))]:
            if args.only not in name:
                continue
            rows = job()
            others = [r for r in result["rows"] if (r["name"], r["m"]) != (name, m)]
            result["rows"] = others + rows
            kept.write_text(json.dumps(result, indent=1) + "\n")
    if not args.no_page:
        cpu = result["machine"].get("cpu", "")
        where = f"{cpu}, {result['threads']} thread(s), N = K = {result['size']}."
        body = f"![Speed over dense against density](sparse.svg)\n\n{where}\n\n{lines(result)}"
        PAGE.write_text(replace(PAGE.read_text(), "table", body))
        draw(result)


if __name__ == "__main__":
    main()
