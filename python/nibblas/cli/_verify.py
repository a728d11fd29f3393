"""``nibblas verify``: every kernel of this machine against the slow reference."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import _info as machine
from ..formats import table
from ..testing import self_test
from . import _args
from ._out import Out

if TYPE_CHECKING:
    import argparse

NAME = "verify"
HELP = "check every kernel that runs on this machine"
DESCRIPTION = """\
Multiply a fixed corpus at every instruction-set level of this machine and compare each result with
the slow reference, bit for bit. The hash is the same on every machine. Exit code 1 if anything
differs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--threads", type=_args.positive, metavar="N", help="at most N threads")


def _kernel(failure: str) -> tuple[str, str]:
    """Return the level and the compute of a line ``level format-compute-shape: ...``."""
    level, _, case = failure.partition(" ")
    return level, case.split(":")[0].split("-")[1]


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    report = self_test(threads=args.threads)
    computes = list(dict.fromkeys(c for e in table() for c in e.computes))
    wrong = Counter(_kernel(failure) for failure in report.failures)
    rows = []
    for name, level in machine.info()["isa"]["levels"].items():
        digest = report.levels.get(name)
        if digest is not None:
            cells = [f"{wrong[name, c]} wrong" if wrong[name, c] else "ok" for c in computes]
            rows.append([name, *cells, digest[:16]])
        else:
            reason = level["reason"] or "above NIBBLAS_ISA"
            rows.append([name, *("-" for _ in computes), reason])
    out.table(["level", *computes, "hash of the exact products"], rows)
    for failure in report.failures[:20]:
        out.line(failure)
    if len(report.failures) > 20:
        out.line(f"and {len(report.failures) - 20} more")
    verdict = "passed" if report.ok else "FAILED"
    out.line(f"{verdict}: {report.cases} products in {report.seconds:.1f} s")
    out.result(report.as_dict())
    return 0 if report.ok else 1
