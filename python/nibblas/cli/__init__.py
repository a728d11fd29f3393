"""The command ``nibblas``.

Needs NumPy alone; tables and progress bars are drawn by rich where it is installed and the output
is a terminal. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from . import _bench, _demo, _explain, _info, _inspect, _quantize, _report, _verify
from ._out import Failure, Out, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = (_info, _quantize, _inspect, _explain, _bench, _report, _verify, _demo)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line and a hint, not with the whole synopsis."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = _Parser(prog="nibblas", description="Linear algebra for numbers smaller than a byte.")
    parser.add_argument("--version", action="version", version=f"nibblas {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for module in _COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object instead of text"
        )
        command.set_defaults(run=module.run, command=module.NAME)
    return parser


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return f"no such name: {error.args[0]}"
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets an escape, not a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        code: int = args.run(args, Out(json=args.json))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("nibblas: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`nibblas info | head -1`); what is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Failure, ValueError, TypeError, KeyError, OSError, ImportError, MemoryError) as error:
        print(f"nibblas {args.command}: {printable(_one_line(error))}", file=sys.stderr)
        return 1
    return code
