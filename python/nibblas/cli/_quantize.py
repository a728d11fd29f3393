"""``nibblas quantize``: a checkpoint in, a smaller one out, tensor by tensor."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .._api import quantize
from .._sparse import pattern_of, prune
from ..io import (
    VERSION,
    Spec,
    TensorFile,
    TensorWriter,
    check_collision,
    matrix_metadata,
    matrix_specs,
)
from ..quantizers import METHODS
from . import _args
from ._out import Failure, Out, number, shape_text, size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ..formats import Format
    from ..io import Entry
    from ..qtensor import QTensor

NAME = "quantize"
HELP = "quantise the matrices of a safetensors file"
DESCRIPTION = """\
Quantise every 2-D floating tensor of a safetensors file and keep the others as they are.

The file is read and written tensor by tensor, so that memory holds about one tensor; the output
appears whole when it is complete, or not at all. Patterns are shell patterns on tensor names (*, ?,
[abc]) and may be repeated; what an --exclude matches is kept although an --include matches it.

A sparse format (int8_bitmap, int4_g32_bsr32, ...) prunes first: the smallest units are set to 0,
until the fraction --density is left. How much a sparse tensor stores is known only when it has been
quantised, so those are quantised twice: once to lay the file out, once to write it."""

_FLOATS = ("F16", "BF16", "F32", "F64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("input", help="safetensors file")
    parser.add_argument(
        "-f", "--format", type=_args.format_name, required=True, help="such as int4_g128"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="output file; may be the input")
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="quantise these names only"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep these names as they are",
    )
    parser.add_argument("--method", choices=METHODS, default="rtn", help="quantiser (default: rtn)")
    parser.add_argument(
        "--density",
        type=_args.fraction,
        metavar="D",
        help="fraction of the units that a sparse format keeps, largest magnitudes first (default: "
        "two of four; of other patterns what is not 0)",
    )
    parser.add_argument("--threads", type=_args.positive, metavar="N", help="at most N threads")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, write nothing"
    )


def chosen(entry: Entry, include: list[str], exclude: list[str]) -> bool:
    """Whether a tensor is to be quantised."""
    return (
        entry.format is None
        and entry.dtype in _FLOATS
        and len(entry.shape) == 2
        and 0 not in entry.shape
        and (not include or any(fnmatchcase(entry.name, p) for p in include))
        and not any(fnmatchcase(entry.name, p) for p in exclude)
    )


def relative_error(w: NDArray[Any], q: QTensor) -> float:
    """``|w - decoded| / |w|`` (Frobenius), decoding a few rows at a time."""
    rows, cols = w.shape
    step = max(1, (1 << 20) // cols)
    error = norm = 0.0
    for start in range(0, rows, step):
        part = w[start : start + step].astype(np.float64)
        norm += float(np.vdot(part, part))
        part -= q[start : start + step].dequantize()
        error += float(np.vdot(part, part))
    return float(np.sqrt(error / norm)) if norm else 0.0


@contextlib.contextmanager
def _cleaned_on_terminate() -> Iterator[None]:
    """Let a polite kill unwind, so that the temporary file is removed."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    if args.out is None and not args.dry_run:
        print("nibblas quantize: --out FILE is needed (or --dry-run)", file=sys.stderr)
        return 2
    fmt: Format = args.format
    wrong = _wrong_density(fmt, args.density)
    if wrong is not None:
        print(f"nibblas quantize: {wrong}", file=sys.stderr)
        return 2
    file = TensorFile(args.input)
    todo = {e.name for e in file.entries.values() if chosen(e, args.include, args.exclude)}
    if not todo:
        raise Failure(f"{args.input}: no 2-D floating tensor to quantise among {len(file.entries)}")
    start = time.perf_counter()
    kept: dict[str, int] = {}
    if fmt.structure is not None:
        for name in sorted(todo):
            kept[name] = _quantized(file, file.entries[name], args)[1]._storage.codes.size
    specs, metadata = _announce(file, todo, fmt, kept)
    bytes_out: dict[str, int] = {}
    for name in todo:
        rows, cols = file.entries[name].shape
        announced = matrix_specs(name, fmt, rows, cols, kept=kept.get(name))
        bytes_out[name] = sum(_nbytes(s) for s in announced)
    report: list[dict[str, Any]] = []
    if args.dry_run:
        for entry in file.entries.values():
            report.append(_row(entry, fmt, bytes_out.get(entry.name), None))
    else:
        total = sum(e.nbytes for e in file.entries.values())
        with (
            _cleaned_on_terminate(),
            TensorWriter(args.out, specs, metadata) as writer,
            out.progress("quantize", total) as advance,
        ):
            for entry in file.entries.values():
                advance(0, f"{entry.name} {shape_text(entry.shape)}")
                error = None
                if entry.name in todo:
                    error = _write_one(file, entry, args, writer)
                else:
                    for stored in entry.parts:
                        for piece in file.pieces(stored):
                            writer.write(stored, piece)
                advance(entry.nbytes, "")
                report.append(_row(entry, fmt, bytes_out.get(entry.name), error))
    _print(args, out, report, time.perf_counter() - start)
    return 0


