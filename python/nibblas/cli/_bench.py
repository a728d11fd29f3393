"""``nibblas bench``: products beside NumPy's, in turns."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .._api import matmul, quantize
from .._threads import get_num_threads
from . import _args
from ._measure import activations, blas_threads, medians, plot_module, transformer_weight
from ._out import Out, number, shape_text

if TYPE_CHECKING:
    import argparse

NAME = "bench"
HELP = "time products beside NumPy float32"
DESCRIPTION = """\
Time x @ qw.T beside x @ w.T in NumPy float32, in turns, on weights that stay in the caches where
they fit. Medians; 'ratio' is NumPy's time over ours. With threadpoolctl installed NumPy's BLAS gets
as many threads as nibblas; without it, it has its own number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--shapes",
        type=_args.listed(_args.shape),
        default=[(4096, 4096)],
        help="NxK of the weights, separated by commas (default: 4096x4096)",
    )
    parser.add_argument(
        "--formats",
        type=_args.listed(_args.format_name),
        default=[_args.format_name(n) for n in ("int4_g128", "int8")],
        help="separated by commas (default: int4_g128,int8)",
    )
    parser.add_argument(
        "-m",
        "--m",
        type=_args.listed(_args.positive),
        default=[1, 16, 64, 256],
        help="rows of x (default: 1,16,64,256)",
    )
    parser.add_argument(
        "--compute", type=_args.listed(str), default=["f32", "int8"], help="default: f32,int8"
    )
    parser.add_argument(
        "--threads",
        type=_args.listed(_args.positive),
        metavar="N",
        help="one number or several (default: all)",
    )
    parser.add_argument(
        "--seconds", type=_args.positive, default=1, help="time to spend on each line (default: 1)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (needs matplotlib)")


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    plt = plot_module() if args.plot else None
    counts = args.threads or [get_num_threads()]
    results: list[dict[str, Any]] = []
    cells = len(args.shapes) * len(args.formats) * len(args.compute) * len(counts) * len(args.m)
    with out.progress("bench", cells) as advance:
        for rows, cols in args.shapes:
            w = transformer_weight(rows, cols)
            inputs = {m: activations(m, cols) for m in args.m}
            for fmt in args.formats:
                q = quantize(w, fmt)
                for compute in args.compute:
                    for threads in counts:
                        for m, x in inputs.items():
                            advance(0, f"{fmt} {compute} {rows}x{cols} M={m} threads={threads}")
                            with blas_threads(threads) as limited:
                                took = medians(
                                    {
                                        "numpy": partial(np.matmul, x, w.T),
                                        "nibblas": partial(
                                            matmul, x, q.T, compute=compute, threads=threads
                                        ),
                                    },
                                    args.seconds,
                                )
                            ops = 2 * m * rows * cols
                            results.append(
                                {
                                    "shape": [rows, cols],
                                    "format": str(fmt),
                                    "compute": compute,
                                    "threads": threads,
                                    "numpy_threads": limited,
                                    "m": m,
                                    "numpy_seconds": took["numpy"],
                                    "nibblas_seconds": took["nibblas"],
                                    "ratio": took["numpy"] / took["nibblas"],
                                    "gops": ops / took["nibblas"] / 1e9,
                                    "weight_gb_per_s": q.nbytes / took["nibblas"] / 1e9,
                                }
                            )
                            advance(1, "")
    out.table(
        [
            "format",
            "compute",
            "shape",
            ">threads",
            ">M",
            ">NumPy ms",
            ">ms",
            ">ratio",
            ">Gop/s",
            ">GB/s",
        ],
        [
            [
                r["format"],
                r["compute"],
                shape_text(r["shape"]),
                str(r["threads"]),
                str(r["m"]),
                number(1e3 * r["numpy_seconds"]),
                number(1e3 * r["nibblas_seconds"]),
                number(r["ratio"]),
                number(r["gops"]),
                number(r["weight_gb_per_s"]),
            ]
            for r in results
        ],
    )
    if plt is not None:
        _plot(plt, results, args.plot)
        out.line(f"wrote {args.plot}")
    out.result({"results": results, "plot": args.plot})
    return 0


def _plot(plt: Any, results: list[dict[str, Any]], path: str) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        label = f"{r['format']} {r['compute']} {shape_text(r['shape'])}, {r['threads']} threads"
        lines.setdefault(label, []).append(r)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, points in lines.items():
        axes.plot([p["m"] for p in points], [p["ratio"] for p in points], marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="M", ylabel="times as fast as NumPy float32")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
