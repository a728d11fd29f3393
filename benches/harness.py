"""Timing that survives a noisy machine: contenders take turns, and medians are compared."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from limits import Limit
from peers import Peer, Weights

#: Weights must not come from any cache when they are called cold.
COLD_BYTES = 512 << 20


@dataclass
class Lane:
    """One contender in one case, or a limit: how to call it, and what the clock said."""

    peer: Peer | Limit
    call: Callable[[], object]
    repeats: int = 1
    long: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.peer.name

    def burst(self, repeats: int, warm: bool) -> float:
        """Seconds that each of `repeats` calls took, after an untimed one if `warm`."""
        return float(self.peer.within(_burst, self.call, repeats, warm))

    def median(self) -> float:
        return statistics.median(self.seconds)


def _burst(call: Callable[[], object], repeats: int, warm: bool) -> float:
    if warm:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    lanes: Sequence[Lane], fewest: int, most: int, burst: float, pause: float, budget: float
) -> None:
    """Times all `lanes` in turn, for `fewest` to `most` rounds.

    A turn is one untimed call (none where a call is so long that what the caches held before it
    no longer matters), then enough calls to fill `burst` seconds; its time is the mean of those.
    The order rotates, so that no contender always follows the same one. `pause` lets the worker
    threads of the last contender go to sleep. Past `fewest` rounds it goes on only while
    `budget` seconds have not been spent.
    """
    for lane in lanes:
        once = lane.burst(1, warm=True)
        lane.repeats = max(1, min(2000, round(burst / max(once, 1e-7))))
        lane.long = once > 0.05
    began = time.perf_counter()
    for turn in range(most):
        if turn >= fewest and time.perf_counter() - began > budget:
            break
        for index in range(len(lanes)):
            lane = lanes[(index + turn) % len(lanes)]
            if pause:
                time.sleep(pause)
            lane.seconds.append(lane.burst(lane.repeats, warm=not lane.long))


def rotating(peer: Peer, copies: int) -> Callable[[], None]:
    """A call that takes the next copy of the weights each time."""
    if copies == 1:
        return lambda: peer.run(0)
    position = 0

    def call() -> None:
        nonlocal position
        position = (position + 1) % copies
        peer.run(position)

    return call


def copies_for(bytes_of_one: int, cold: bool) -> int:
    """Copies of a matrix that together exceed every cache."""
    return max(2, -(-COLD_BYTES // max(bytes_of_one, 1))) if cold else 1


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The Frobenius norm of the difference over that of `want`."""
    scale = float(np.linalg.norm(want))
    return float(np.linalg.norm(got.astype(np.float64) - want)) / (scale or 1.0)


def verify(peer: Peer, x: np.ndarray, w: Weights, copies: int = 1) -> float:
    """Runs the first and last copy and compares with float64; raises when it is wrong."""
    want = peer.expected(x, w)
    worst = 0.0
    for copy in {0, copies - 1}:
        peer.run(copy)
        got = peer.result()
        if got.shape != want.shape:
            raise AssertionError(f"{peer.name}: shape {got.shape}, expected {want.shape}")
        error = relative_error(got, want)
        # Written so that NaN fails.
        if not error <= peer.tolerance:
            raise AssertionError(
                f"{peer.name}: relative error {error:.2e} is above {peer.tolerance:.0e}"
            )
        worst = max(worst, error)
    return worst


def read_bandwidth(buffer: np.ndarray, seconds: float = 0.3) -> float:
    """Bytes per second at which one thread reads `buffer`, by its fastest reduction here."""
    flat = buffer.reshape(-1).view(np.float32)
    best = 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        np.dot(flat, flat)
        best = max(best, flat.nbytes / (time.perf_counter() - start))
    return best


def machine() -> dict[str, object]:
    """What a reader must know about the machine to read the figures."""
    info: dict[str, object] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in text.splitlines()
            if ":" in line
        )
        info["cpu"] = fields.get("model name", "")
        wanted = (
            "avx2",
            "avx_vnni",
            "avx512f",
            "avx512_vnni",
            "avx512_bf16",
            "amx_int8",
            "amx_bf16",
        )
        flags = fields.get("flags", "").split()
        info["features"] = [flag for flag in wanted if flag in flags]
    return info
