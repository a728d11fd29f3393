"""``nibblas report``: what a model costs in a format, or a transformer layer under every scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import cost
from ..io import TensorFile
from . import _args
from ._measure import plot_module
from ._out import Failure, Out, number, size

if TYPE_CHECKING:
    import argparse

NAME = "report"
HELP = "count operations, bytes, time floors and energy of a model or a layer"
DESCRIPTION = """\
Count what the matrices of a safetensors file cost in a format: bytes by component, operations, the
time floor of this machine (measured, or given with --bandwidth and --peak). Without a file: one
transformer layer under every scheme, with the energy that published tables give."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", nargs="?", help="safetensors file; a transformer layer without it")
    parser.add_argument("-f", "--format", type=_args.format_name, default="int4_g128")
    parser.add_argument("-m", "--m", type=_args.positive, default=1, help="tokens at a time")
    parser.add_argument("--compute", default="int8", help="which peak holds (default: int8)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="instead of measuring it")
    parser.add_argument("--peak", type=float, metavar="GOP/S", help="instead of measuring it")
    parser.add_argument("--energy", choices=sorted(cost.ENERGY), default="45nm", help="table")
    parser.add_argument("--hidden", type=_args.positive, default=4096, help="of the layer")
    parser.add_argument("--ffn", type=_args.positive, default=11008, help="of the layer")
    parser.add_argument("--heads", type=_args.positive, default=32, help="of the layer")
    parser.add_argument("--context", type=_args.positive, default=2048, help="of the layer")
    parser.add_argument("--plot", metavar="FILE", help="draw the figures (needs matplotlib)")


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    return _layer(args, out) if args.file is None else _model(args, out)


def _layer(args: argparse.Namespace, out: Out) -> int:
    plt = plot_module() if args.plot else None
    rows: list[dict[str, Any]] = []
    for name, scheme in cost.SCHEMES.items():
        c = cost.layer(
            name,
            hidden=args.hidden,
            ffn=args.ffn,
            heads=args.heads,
            tokens=args.m,
            context=args.context,
        )
        e = cost.energy(c, args.energy)
        rows.append(
            {
                "scheme": name,
                "about": scheme.about,
                "operations": c.operations,
                "bytes": c.bytes,
                "energy_pj": e,
                "arithmetic_uj": sum(v for n, v in e.items() if n != "memory") / 1e6,
                "memory_uj": e["memory"] / 1e6,
            }
        )
    kinds = ["mul", "add", "shift", "bit"]

    def millions(row: dict[str, Any], kind: str) -> str:
        return number(sum(v for n, v in row["operations"].items() if kind in n) / 1e6)

    out.table(
        ["scheme", *(f">M {k}" for k in kinds), ">MB", ">arithmetic uJ", ">memory uJ"],
        [
            [
                r["scheme"],
                *(millions(r, k) for k in kinds),
                number(sum(r["bytes"].values()) / 1e6),
                number(r["arithmetic_uj"]),
                number(r["memory_uj"]),
            ]
            for r in rows
        ],
    )
    table = cost.ENERGY[args.energy]
    out.line(f"energy at {table.name}: {table.source}")
    for kind, source in table.sources.items():
        if source != table.source:
            out.line(f"  {kind}, {table.operations[kind]:.3g} pJ: {source}")
    if plt is not None:
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        axes.bar([r["scheme"] for r in rows], [r["arithmetic_uj"] for r in rows])
        axes.set(yscale="log", ylabel=f"arithmetic, microjoules at {table.name}")
        axes.tick_params(axis="x", rotation=30)
        figure.savefig(args.plot, dpi=120)
        plt.close(figure)
        out.line(f"wrote {args.plot}")
    out.result({"layer": rows, "tokens": args.m, "context": args.context, "table": table._asdict()})
    return 0


def _machine(args: argparse.Namespace) -> cost.Machine:
    if args.bandwidth and args.peak:
        return cost.Machine(args.bandwidth * 1e9, {args.compute: args.peak * 1e9})
    found = cost.measure(seconds=0.3)
    peaks = dict(found.peaks)
    if args.peak:
        peaks[args.compute] = args.peak * 1e9
    return cost.Machine(args.bandwidth * 1e9 if args.bandwidth else found.bandwidth, peaks)


def _model(args: argparse.Namespace, out: Out) -> int:
    plt = plot_module() if args.plot else None
    file = TensorFile(args.file)
    matrices = [e for e in file.entries.values() if len(e.shape) == 2 and 0 not in e.shape]
    if not matrices:
        raise Failure(f"{args.file}: no matrix to report on")
    machine = _machine(args)
    rows: list[dict[str, Any]] = []
    for entry in sorted(matrices, key=lambda e: e.name):
        n, k = entry.shape
        name = str(args.format if entry.format is None else entry.format)
        r = cost.roofline(args.m, n, k, name, compute=args.compute, machine=machine)
        # Integer products with scales after each group, or weights decoded before float16 ones.
        scheme = "w4a8" if args.compute.startswith("int") else "w4a16"
        spent = cost.energy(cost.product(args.m, n, k, scheme, format=name), args.energy)
        row = {"name": entry.name, "format": name, "shape": [n, k], **r._asdict()}
        rows.append({**row, "energy_pj": spent})
    out.table(
        ["matrix", "format", "shape", ">weights", ">scales", ">ops/byte", "bound", ">floor us"],
        [
            [
                r["name"],
                r["format"],
                f"{r['shape'][0]}x{r['shape'][1]}",
                size(r["bytes"]["weights"]),
                size(r["bytes"]["scales"] + r["bytes"].get("zeros", 0)),
                number(r["intensity"]),
                r["bound"],
                number(1e6 * r["floor_seconds"]),
            ]
            for r in rows
        ],
    )
    total = sum(sum(r["bytes"].values()) for r in rows)
    floor = sum(r["floor_seconds"] for r in rows)
    operations = sum(r["operations"] for r in rows)
    out.line(
        f"{len(rows)} matrices, M={args.m}: {size(total)} moved, {number(operations / 1e9)} Gop, "
        f"floor {number(1e3 * floor)} ms at {number(machine.bandwidth / 1e9)} GB/s and "
        f"{number(machine.peaks[args.compute] / 1e9)} Gop/s"
    )
    memory = sum(r["energy_pj"]["memory"] for r in rows) / 1e6
    arithmetic = sum(sum(r["energy_pj"].values()) for r in rows) / 1e6 - memory
    table = cost.ENERGY[args.energy]
    out.line(
        f"energy at {table.name}: arithmetic {number(arithmetic)} uJ, memory {number(memory)} uJ "
        f"({table.source})"
    )
    if plt is not None:
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        peak = machine.peaks[args.compute]
        turn = peak / machine.bandwidth
        span = [min(0.1, turn / 10), turn, turn * 10]
        axes.plot(span, [min(i * machine.bandwidth, peak) / 1e9 for i in span], color="black")
        reach = [min(r["intensity"] * machine.bandwidth, peak) / 1e9 for r in rows]
        axes.scatter([r["intensity"] for r in rows], reach)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s at most")
        figure.savefig(args.plot, dpi=120)
        plt.close(figure)
        out.line(f"wrote {args.plot}")
    out.result(
        {
            "file": args.file,
            "m": args.m,
            "compute": args.compute,
            "matrices": rows,
            "bytes": total,
            "operations": operations,
            "floor_seconds": floor,
            "arithmetic_uj": arithmetic,
            "memory_uj": memory,
            "table": table._asdict(),
            "machine": machine._asdict(),
        }
    )
    return 0
