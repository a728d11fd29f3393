"""``nibblas inspect``: what a checkpoint holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..io import TensorFile
from ._out import Out, number, shape_text, size

if TYPE_CHECKING:
    import argparse

NAME = "inspect"
HELP = "list the tensors of a safetensors file"
DESCRIPTION = "List the tensors of a safetensors file: shapes, formats, bytes, bits per weight."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", help="safetensors file")
    parser.add_argument(
        "--check", action="store_true", help="also read the matrices and check codes and scales"
    )


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    file = TensorFile(args.file)
    entries = sorted(file.entries.values(), key=lambda e: e.name)
    if args.check:
        for entry in entries:
            if entry.format is not None:
                file.qtensor(entry)
    rows: list[dict[str, Any]] = []
    for e in entries:
        count = math.prod(e.shape)
        rows.append(
            {
                "name": e.name,
                "format": None if e.format is None else str(e.format),
                "dtype": e.dtype if e.format is None else None,
                "shape": list(e.shape),
                "bytes": e.nbytes,
                "bits_per_weight": 8 * e.nbytes / count if count else None,
            }
        )
    out.table(
        ["tensor", "type", "shape", ">bytes", ">bits/weight"],
        [
            [
                str(r["name"]),
                str(r["format"] or r["dtype"]),
                shape_text(e.shape),
                size(e.nbytes),
                number(r["bits_per_weight"]),
            ]
            for r, e in zip(rows, entries, strict=True)
        ],
    )
    total = sum(e.nbytes for e in entries)
    coded = sum(e.format is not None for e in entries)
    weights = sum(math.prod(e.shape) for e in entries)
    mean = 8 * total / weights if weights else None
    out.line(
        f"{len(entries)} tensors, {coded} of them quantised: {weights} weights in {size(total)}, "
        f"{number(mean)} bits per weight"
    )
    out.result(
        {
            "file": args.file,
            "metadata": file.metadata,
            "tensors": rows,
            "bytes": total,
            "weights": weights,
            "bits_per_weight": mean,
        }
    )
    return 0
