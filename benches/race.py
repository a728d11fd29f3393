"""Races nibblas against every installed peer: `python benches/race.py`.

One process per thread count. In it all contenders of a case take turns, after each has been
checked against float64. Writes a JSON file, and from it a table and plots beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Both would make NumPy's BLAS another one than its users have.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

import numpy as np  # noqa: E402
from harness import (  # noqa: E402
    Lane,
    copies_for,
    interleave,
    machine,
    read_bandwidth,
    rotating,
    verify,
)
from limits import Limit  # noqa: E402
from peers import OURS, PEERS, Peer, Weights, make, random_weights  # noqa: E402
from rows import ROWS, Goal, Row  # noqa: E402

PACKAGES = (
    "nibblas",
    "numpy",
    "onnxruntime",
    "torch",
    "auto-round-lib",
    "numkong",
    "openvino",
    "llama-cpp-python",
    "mkl",
)

#: (fewest rounds, most rounds, seconds a turn fills, seconds a case may take past the fewest)
FULL = (15, 25, 4e-3, 4.0)
QUICK = (5, 7, 2e-3, 1.0)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summary(seconds: Iterable[float]) -> dict[str, float]:
    low, middle, high = np.percentile(list(seconds), [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def judge(goal: Goal, m: int, lanes: dict[str, Lane], rate: dict[str, float], limit: float) -> Any:
    """How one goal came out in one case; None when it cannot be said."""
    if goal.ms and m not in goal.ms:
        return None
    peers = [lanes[name] for name in goal.against if name in lanes]
    if goal.ours not in lanes or not peers:
        return None
    ours = lanes[goal.ours]
    best = min(peers, key=Lane.median)
    # Round by round, so that what slowed both down in a round cancels.
    pairs = zip(best.seconds, ours.seconds, strict=True)
    ratio = summary(theirs / mine for theirs, mine in pairs)
    out: dict[str, Any] = {
        "ours": goal.ours,
        "best": best.name,
        "like": goal.like,
        "ratio": ratio,
        "reach": goal.reach,
        "aim": goal.aim,
    }
    if goal.aim == "bandwidth":
        out["bandwidth_share"] = rate[goal.ours] / limit
        aimed = out["bandwidth_share"] >= 0.95
    else:
        aimed = ratio["median"] >= float(goal.aim)
    out["verdict"] = "aim" if aimed else "reach" if ratio["median"] >= goal.reach else "missed"
    return out


class Race:
    """All rows with one number of threads."""

    def __init__(self, threads: int, quick: bool, check: bool, only: set[str]):
        self.threads, self.quick, self.check = threads, quick, check
        self.rows = [row for row in ROWS if not only or row.id in only]
        self.skipped: dict[str, str] = {}
        self.wrong: list[str] = []
        self.cases: list[dict[str, Any]] = []
        self.bandwidth = {
            "hot": read_bandwidth(np.ones(2 << 20, np.float32)),
            "cold": read_bandwidth(np.ones(128 << 20, np.float32), 1.0),
        }

    def contenders(self, row: Row, w: Weights) -> list[Peer]:
        """Those of the row that are here and take the format."""
        found = []
        for name in [*row.ours(), *row.peers()]:
            peer = make(name)
            if name not in self.skipped:
                reason = peer.missing()
                if reason:
                    self.skipped[name] = reason
                    say(f"  skipped: {name}: {reason}")
            if name in self.skipped:
                continue
            reason = peer.accepts(w)
            if reason:
                self.skipped[f"{name} in {row.id}"] = reason
                say(f"  skipped: {name}: {reason}")
            else:
                found.append(peer)
        return found

    def run(self) -> dict[str, Any]:
        for row in self.rows:
            for n, k in row.shapes:
                started = time.perf_counter()
                say(f"{row.title}, N = {n}, K = {k}, {self.threads} thread(s)")
                self.race(row, random_weights(row.element, row.bits, n, k, row.group))
                say(f"  {time.perf_counter() - started:.1f} s")
        return {
            "threads": self.threads,
            "bandwidth": self.bandwidth,
            "cases": self.cases,
            "skipped": self.skipped,
            "wrong": self.wrong,
        }

    def race(self, row: Row, w: Weights) -> None:
        ready: list[tuple[Peer, int]] = []
        for peer in self.contenders(row, w):
            try:
                peer.within(peer.prepare, w, 1, self.threads)
                copies = copies_for(peer.weight_bytes(), row.cold)
                if copies > 1:
                    peer.within(peer.close)
                    peer.within(peer.prepare, w, copies, self.threads)
                ready.append((peer, copies))
            except Exception as error:
                self.fail(peer, row, error)
        ms = row.ms[1:2] or row.ms if self.quick else row.ms
        for m in ms:
            self.case(row, w, m, ready)
        for peer, _ in ready:
            peer.within(peer.close)

    def fail(self, peer: Peer, row: Row, error: Exception) -> None:
        text = f"{peer.name} in {row.id}: {type(error).__name__}: {error}"
        say(f"  FAILED: {text}")
        self.wrong.append(text)

    def limit(self, row: Row, m: int, work: float) -> Lane | None:
        """The loop that says what the machine allows, where a row names one."""
        if not row.limit or m < 16 or self.threads > 1:
            return None
        limit = Limit(row.limit)
        reason = self.skipped.get(limit.name) or limit.missing()
        if reason:
            self.skipped[limit.name] = reason
            return None
        return Lane(limit, limit.call(work))

    def case(self, row: Row, w: Weights, m: int, ready: list[tuple[Peer, int]]) -> None:
        x = np.random.default_rng(m).standard_normal((m, w.k), dtype=np.float32)
        lanes: dict[str, Lane] = {}
        errors: dict[str, float] = {}
        for peer, copies in ready:
            try:
                peer.within(peer.feed, x)
                errors[peer.name] = peer.within(verify, peer, x, w, copies)
            except Exception as error:
                self.fail(peer, row, error)
                continue
            lanes[peer.name] = Lane(peer, rotating(peer, copies))
        if self.check:
            for name, error in errors.items():
                say(f"  M = {m:4d}  {name:32s} relative error {error:.1e}")
            return
        fewest, most, burst, budget = QUICK if self.quick else FULL
        pause = 2e-3 if self.threads > 1 else 0.0
        work = 2.0 * m * w.n * w.k
        limit = self.limit(row, m, work)
        everyone = [*lanes.values(), *([limit] if limit else [])]
        interleave(everyone, fewest, most, burst, pause, budget)
        entries, rate = [], {}
        for peer, copies in ready:
            if peer.name not in lanes:
                continue
            lane = lanes[peer.name]
            seconds = summary(lane.seconds)
            rate[peer.name] = peer.weight_bytes() / seconds["median"]
            entries.append(
                {
                    "name": peer.name,
                    "seconds": seconds,
                    "spread": (seconds["p90"] - seconds["p10"]) / seconds["median"],
                    "rounds": len(lane.seconds),
                    "gops": work / seconds["median"] / 1e9,
                    "weight_bytes": peer.weight_bytes(),
                    "gb_per_s": rate[peer.name] / 1e9,
                    "copies": copies,
                    "relative_error": errors[peer.name],
                    "bits": peer.weight_bits(w),
                    "group": peer.group(w),
                    "activation": peer.activation,
                    "skips": peer.skips,
                }
            )
            last = entries[-1]
            say(
                f"  M = {m:4d}  {peer.name:32s} {last['gops']:8.1f} Gop/s"
                f"  {last['gb_per_s']:6.1f} GB/s  +-{last['spread']:.2f}"
            )
        bandwidth = self.bandwidth["cold" if row.cold else "hot"] * self.threads
        goals = [judge(goal, m, lanes, rate, bandwidth) for goal in row.goals]
        if limit:
            for entry in entries:
                pairs = zip(limit.seconds, lanes[entry["name"]].seconds, strict=True)
                entry["of_limit"] = summary(least / took for least, took in pairs)
        self.cases.append(
            {
                "row": row.id,
                "title": row.title,
                "m": m,
                "n": w.n,
                "k": w.k,
                "cold": row.cold,
                "limit": {"name": limit.name, "seconds": summary(limit.seconds)} if limit else None,
                "contenders": entries,
                "goals": [g for g in goals if g],
            }
        )


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def child(threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one thread count in a process whose libraries were told so before they loaded."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    # Workers that spin for 200 ms after a call would take the core of the next contender.
    environment.setdefault("KMP_BLOCKTIME", "1")
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [
            sys.executable,
            str(HERE / "race.py"),
            "--child",
            str(part),
            "--threads",
            str(threads),
        ]
        command += ["--quick"] if options.quick else []
        command += ["--check"] if options.check else []
        command += ["--rows", options.rows] if options.rows else []
        subprocess.run(command, env=environment, check=True)
        loaded: dict[str, Any] = json.loads(part.read_text())
    return loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2", help="thread counts (default 1,2)")
    parser.add_argument("--quick", action="store_true", help="one M per row and few rounds")
    parser.add_argument(
        "--check", action="store_true", help="compare with float64 only, without timing"
    )
    parser.add_argument("--rows", default="", help="row ids, separated by commas")
    parser.add_argument("--list", action="store_true", help="list rows and contenders, and stop")
    parser.add_argument("--out", type=Path, default=Path("race.json"), help="the JSON file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = {part for part in options.rows.split(",") if part}
    unknown = only - {row.id for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))} (see --list)")
    if options.list:
        for row in ROWS:
            print(f"{row.id:22s} {row.title}; M = {', '.join(map(str, row.ms))}")
        for name in [*OURS, *PEERS]:
            print(f"{name:34s} {make(name).missing() or 'ready'}")
        return 0
    counts = [int(part) for part in options.threads.split(",")]
    if options.child:
        race = Race(counts[0], options.quick, options.check, only)
        options.child.write_text(json.dumps(race.run()))
        return 0
    started = time.time()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = [child(count, options) for count in counts]
    wrong = [text for run in runs for text in run["wrong"]]
    for text in wrong:
        say(f"FAILED: {text}")
    if options.check:
        return 1 if wrong else 0
    result = {
        "schema": 1,
        "machine": machine(),
        "versions": versions(),
        "quick": options.quick,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "runs": runs,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    import report

    for path in report.write(result, options.out):
        say(f"wrote {path}")
    print(report.goals_table(result))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
