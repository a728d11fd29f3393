"""Turns the JSON of a race into a table and plots: `python benches/report.py race.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What one core can do with operands in registers, for the roof; Gop/s of int8 on AMX.
PEAK_GOPS = 6150.0
#: Rows whose speed is drawn over M.
CURVES = ("int4_g128", "int4_g32", "int8", "bf16")


def is_ours(name: str) -> bool:
    return name.startswith("nibblas")


def cases(result: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for run in result["runs"]:
        for case in run["cases"]:
            yield run["threads"], case


def shape_of(case: dict[str, Any]) -> str:
    square = case["n"] == case["k"] == 4096
    return case["title"] if square else f"{case['title']}, ({case['n']}, {case['k']})"


def table(header: list[str], lines: list[list[str]]) -> str:
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def share(entry: dict[str, Any]) -> str:
    """How much of what the machine allows a contender made of it."""
    of = entry.get("of_limit")
    return f"{100 * of['median']:.0f} %" if of else ""


def goals_table(result: dict[str, Any]) -> str:
    """One line for each goal in each case."""
    lines = []
    for threads, case in cases(result):
        by_name = {entry["name"]: entry for entry in case["contenders"]}
        for goal in case["goals"]:
            ours, best, ratio = by_name[goal["ours"]], by_name[goal["best"]], goal["ratio"]
            aim = goal["aim"]
            if aim == "bandwidth":
                aim = f"bandwidth ({100 * goal['bandwidth_share']:.0f} % used)"
            else:
                aim = f"{aim:g}x"
            lines.append(
                [
                    shape_of(case),
                    str(threads),
                    str(case["m"]),
                    goal["ours"] + (" *" if goal["like"] else ""),
                    f"{ours['gops']:.0f}",
                    f"{best['gops']:.0f} {goal['best']}",
                    f"{ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f})",
                    share(ours),
                    f"{goal['reach']:g}x",
                    aim,
                    {"aim": "aim reached", "reach": "reached", "missed": "**missed**"}[
                        goal["verdict"]
                    ],
                ]
            )
    header = [
        "work",
        "threads",
        "M",
        "ours",
        "Gop/s",
        "best peer",
        "ratio (p10 to p90)",
        "of the limit",
        "reach",
        "aim",
        "outcome",
    ]
    return table(header, lines)


def contenders_table(case: dict[str, Any]) -> str:
    lines = []
    for entry in sorted(case["contenders"], key=lambda e: e["seconds"]["median"]):
        group = "none" if entry["group"] == 0 else str(entry["group"])
        group = "row" if entry["group"] == case["k"] else group
        name = f"**{entry['name']}**" if is_ours(entry["name"]) else entry["name"]
        lines.append(
            [
                name,
                f"{entry['seconds']['median'] * 1e6:.0f}",
                f"{entry['gops']:.1f}",
                share(entry),
                f"{entry['gb_per_s']:.1f}",
                f"{100 * entry['spread']:.0f} %",
                f"{entry['relative_error']:.1e}",
                f"{entry['bits']:g} / {group}",
                entry["activation"],
                entry["skips"] or "nothing",
            ]
        )
    header = [
        "contender",
        "us",
        "Gop/s",
        "of the limit",
        "weight GB/s",
        "spread",
        "error",
        "bits / group",
        "activations",
        "leaves out",
    ]
    return table(header, lines)


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    machine = result["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    features = ", ".join(machine.get("features", []))
    parts = [
        "# Race",
        f"{machine.get('cpu', '')}, {machine['cores']} cores, {features}. "
        f"Python {machine['python']}; {packages}. Started {result['started']}"
        + (", quick run." if result["quick"] else "."),
        "Gop/s is 2MNK over the median time; the spread is (p90 - p10) / median; the error is "
        "relative to float64 in the Frobenius norm. Contenders of a case took turns in one "
        "process, and ratios are medians over the rounds. `*` marks ours that does the same work "
        "as the peers: bits, weight groups and activation groups. Hot weights are one matrix "
        "used again and again; cold ones rotate over at least 512 MB. A limit is a loop of the "
        "multiplications alone and the loads they need, operands in the first-level cache, which "
        "took its turn in every round.",
    ]
    for run in result["runs"]:
        hot, cold = (run["bandwidth"][key] / 1e9 for key in ("hot", "cold"))
        parts.append(
            f"One thread read {hot:.1f} GB/s from 8 MiB and {cold:.1f} GB/s from 512 MiB "
            f"before the {run['threads']}-thread part."
        )
    parts += ["## Goals", goals_table(result)]
    for threads, case in cases(result):
        heat = ", cold" if case["cold"] else ""
        parts.append(f"## {shape_of(case)}: M = {case['m']}, {threads} thread(s){heat}")
        if case.get("limit"):
            rate = (
                2.0 * case["m"] * case["n"] * case["k"] / case["limit"]["seconds"]["median"] / 1e9
            )
            parts.append(f"{case['limit']['name']}, {rate:.0f} Gop/s in the same rounds.")
        parts.append(contenders_table(case))
    for run in result["runs"]:
        if run["wrong"]:
            parts.append(f"## Failed, {run['threads']} thread(s)")
            parts.append("\n".join(f"- {text}" for text in run["wrong"]))
        if run["skipped"]:
            parts.append(f"## Skipped, {run['threads']} thread(s)")
            parts.append("\n".join(f"- {k}: {v}" for k, v in run["skipped"].items()))
    return "\n\n".join(parts) + "\n"


def _style(name: str) -> dict[str, Any]:
    if is_ours(name):
        return {"linewidth": 2.2, "marker": "o", "zorder": 3}
    return {"linewidth": 1.0, "marker": ".", "linestyle": "--"}


def plot_speed(result: dict[str, Any], path: Path) -> bool:
    """Speed over M for the main formats; False when no row has two values of M."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = {}
    titles: dict[str, str] = {}
    for threads, case in cases(result):
        if case["row"] not in CURVES:
            continue
        titles[case["row"]] = case["title"]
        lanes = curves.setdefault((case["row"], threads), {})
        for entry in case["contenders"]:
            lanes.setdefault(entry["name"], []).append((case["m"], entry["gops"]))
    curves = {
        key: lanes
        for key, lanes in curves.items()
        if any(len(points) > 1 for points in lanes.values())
    }
    if not curves:
        return False
    rows = [row for row in CURVES if any(key[0] == row for key in curves)]
    counts = sorted({key[1] for key in curves})
    figure, axes = plt.subplots(
        len(rows), len(counts), figsize=(8.5 * len(counts), 3.4 * len(rows)), squeeze=False
    )
    for (row, threads), lanes in curves.items():
        ax = axes[rows.index(row)][counts.index(threads)]
        for name, points in lanes.items():
            ax.plot(*zip(*sorted(points), strict=True), label=name, **_style(name))
        ax.set(xscale="log", yscale="log", xlabel="M", ylabel="Gop/s")
        ax.set_title(f"{titles[row]}, {threads} thread(s)", fontsize=10)
        ticks = sorted({m for points in lanes.values() for m, _ in points})
        ax.set_xticks(ticks, [str(m) for m in ticks])
        ax.minorticks_off()
        low = min(v for points in lanes.values() for _, v in points)
        high = max(v for points in lanes.values() for _, v in points)
        steps = [v for e in range(6) for v in (10**e, 2 * 10**e, 5 * 10**e)]
        marks = [v for v in steps if low / 2.5 <= v <= high * 2.5]
        ax.set_yticks(marks, [str(v) for v in marks])
        ax.set_ylim(low * 0.8, high * 1.25)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_roofline(result: dict[str, Any], path: Path, peak: float = PEAK_GOPS) -> bool:
    """Speed over operations per weight byte, under the bandwidth and the arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in result["runs"] if run["cases"]]
    if not runs:
        return False
    figure, axes = plt.subplots(1, len(runs), figsize=(7.5 * len(runs), 5), squeeze=False)
    for ax, run in zip(axes[0], runs, strict=True):
        xs = [1.0, 1e5]
        for key, colour in (("hot", "tab:red"), ("cold", "tab:blue")):
            speed = run["bandwidth"][key] / 1e9 * run["threads"]
            roof = [min(speed * v, peak * run["threads"]) for v in (1.0, peak / speed, 1e5)]
            label = f"weights {key}: {speed:.0f} GB/s"
            ax.plot([1.0, peak * run["threads"] / speed, 1e5], roof, color=colour, label=label)
        for ours, colour, marker in ((False, "0.6", "."), (True, "black", "o")):
            for heat, face in ((False, colour), (True, "none")):
                points = [
                    (2.0 * case["m"] * case["n"] * case["k"] / entry["weight_bytes"], entry["gops"])
                    for case in run["cases"]
                    for entry in case["contenders"]
                    if is_ours(entry["name"]) == ours and case["cold"] == heat
                ]
                if points:
                    name = ("nibblas" if ours else "peers") + (", cold" if heat else ", hot")
                    ax.scatter(
                        *zip(*points, strict=True),
                        s=30 if ours else 14,
                        marker=marker,
                        edgecolors=colour,
                        facecolors=face,
                        label=name,
                        zorder=3,
                    )
        ax.set(xscale="log", yscale="log", xlim=xs, xlabel="operations per byte of weights")
        ax.set_ylabel("Gop/s")
        ax.set_title(f"{run['threads']} thread(s)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def write(result: dict[str, Any], json_path: Path, peak: float = PEAK_GOPS) -> list[Path]:
    """Writes the table and plots beside the JSON; returns what was written."""
    table_path = json_path.with_suffix(".md")
    table_path.write_text(markdown(result))
    written = [json_path, table_path]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return written
    speed = json_path.with_name(json_path.stem + "-speed.png")
    if plot_speed(result, speed):
        written.append(speed)
    roof = json_path.with_name(json_path.stem + "-roofline.png")
    if plot_roofline(result, roof, peak):
        written.append(roof)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument(
        "--peak", type=float, default=PEAK_GOPS, help="Gop/s of one core, for the roof"
    )
    options = parser.parse_args()
    for path in write(json.loads(options.json.read_text()), options.json, options.peak):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