def _announce(
    file: TensorFile, todo: set[str], fmt: Format, kept: dict[str, int]
) -> tuple[list[Spec], dict[str, str]]:
    """Every tensor of the output and its metadata, known before any number is written."""
    ours = "nibblas.version" in file.metadata
    # Keys that would read as descriptions of matrices stay behind; the rest is the author's.
    metadata = {
        key: value
        for key, value in file.metadata.items()
        if ours or not key.endswith((".format", ".shape", ".transposed"))
    }
    metadata["nibblas.version"] = VERSION
    specs: list[Spec] = []
    stored = {part for e in file.entries.values() if e.name not in todo for part in e.parts}
    for entry in file.entries.values():
        if entry.name not in todo:
            specs += [(part, file.dtype(part), file.shape(part)) for part in entry.parts]
            continue
        rows, cols = entry.shape
        specs += matrix_specs(entry.name, fmt, rows, cols, kept=kept.get(entry.name))
        metadata |= matrix_metadata(entry.name, fmt, rows, cols)
        try:
            check_collision(entry.name, file.entries, stored)
        except ValueError as e:
            raise Failure(f"{e}: --exclude one of them") from None
    return specs, metadata


def _nbytes(spec: Spec) -> int:
    n = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}[spec[1]]
    for length in spec[2]:
        n *= length
    return n


def _wrong_density(fmt: Format, density: float | None) -> str | None:
    """Say what is wrong with a density for a format; None if nothing is."""
    if density is None:
        return None
    if fmt.structure is None:
        return f"--density is for sparse formats such as {fmt}_bitmap; {fmt} keeps every entry"
    if fmt.structure == "2of4" and density != 0.5:
        return f"2of4 keeps half of the entries: --density is 0.5, got {density:g}"
    return None


def _pruned(w: NDArray[Any], fmt: Format, density: float | None) -> NDArray[Any]:
    """Prune a matrix to what the structure of a format keeps."""
    if fmt.structure is None or (density is None and fmt.structure != "2of4"):
        return w
    pattern = pattern_of(fmt)
    if pattern.startswith("block"):
        return prune(w, pattern, density)
    # Units compete within their row: a few rows at a time need little memory.
    step = max(1, (1 << 20) // w.shape[1])
    out = np.empty_like(w)
    for i in range(0, len(w), step):
        out[i : i + step] = prune(w[i : i + step], pattern, density)
    return out


def _quantized(
    file: TensorFile, entry: Entry, args: argparse.Namespace
) -> tuple[NDArray[Any], QTensor]:
    """Return a tensor as it was, and quantised."""
    w = file.floats(entry.name)
    try:
        pruned = _pruned(w, args.format, args.density)
        return w, quantize(pruned, args.format, method=args.method, threads=args.threads)
    except ValueError as e:
        raise Failure(f"tensor '{entry.name}': {e} (--exclude keeps it as it is)") from None


def _write_one(
    file: TensorFile, entry: Entry, args: argparse.Namespace, writer: TensorWriter
) -> float:
    """Quantise and write a tensor, and forget it before the next one is read."""
    w, q = _quantized(file, entry, args)
    writer.write_qtensor(entry.name, q)
    return relative_error(w, q)


def _row(entry: Entry, fmt: Format, bytes_out: int | None, error: float | None) -> dict[str, Any]:
    done = bytes_out is not None
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "from": entry.dtype if entry.format is None else str(entry.format),
        "format": str(fmt) if done else None,
        "bytes_in": entry.nbytes,
        "bytes_out": bytes_out if done else entry.nbytes,
        "relative_error": error,
    }


def _print(
    args: argparse.Namespace, out: Out, report: list[dict[str, Any]], seconds: float
) -> None:
    bytes_in = sum(r["bytes_in"] for r in report)
    bytes_out = sum(r["bytes_out"] for r in report)
    count = sum(r["format"] is not None for r in report)
    out.table(
        ["tensor", "shape", "from", "to", ">before", ">after", ">error"],
        [
            [
                r["name"],
                shape_text(r["shape"]),
                r["from"],
                r["format"] or "kept",
                size(r["bytes_in"]),
                size(r["bytes_out"]),
                number(r["relative_error"]),
            ]
            for r in report
        ],
    )
    ratio = bytes_in / bytes_out if bytes_out else 1.0
    out.line(
        f"{count} of {len(report)} tensors to {args.format}: {size(bytes_in)} to {size(bytes_out)} "
        f"({ratio:.2f}x smaller)" + ("" if args.dry_run else f" in {seconds:.1f} s")
    )
    out.line("nothing was written (--dry-run)" if args.dry_run else f"wrote {args.out}")
    out.result(
        {
            "input": args.input,
            "output": None if args.dry_run else args.out,
            "format": str(args.format),
            "method": args.method,
            "density": args.density,
            "tensors": report,
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "seconds": None if args.dry_run else seconds,
        }
    )
