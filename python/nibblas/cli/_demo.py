"""``nibblas demo``: every format on one matrix, in under a minute."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import formats
from .._api import matmul, quantize
from .._threads import get_num_threads
from . import _args
from ._measure import activations, default_format, medians, plot_module, transformer_weight
from ._out import Out, number, shape_text
from ._quantize import relative_error

if TYPE_CHECKING:
    import argparse

NAME = "demo"
HELP = "show bits, error and speed of each format on this machine"
DESCRIPTION = """\
Make a matrix shaped like a transformer's weight (heavy tails, rows of different size, outlier
channels) and show for each format of the table, in groups of 128: bits per weight, relative error
(Frobenius), and how many times as fast as NumPy float32 the product is at M = 1, 16 and 256, with
float32 arithmetic and with int8. What does not fit into the time is shown as '-'. Trellis and
vector codes, for which a search takes long, see a few rows, again and again."""

_M = (1, 16, 256)
_COMPUTES = ("f32", "int8")
_SECONDS = 40.0
# Weights that are quantised of formats whose codes are searched for, and vectors for each entry of
# a codebook, which would hold the weights themselves otherwise.
_SEARCHED, _PER_ENTRY = 1 << 12, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--shape",
        type=_args.shape,
        default=(2048, 2048),
        help="NxK of the weight (default: 2048x2048)",
    )
    parser.add_argument(
        "--formats",
        type=_args.listed(_args.format_name),
        help="some formats only, separated by commas",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw error and speed (needs matplotlib)")


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    plt = plot_module() if args.plot else None
    started = time.perf_counter()
    measuring = 0.0
    rows, cols = args.shape
    names = args.formats or [formats.Format(default_format(e)) for e in formats.table()]
    out.line(
        f"weight {rows}x{cols} float32 with heavy tails and outlier channels, "
        f"{get_num_threads()} threads"
    )
    w = transformer_weight(rows, cols)
    inputs = {m: activations(m, cols) for m in _M}
    results: list[dict[str, Any]] = []
    with out.progress("demo", len(names)) as advance:
        for i, fmt in enumerate(names):
            advance(0, str(fmt))
            few = _few(fmt, rows, cols)
            part = quantize(w[:few], fmt)
            q = part if few >= rows else part[np.arange(rows) % few]
            result: dict[str, Any] = {
                "format": str(fmt),
                "bits_per_weight": q.bits_per_weight,
                "relative_error": relative_error(w[:few], part),
                "speed": [],
            }
            # An even share of what quantising the others will leave, and enough for one row in any
            # case: a slow machine shows something of every format.
            now = time.perf_counter()
            quantising = (now - started - measuring) * len(names) / (i + 1)
            share = max(0.05, (_SECONDS - quantising - measuring) / (len(names) - i))
            result["speed"] = _speed(inputs, w, q, share)
            measuring += time.perf_counter() - now
            results.append(result)
            advance(1, "")
    columns = [f">{c} M={m}" for c in _COMPUTES for m in _M]
    out.table(
        ["format", ">bits", ">error", *columns],
        [
            [
                r["format"],
                number(r["bits_per_weight"], 4),
                number(r["relative_error"]),
                *(_ratio(r, c, m) for c in _COMPUTES for m in _M),
            ]
            for r in results
        ],
    )
    out.line("bits: per weight, scales included; error: |w - decoded| / |w|")
    out.line("f32, int8: the product with this arithmetic, times as fast as NumPy float32")
    if plt is not None:
        _plot(plt, results, shape_text(args.shape), args.plot)
        out.line(f"wrote {args.plot}")
    out.result(
        {"shape": [rows, cols], "threads": get_num_threads(), "results": results, "plot": args.plot}
    )
    return 0


def _few(fmt: formats.Format, rows: int, cols: int) -> int:
    """Return how many rows are quantised: some, again and again, of codes that are searched for."""
    if fmt.element.span == 1:
        return rows
    table = sum(math.prod(p.shape) for p in fmt.parts(1, 1) if p.name == "table")
    return min(rows, max(_SEARCHED, _PER_ENTRY * table, 1) // max(cols, 1) or 1)


def _speed(
    inputs: dict[int, np.ndarray[Any, Any]], w: np.ndarray[Any, Any], q: Any, share: float
) -> list[dict[str, Any]]:
    """Measure each M and compute, within about ``share`` seconds."""
    computes = [c for c in _COMPUTES if c in q.format.computes]
    end = time.perf_counter() + share
    speed = []
    took: dict[str, float] = {}
    before = 1
    for i, (m, x) in enumerate(inputs.items()):
        left = end - time.perf_counter()
        # A wider product costs less than its share: reading the weight is paid once.
        if left <= sum(took.values()) * m / before / 3:
            break
        before = m
        took = medians(
            {"numpy": partial(np.matmul, x, w.T)}
            | {c: partial(matmul, x, q.T, compute=c) for c in computes},
            left / (len(inputs) - i) / 2,
            samples=9,
        )
        speed += [
            {
                "m": m,
                "compute": c,
                "numpy_seconds": took["numpy"],
                "seconds": took[c],
                "ratio": took["numpy"] / took[c],
            }
            for c in computes
        ]
    return speed


def _find(result: dict[str, Any], compute: str, m: int) -> float | None:
    for s in result["speed"]:
        if s["compute"] == compute and s["m"] == m:
            ratio: float = s["ratio"]
            return ratio
    return None


def _ratio(result: dict[str, Any], compute: str, m: int) -> str:
    value = _find(result, compute, m)
    return "-" if value is None else f"{number(value, 2)}x"


def _plot(plt: Any, results: list[dict[str, Any]], shape: str, path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    families: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        name = formats.Format(r["format"]).element.name
        families.setdefault(name.rstrip("0123456789"), []).append(r)
    for (name, members), marker in zip(families.items(), itertools.cycle("os^Dv<>")):
        points = sorted((r["bits_per_weight"], r["relative_error"]) for r in members)
        left.plot(*zip(*points, strict=True), marker=marker, alpha=0.7, label=name)
    left.legend()
    left.set(
        yscale="log", xlabel="bits per weight", ylabel="relative error", title=f"{shape} weight"
    )
    height = 0.8 / len(_M)
    for j, m in enumerate(_M):
        values = [_find(r, "int8", m) or 0.0 for r in results]
        right.barh([i + j * height for i in range(len(results))], values, height, label=f"M = {m}")
    right.set_yticks(
        [i + height for i in range(len(results))], [r["format"] for r in results], fontsize=7
    )
    right.axvline(1, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.set(xlabel="times as fast as NumPy float32", title="compute = int8")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
