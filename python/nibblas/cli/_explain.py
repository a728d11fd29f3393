"""``nibblas explain``: which kernel a product would use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._api import explain, quantize
from . import _args
from ._out import Out

if TYPE_CHECKING:
    import argparse

NAME = "explain"
HELP = "say how a product would be computed"
DESCRIPTION = """\
Print the plan of x @ qw.T on this machine: kernel, blocking, threads, floor. Nothing is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--shape",
        type=_args.shape,
        default=(4096, 4096),
        help="NxK of the weight (default: 4096x4096)",
    )
    parser.add_argument(
        "-f", "--format", type=_args.format_name, default="int4_g128", help="of the weight"
    )
    parser.add_argument(
        "-m",
        "--m",
        type=_args.listed(_args.positive),
        default=[1],
        help="rows of x, such as 1,16,256",
    )
    parser.add_argument("--compute", default="f32", help="such as f32 or int8 (default: f32)")
    parser.add_argument("--threads", type=_args.positive, metavar="N", help="at most N threads")


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    rows, cols = args.shape
    fmt = args.format
    q = quantize(np.zeros((rows, cols), np.float32), fmt)
    plans: list[dict[str, Any]] = []
    for i, m in enumerate(args.m):
        x = np.broadcast_to(np.float32(0), (m, cols))
        plan = explain(x, q.T, compute=args.compute, threads=args.threads)
        plans.append({**plan.fields(), "m": m})
        if i:
            out.line()
        for line in str(plan).splitlines():
            out.line(line)
    out.result({"format": str(fmt), "shape": [rows, cols], "plans": plans})
    return 0
