"""``nibblas verify``: every kernel of this machine against the slow reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _info as machine
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


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    report = self_test(threads=args.threads)
    rows = []
    for name, level in machine.info()["isa"]["levels"].items():
        digest = report.levels.get(name)
        wrong = sum(failure.startswith(f"{name} ") for failure in report.failures)
        if digest is not None:
            rows.append([name, f"{wrong} wrong" if wrong else "ok", digest[:16]])
        else:
            rows.append([name, level["reason"] or "above NIBBLAS_ISA", "-"])
    out.table(["level", "result", "hash of the exact products"], rows)
    for failure in report.failures[:20]:
        out.line(failure)
    if len(report.failures) > 20:
        out.line(f"and {len(report.failures) - 20} more")
    verdict = "passed" if report.ok else "FAILED"
    out.line(f"{verdict}: {report.cases} products in {report.seconds:.1f} s")
    out.result(report.as_dict())
    return 0 if report.ok else 1
