"""Operators of integers beside PyTorch's float32, products without multipliers beside NumPy.

`python benches/intops.py` prints both tables in about a minute, `--out FILE` keeps the figures,
`--check` fails where a row misses its goal. All contenders of a table take turns, and medians are
compared. Results of the products must equal the emulation's, bit for bit, before the clock starts.
`--device` runs on a CUDA device instead, beside PyTorch there: medians of graph replays over
copies that exceed the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from harness import machine

import nibblas as nb
from nibblas import approx, intops

SIDE = 4096
SCALE = 8 / 2**15
Call = Callable[[], object]
OPERATOR_GOAL, PRODUCT_GOAL = 1.0, 20.0


class Case(NamedTuple):
    """An operator, the types of its input and its result, and how to call it."""

    operator: str
    input: str
    output: str
    call: Callable[[np.ndarray], object]

    @property
    def name(self) -> str:
        return f"{self.operator} {self.input} to {self.output}"


def cases(side: int) -> list[Case]:
    """Return what is raced: results of 8 bits, of 16, and GELU of 32, each at a usual scale."""
    one, zero = np.ones(side, np.float32), np.zeros(side, np.float32)

    def softmax(output: str) -> Callable[[np.ndarray], object]:
        return lambda q: intops.softmax(q, SCALE, dtype=output)

    def gelu(output: str, scale: float) -> Callable[[np.ndarray], object]:
        return lambda q: intops.gelu(q, SCALE, out_scale=scale, dtype=output)

    def layernorm(output: str, scale: float) -> Callable[[np.ndarray], object]:
        return lambda q: intops.layernorm(q, SCALE, one, zero, out_scale=scale, dtype=output)

    made = []
    for operator, outputs in (
        ("softmax", (("uint8", softmax("uint8")), ("uint16", softmax("uint16")))),
        (
            "GELU",
            (
                ("int8", gelu("int8", 0.05)),
                ("int16", gelu("int16", 3e-4)),
                ("int32", gelu("int32", SCALE)),
            ),
        ),
        ("layer norm", (("int8", layernorm("int8", 0.03)), ("int16", layernorm("int16", 2e-4)))),
    ):
        for input in ("int32", "int16"):
            made += [Case(operator, input, output, call) for output, call in outputs]
    return made


def turns(calls: dict[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median time of each call; all take turns, the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: median(found[1:]) for name, found in times.items()}


def race_operators(
    side: int, threads: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Time every case beside PyTorch's float32 operator."""
    import torch

    x = np.random.default_rng(0).standard_normal((side, side), np.float32) * 2
    wide = np.clip(np.rint(x / SCALE), -(2**15), 2**15 - 1).astype(np.int32)
    inputs = {"int32": wide, "int16": wide.astype(np.int16)}
    t, one, zero = torch.from_numpy(x), torch.ones(side), torch.zeros(side)
    calls: dict[str, Call] = {
        "softmax": lambda: torch.softmax(t, -1),
        "GELU": lambda: torch.nn.functional.gelu(t),
        "layer norm": lambda: torch.nn.functional.layer_norm(t, (side,), one, zero),
    }
    made = cases(side)
    calls |= {c.name: (lambda c=c: c.call(inputs[c.input])) for c in made}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with nb.threads(threads):
            found = turns(calls, rounds, clock)
    finally:
        torch.set_num_threads(before)
    return [
        {
            "name": c.name,
            "threads": threads,
            "ms": 1e3 * found[c.name],
            "theirs_ms": 1e3 * found[c.operator],
            "ratio": found[c.operator] / found[c.name],
            "goal": OPERATOR_GOAL,
        }
        for c in made
    ]


