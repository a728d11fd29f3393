"""``nibblas info``: what the package found on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import _info as machine
from ._out import Out, number

if TYPE_CHECKING:
    import argparse

NAME = "info"
HELP = "show versions, CPU levels and why one is missing"
DESCRIPTION = "Show versions, instruction sets and why one is missing, threads, GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--measure", action="store_true", help="also measure bandwidth and peaks (some seconds)"
    )


def _state(entry: dict[str, Any]) -> str:
    return "yes" if entry["available"] else f"no: {entry['reason']}"


def run(args: argparse.Namespace, out: Out) -> int:
    """Run the command."""
    found = machine.info()
    isa, threads = found["isa"], found["threads"]
    rows = [
        ("nibblas", found["nibblas"]),
        ("Python", found["python"]),
        ("NumPy", found["numpy"]),
        ("platform", found["platform"]),
        ("CPU", found["cpu"]),
        ("instruction set", isa["active"]),
    ]
    if isa["note"]:
        rows.append(("note", isa["note"]))
    rows += [(f"  {name}", _state(level)) for name, level in isa["levels"].items()]
    quota = threads["cgroup_quota"]
    limit = f", CPU quota {quota:g}" if quota is not None else ""
    rows.append(("threads", f"{threads['num_threads']} of {threads['cpus']} CPUs{limit}"))
    rows.append(("CUDA", _state(found["cuda"])))
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    if args.measure:
        from ..cost import measure

        reached = measure()
        found["measured"] = {"bandwidth": reached.bandwidth, "peaks": reached.peaks}
        rows.append(("bandwidth", f"{number(reached.bandwidth / 1e9)} GB/s"))
        rows += [(f"peak {n}", f"{number(p / 1e9)} Gop/s") for n, p in reached.peaks.items()]
    out.table(["what", "value"], rows)
    out.result(found)
    return 0
