"""What the commands print: tables, progress, JSON; rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json as _json
import math
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Failure(Exception):
    """A failure that the user can understand from its text."""


def printable(text: str) -> str:
    """Escape what a terminal would act upon: names come out of files."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def size(n: float) -> str:
    """Write bytes in binary units."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as ``4096x4096``."""
    return "x".join(str(n) for n in shape) or "scalar"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if not -6 <= places <= 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(places, 0)}f}"


def _wants_rich(stream: TextIO) -> bool:
    if os.environ.get("TERM") == "dumb":
        return False
    if not (stream.isatty() or os.environ.get("FORCE_COLOR")):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


class Out:
    """Where a command's results go.

    Parameters
    ----------
    json : bool
        Print nothing but one JSON object.
    """

    def __init__(self, json: bool) -> None:
        self.json = json

    def line(self, text: str = "") -> None:
        """Print a line, unless JSON is wanted."""
        if not self.json:
            print(printable(text))

    def note(self, text: str) -> None:
        """Tell about progress, on the error stream."""
        print(printable(text), file=sys.stderr, flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON object, if JSON is wanted."""
        if self.json:
            print(_json.dumps(_plain(value), indent=2, allow_nan=False))

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
    ) -> None:
        """Print a table; columns whose name begins with ``>`` are aligned right."""
        if self.json:
            return
        names = [c.removeprefix(">") for c in columns]
        right = [c.startswith(">") for c in columns]
        cells = [[printable(c) for c in row] for row in rows]
        widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(names))]
        if _wants_rich(sys.stdout) and _rich_table(names, right, cells, widths, title):
            return
        if title:
            print(title)
        for row in [names, ["-" * w for w in widths], *cells]:
            line = "  ".join(
                cell.rjust(w) if r else cell.ljust(w)
                for cell, w, r in zip(row, widths, right, strict=True)
            )
            print(line.rstrip())

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float, str], None]]:
        """Show progress; the value is a function that takes the amount done and what is next."""
        if _wants_rich(sys.stderr):
            with _rich_progress(label, total) as advance:
                yield advance
            return
        done = 0.0

        def advance_plain(amount: float, text: str) -> None:
            nonlocal done
            done += amount
            if text and not self.json:
                percent = 100 * done / total if total else 100
                self.note(f"{label} {percent:3.0f}%  {text}")

        yield advance_plain


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return str(value)


def _rich_table(
    names: Sequence[str],
    right: Sequence[bool],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    title: str | None,
) -> bool:
    """Draw a table where it fits; rich would cut the cells of one that does not."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if sum(widths) + 3 * len(widths) + 2 > console.width:
        return False
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name, r in zip(names, right, strict=True):
        table.add_column(name, justify="right" if r else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    return True


@contextmanager
def _rich_progress(label: str, total: float) -> Iterator[Callable[[float, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    progress = Progress(
        TextColumn("{task.fields[label]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
    with progress:
        task = progress.add_task("", total=total or 1, label=Text(label).plain)

        def advance(amount: float, text: str) -> None:
            progress.update(task, advance=amount, description=printable(text))

        yield advance