def shift_add_in_numpy(a: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """Masked additions plane by plane, vectorised over rows, columns and a group."""
    group = q.format.group
    u = (q.codes().astype(np.int64) + 8).astype(np.uint8)
    wide = a.astype(np.int32)
    y = np.zeros((len(a), len(u)), np.float32)
    for g in range(u.shape[1] // group):
        part = slice(g * group, (g + 1) * group)
        d = np.zeros(y.shape, np.int32)
        for i in range(4):
            bit = ((u[:, part] >> i) & 1).astype(bool)
            d += np.where(bit[None], wide[:, None, part], 0).sum(-1, dtype=np.int32) << i
        d -= 8 * wide[:, part].sum(-1)[:, None]
        y = (d.astype(np.float64) * q.scales[:, g] + y).astype(np.float32)
    return y


def shift_in_numpy(a: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """Shifts and additions, vectorised over rows, columns and a group."""
    group = q.format.group
    u = q.codes().astype(np.int32)
    shift, sign, alive = np.maximum((u & 7) - 1, 0), np.where(u & 8, -1, 1), (u & 7) != 0
    wide = a.astype(np.int32)
    y = np.zeros((len(a), len(u)), np.float32)
    for g in range(u.shape[1] // group):
        part = slice(g * group, (g + 1) * group)
        terms = np.where(alive[:, part], (wide[:, None, part] * sign[:, part]) << shift[:, part], 0)
        d = terms.sum(-1, dtype=np.int32)
        y = (d.astype(np.float64) / 64 * q.scales[:, g] + y).astype(np.float32)
    return y


def lmul_in_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums of bit patterns, vectorised over rows and columns."""
    y = np.zeros((len(a), b.shape[1]), np.float32)
    left, right = a.view(np.uint32).astype(np.int64), b.view(np.uint32).astype(np.int64)
    for k in range(len(b)):
        x, w = left[:, k : k + 1], right[k]
        m, n = x & 0x7FFFFFFF, w & 0x7FFFFFFF
        r = m + n - 0x3F780000
        dead = (m < 0x800000) | (n < 0x800000) | (r < 0x800000)
        r = np.where(dead, 0, np.minimum(r, 0x7F7FFFFF)) | ((x ^ w) & 0x80000000)
        y += r.astype(np.uint32).view(np.float32)
    return y


def products(m: int, n: int, k: int) -> dict[str, tuple[Call, Call]]:
    """Return each emulation and what it is raced against, their results found to be equal."""
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (m, k)).astype(np.int8)
    weights = rng.standard_normal((n, k), np.float32)
    digits, powers = nb.quantize(weights, "int4_g128"), nb.quantize(weights, "pow2_4_g128")
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    made: dict[str, tuple[Call, Call]] = {
        "shift_add_matmul, int8 and int4_g128": (
            lambda: shift_add_in_numpy(a, digits),
            lambda: approx.shift_add_matmul(a, digits.T),
        ),
        "shift_matmul, int8 and pow2_4_g128": (
            lambda: shift_in_numpy(a, powers),
            lambda: approx.shift_matmul(a, powers.T),
        ),
        "lmul_matmul, float32": (
            lambda: lmul_in_numpy(x, w),
            lambda: approx.lmul_matmul(x, w),
        ),
    }
    for name, (theirs, ours) in made.items():
        np.testing.assert_array_equal(theirs(), ours(), err_msg=name)
    return made


def race_products(
    shape: tuple[int, int, int], threads: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Time every product beside its emulation."""
    rows = []
    with nb.threads(threads):
        for name, (theirs, ours) in products(*shape).items():
            found = turns({"theirs": theirs, "ours": ours}, rounds, clock)
            rows.append(
                {
                    "name": name,
                    "threads": threads,
                    "ms": 1e3 * found["ours"],
                    "theirs_ms": 1e3 * found["theirs"],
                    "ratio": found["theirs"] / found["ours"],
                    "goal": PRODUCT_GOAL,
                }
            )
    return rows


def replays(call: Callable[[Any], object], values: list[Any], rounds: int) -> float:
    """Return the median time in seconds of a call on a device; values take turns."""
    import cupy

    step = nb.cuda.graph(lambda: [call(v) for v in values])
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(rounds + 2):
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / len(values) / 1e3)
    return median(times[2:])


def torch_replays(call: Callable[[Any], object], values: list[Any], rounds: int) -> float:
    """Return the same of PyTorch's."""
    import torch

    def work() -> None:
        for v in values:
            call(v)

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(values) / 1e3)
    return median(times[2:])


def race_on_device(side: int, rounds: int) -> list[dict[str, Any]]:
    """Time every case on a CUDA device beside PyTorch's float32 and float16 there."""
    import cupy
    import torch

    copies = 4
    x = np.random.default_rng(0).standard_normal((side, side), np.float32) * 2
    wide = np.clip(np.rint(x / SCALE), -(2**15), 2**15 - 1).astype(np.int32)
    calls: dict[str, Callable[[Any], object]] = {
        "softmax": lambda v: torch.softmax(v, -1),
        "GELU": torch.nn.functional.gelu,
        "layer norm": lambda v: torch.nn.functional.layer_norm(v, (side,), v[0], v[1]),
    }
    theirs: dict[str, dict[str, float]] = {name: {} for name in calls}
    for kind in ("float32", "float16"):
        t = [torch.from_numpy(x).cuda().to(getattr(torch, kind)) for _ in range(copies)]
        for name, call in calls.items():
            theirs[name][kind] = torch_replays(call, t, rounds)
    rows = []
    for c in cases(side):
        q = [cupy.asarray(wide.astype(c.input)) for _ in range(copies)]
        took = replays(c.call, q, rounds)
        moved = x.size * (np.dtype(c.input).itemsize + np.dtype(c.output).itemsize)
        both = theirs[c.operator]
        rows.append(
            {
                "name": c.name,
                "us": 1e6 * took,
                "terabytes_per_second": moved / took / 1e12,
                "torch_float32": both["float32"] / took,
                "torch_float16": both["float16"] / took,
            }
        )
    return rows


def race_products_on_device(side: int, rounds: int) -> list[dict[str, Any]]:
    """Time products on a CUDA device beside PyTorch's of the same size."""
    import cupy
    import torch

    rng = np.random.default_rng(0)
    x, w = (torch.from_numpy(v).cuda() for v in rng.standard_normal((2, side, side), np.float32))
    a, b = (torch.from_numpy(v).cuda() for v in rng.integers(-99, 99, (2, side, side), np.int8))
    cx, cw, ca, cb = (cupy.from_dlpack(v) for v in (x, w, a, b))
    raced: list[tuple[str, Callable[[Any], object], str, Callable[[Any], object]]] = [
        ("lmul_matmul, float32", lambda _: approx.lmul_matmul(cx, cw), "float32", lambda _: x @ w),
        (
            "intops.matmul, int8",
            lambda _: intops.matmul(ca, cb.T),
            "int8",
            lambda _: torch._int_mm(a, b.T),
        ),
    ]
    rows = []
    for name, ours, kind, other in raced:
        took, beside = replays(ours, [None], rounds), torch_replays(other, [None], rounds)
        row = {"name": name, "us": 1e6 * took, "tera_operations": 2 * side**3 / took / 1e12}
        rows.append(row | {f"torch_{kind}": beside / took})
    return rows


def on_device(side: int, rounds: int, out: Path | None) -> int:
    """Print and keep the tables of a device."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    operators, multiplied = race_on_device(side, rounds), race_products_on_device(side, rounds)
    print(f"\n{side} x {side} on {name}\n")
    print("| | us | TB/s | PyTorch float32 | float16 |\n|---|---:|---:|---:|---:|")
    for r in operators:
        beside = f"{r['torch_float32']:.2f}x | {r['torch_float16']:.2f}x"
        print(f"| {r['name']} | {r['us']:.1f} | {r['terabytes_per_second']:.2f} | {beside} |")
    for r in multiplied:
        print({key: v if isinstance(v, str) else round(v, 3) for key, v in r.items()})
    if out:
        report = {"device": name, "operators": operators, "products": multiplied}
        out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def table(rows: list[dict[str, Any]], theirs: str) -> str:
    """Write rows as Markdown, one line for a name and a column for each number of threads."""
    counts = sorted({r["threads"] for r in rows})
    head = [
        f"{'1 thread' if t == 1 else f'{t} threads'}, ms | {theirs}, ms | ratio" for t in counts
    ]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "---:|---:|---:|" * len(counts)]
    for name in dict.fromkeys(r["name"] for r in rows):
        cells = [
            f"{r['ms']:.3g} | {r['theirs_ms']:.3g} | {r['ratio']:.2f}x"
            for t in counts
            for r in rows
            if r["name"] == name and r["threads"] == t
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=SIDE, help="rows and columns of the operators")
    parser.add_argument("--threads", default="", help="such as 1,8; one and all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time with one thread: for a machine that others use; not for several threads",
    )
    parser.add_argument("--device", action="store_true", help="on a CUDA device")
    parser.add_argument("--check", action="store_true", help="fail where a row misses its goal")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if args.device:
        return on_device(args.size, 4 * args.rounds, args.out)
    counts = [int(t) for t in args.threads.split(",") if t] or sorted({1, nb.get_num_threads()})
    if args.cpu_time and counts != [1]:
        counts = [1]
    clock = time.process_time if args.cpu_time else time.perf_counter
    operators: list[dict[str, Any]] = []
    emulated: list[dict[str, Any]] = []
    for threads in counts:
        try:
            operators += race_operators(args.size, threads, args.rounds, clock)
        except ImportError:
            print("PyTorch is missing: pip install torch", file=sys.stderr)
        emulated += race_products((64, 256, 512), threads, args.rounds, clock)
    if operators:
        print(f"\n{args.size} x {args.size} beside PyTorch's float32\n")
        print(table(operators, "PyTorch"))
    print("\n(64 x 512) times (512 x 256) beside the same arithmetic in vectorised NumPy\n")
    print(table(emulated, "NumPy"))
    if args.out:
        report = {"machine": machine(), "operators": operators, "products": emulated}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    missed = [r for r in operators + emulated if r["ratio"] < r["goal"]]
    for r in missed:
        print(f"below {r['goal']:g}x: {r['name']}, {r['threads']} threads: {r['ratio']:.2f}x")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
