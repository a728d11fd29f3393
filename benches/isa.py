"""Products on every level of the instruction set: `python benches/isa.py [--out FILE]`.

One thread, one process per level, as `NIBBLAS_ISA` is read once. Levels take turns, so that a slow
minute of a shared machine meets them all; medians over the turns. Prints a table of Gop/s (2MNK
over the median time) and, with `--out`, writes it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import nibblas as nb

CASES = (
    ("int4_g128", "int8", 1),
    ("int4_g128", "int8", 16),
    ("int4_g128", "int8", 256),
    ("int4_g32", "int8", 1),
    ("int4_g32", "int8", 256),
    ("int8", "int8", 256),
    ("ternary_g128", "int8", 1),
    ("int4_g128", "f32", 1),
    ("int4_g128", "f32", 64),
    ("nf4_g64", "f32", 64),
)
SIZE = 4096


def serve() -> None:
    """Time the case whose number each line of the input gives, and answer with the seconds."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    weights = {name: nb.quantize(w, name).pack() for name in dict.fromkeys(c[0] for c in CASES)}
    for line in sys.stdin:
        name, compute, m = CASES[int(line)]
        x = rng.standard_normal((m, SIZE), dtype=np.float32)
        out = np.empty((m, SIZE), np.float32)
        taken: list[float] = []
        while len(taken) < 2 or (sum(taken) < 0.1 and len(taken) < 50):
            begin = time.perf_counter()
            nb.matmul(x, weights[name].T, compute=compute, threads=1, out=out)
            taken.append(time.perf_counter() - begin)
        print(json.dumps(taken[1:]), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each level (default 5)")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    levels = [level for level, found in nb.info()["isa"]["levels"].items() if found["available"]]
    command = [sys.executable, __file__, "--serve"]
    servers = {
        level: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NIBBLAS_ISA": level},
        )
        for level in levels
    }
    lines = [
        "| format | compute | M | " + " | ".join(levels) + " |",
        "|---" * (3 + len(levels)) + "|",
    ]
    for i, (name, compute, m) in enumerate(CASES):
        taken: dict[str, list[float]] = {level: [] for level in levels}
        for _ in range(args.rounds):
            for level, server in servers.items():
                assert server.stdin is not None
                assert server.stdout is not None
                print(i, file=server.stdin, flush=True)
                taken[level] += json.loads(server.stdout.readline())
        rates = [2e-9 * m * SIZE * SIZE / statistics.median(t) for t in taken.values()]
        cells = " | ".join(f"{r:.3g}" if r < 10 else f"{r:.0f}" for r in rates)
        lines.append(f"| `{name}` | {compute} | {m} | {cells} |")
        print(lines[-1], flush=True)
    for server in servers.values():
        server.communicate()
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
