"""What a run on a GPU leaves behind: JSON, a table, and the goals beside what was reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from report import table

__all__ = ["GOALS", "Goal", "goals", "stem", "write"]


def stem(device: str, suffix: str = "") -> str:
    """Return the name of a run's files."""
    return device.lower().replace(" ", "-") + suffix


def write(
    folder: Path,
    device: str,
    rows: list[dict[str, Any]],
    head: list[str],
    columns: dict[str, Callable[[dict[str, Any]], str]],
    suffix: str = "",
    tail: str = "",
    more: dict[str, Any] | None = None,
) -> None:
    """Write rows as JSON and as a table; `columns` say what a row has under each title.

    `tail` goes below the table, `more` into the JSON.
    """
    import cupy

    folder.mkdir(parents=True, exist_ok=True)
    record = {"device": device, "cupy": cupy.__version__, "rows": rows, **(more or {})}
    name = stem(device, suffix)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    body = table(list(columns), [[cell(r) for cell in columns.values()] for r in rows])
    (folder / f"{name}.md").write_text("\n".join([*head, "", body, ""]) + tail)


class Goal(NamedTuple):
    """What rows of one name are to reach."""

    row: str
    shapes: tuple[tuple[int, int], ...]
    m: tuple[int, ...]
    measure: str
    """``x``: times cuBLAS float16; ``tops``: T/s; ``us``: microseconds, where less is better."""
    reach: float
    aim: float


S4, S14, D14, S28 = (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)
GOALS = [
    Goal("int4_g128 f32", (S28,), (1, 16), "x", 3.3, 3.9),
    Goal("int4_g128 f32", (S14, D14), (1, 16), "x", 2.5, 3.2),
    Goal("int4_g128 f32", (S4,), (1, 16), "x", 1.9, 2.6),
    Goal("int4_g128 f32", (S14,), (64,), "x", 2.0, 2.8),
    Goal("int4_g128 f32", (S14,), (128,), "x", 1.6, 2.2),
    Goal("int4_g128 f32", (S14,), (1024, 4096), "x", 0.85, 1.1),
    Goal("int2_g128 f32", (S28,), (1, 8), "x", 4.5, 6.5),
    Goal("bipolar1_g128 f32", (S28,), (1, 8), "x", 5.4, 9),
    Goal("nf4_g128 f32", (S28,), (1, 16), "x", 2.8, 3.6),
    Goal("mxfp4 f32", (S28,), (1, 16), "x", 2.8, 3.6),
    Goal("e3m2_g128 f32", (S28,), (1, 16), "x", 2.1, 2.6),
    Goal("mxfp6_e3m2 f32", (S28,), (1, 16), "x", 2.1, 2.6),
    *(
        Goal(f"{name} int8{ready}", (S4, S14, D14, S28), (1024,), "tops", *marks)
        for ready in (", quantised before", "")
        for name, marks in [
            ("int4_g128", (800, 1300)),
            ("int4_g128_si8", (1200, 1500)),
            ("int4", (1200, 1500)),
        ]
    ),
    Goal("int8 int8", (S4, S14), (4096,), "tops", 1000, 1400),
    Goal(
        "W1A1 bit planes, raw sums", ((4096, 4096), (8192, 8192)), (4096, 8192), "tops", 3000, 9000
    ),
    Goal(
        "W2A2 bit planes, raw sums", ((4096, 4096), (8192, 8192)), (4096, 8192), "tops", 900, 2500
    ),
    Goal("W2A2 bit planes, raw sums", (S4,), (1,), "us", 5.0, 3.6),
    Goal("W2A2 bit planes, raw sums", (S4,), (16,), "us", 5.6, 4.2),
]


def goals(rows: list[dict[str, Any]]) -> str:
    """Return a table of the goals that the rows of a run speak of."""
    lines = []
    for goal in GOALS:
        for n, k in goal.shapes:
            for m in goal.m:
                for r in rows:
                    if (r["row"], r["n"], r["k"], r["m"]) == (f"nibblas {goal.row}", n, k, m):
                        lines.append(_line(goal, r))
    head = ["row", "N x K", "M", "measured", "reach", "aim", ""]
    return "\n## Goals\n\n" + table(head, lines) + "\n" if lines else ""


def _line(goal: Goal, r: dict[str, Any]) -> list[str]:
    got = r[goal.measure]
    unit = {"x": "x", "tops": " T/s", "us": " us"}[goal.measure]
    sign = -1 if goal.measure == "us" else 1
    passed = [sign * got >= sign * mark for mark in (goal.reach, goal.aim)]
    verdict = "aim" if passed[1] else "reached" if passed[0] else "**below**"
    digits = 0 if goal.measure == "tops" else 2
    cells = [f"{v:.{digits}f}{unit}" for v in (got, goal.reach, goal.aim)]
    return [goal.row, f"{r['n']}x{r['k']}", str(r["m"]), *cells, verdict]
