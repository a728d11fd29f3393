"""Products on more and more threads: `python benches/scaling.py --threads 1,2,4,8,16`.

All thread counts of a case take turns in one process. Prints Gop/s (2MNK over the median time) and
the ratio to one thread.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import nibblas as nb

CASES = (("int4_g128", "int8"), ("int4_g128", "f32"), ("int8", "int8"))


def measure(x: np.ndarray, q: nb.QTensor, compute: str, threads: list[int]) -> dict[int, float]:
    """Median seconds of a product on each number of threads."""
    out = np.empty((len(x), q.shape[0]), np.float32)
    taken: dict[int, list[float]] = {n: [] for n in threads}
    end = time.perf_counter() + 1.5
    while time.perf_counter() < end or len(taken[threads[0]]) < 5:
        for n in threads:
            # Three in a row: the first one wakes the threads.
            for _ in range(3):
                begin = time.perf_counter()
                nb.matmul(x, q.T, compute=compute, threads=n, out=out)
                taken[n].append(time.perf_counter() - begin)
    return {n: float(np.median(t)) for n, t in taken.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2", help="thread counts (default 1,2)")
    parser.add_argument("--m", default="1,16,256,1024", help="rows of x")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    args = parser.parse_args()
    threads = [int(n) for n in args.threads.split(",")]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((args.size, args.size), dtype=np.float32)
    for name, compute in CASES:
        q = nb.quantize(w, name).pack()
        for m in (int(m) for m in args.m.split(",")):
            x = rng.standard_normal((m, args.size), dtype=np.float32)
            times = measure(x, q, compute, threads)
            first = times[threads[0]]
            cells = [
                f"{n}: {2e-9 * m * w.size / t:.0f} ({first / t:.1f}x)" for n, t in times.items()
            ]
            print(f"{name} {compute} M = {m}:", ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
