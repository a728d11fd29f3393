"""compute-sanitizer over a small corpus: ``python benches/sanitize.py [memcheck racecheck ...]``.

All four tools unless some are named. The corpus meets every loop nest and every way in which it is
cut, with K longer than the ring of slots. Results are poisoned before they are computed and
compared with the CPU's bits or with float64 afterwards, so that what a tool does not see (results
that leave by the copy engine) is checked all the same. CuPy's pool is off: every array is an
allocation of its own, whose edges memcheck knows and whose contents initcheck does not take for
those of an older one. The exit status is 0 if every tool reports nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

# (format, compute, type of activations, M, N, K)
PRODUCTS = [
    # gemm.cu: warps along K, parts that meet in the workspace, parked sums (in rounds, too), groups
    # of every length
    ("int4_g128", "f32", "f2", 3, 320, 1152),
    ("int4_g32", "bf16", "f2", 9, 130, 1160),
    ("int3_g64", "f32", "f4", 5, 70, 520),
    ("uint4_g64", "f32", "f2", 8, 96, 640),
    ("mxfp4", "f32", "f2", 16, 320, 1152),
    ("nf4_g128", "f32", "f2", 12, 100, 1152),
    ("dyn8_g128", "f32", "f2", 4, 64, 512),
    ("int8", "int8", "f2", 5, 320, 1152),
    ("int4_g128", "int8", "f2", 7, 320, 1152),
    ("int4_g128", "int8", "f2", 12, 100, 6400),
    ("int4_g32", "int8", "f4", 12, 130, 520),
    ("int4_g32", "int8_g32", "f4", 3, 65, 300),
    ("int4_g128_si8", "int8", "f2", 9, 128, 1152),
    ("int2", "f32", "f2", 8, 64, 16384),
    # hopper.cu: every height of X, results by the copy engine and by threads, two sets of sums;
    # blocks that share out K in clusters and, of a short one, through the workspace
    ("int4_g128", "f32", "f2", 20, 328, 1152),
    ("int4_g128", "f32", "f2", 50, 328, 768),
    ("int8", "int8", "f2", 200, 328, 768),
    ("int4_g128", "f32", "f2", 60, 328, 1152),
    ("uint4_g64", "f32", "f2", 70, 328, 1152),
    ("int4_g32", "bf16", "f4", 40, 130, 1152),
    ("int4_g128", "f32", "f2", 200, 328, 1152),
    ("int4_g128", "int8", "f2", 200, 328, 1152),
    ("int4_g128", "int8", "f4", 200, 330, 1160),
    ("int8", "int8", "f2", 200, 328, 1152),
    ("int4_g128_si8", "int8", "f2", 130, 328, 1152),
    ("int4", "int8", "f2", 256, 12736, 768),
    ("int4_g128", "int8", "f2", 1100, 4096, 1280),
    ("nf4_g128", "f32", "f2", 140, 200, 1152),
    ("e3m2_g128", "fp8", "f2", 40, 128, 1152),
]
# (bits of X and of W, M, N, K)
PLANES = [
    (2, 2, 8, 4480, 9300),
    (1, 1, 64, 320, 9300),
    (3, 2, 40, 96, 2100),
    (2, 2, 300, 520, 2100),
    (1, 1, 300, 520, 2100),
]
SPARSE = ["f16_bitmap", "f16_2of4", "int8_2of4", "int4_g128_bsr32"]


def kept(structure: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return which entries of a sparse matrix are kept, half of them."""
    if structure == "2of4":
        first = rng.random((n, k // 2)) < 0.5
        return np.stack([first, ~first], 2).reshape(n, k)
    run = 1 if structure == "bitmap" else 32
    return np.repeat(rng.random((n, k // run)) < 0.5, run, axis=1)


def tensor(nb: Any, fmt: str, n: int, k: int, seed: int) -> Any:
    """Return a tensor of random codes, without the time that quantising takes."""
    rng = np.random.default_rng(seed)
    f = nb.Format(fmt)
    e = f.element
    if f.structure or f.scale == "i8" or n * k < 1 << 21:
        w = rng.normal(size=(n, k)).astype(np.float32)
        if f.structure:
            w *= kept(f.structure, n, k, rng)
        return nb.quantize(w, fmt)
    codes = e.minimum + rng.integers(0, e.levels, (n, k)) * (e.maximum - e.minimum) // (
        e.levels - 1
    )
    scales = rng.uniform(0.01, 0.1, (n, f.groups(k))).astype(np.float32)
    return nb.QTensor.from_parts(fmt, codes, scales)


def compare(got: Any, want: np.ndarray, what: str, exact: bool) -> None:
    """Raise where a result is not the CPU's bits, or too far from float64."""
    y = got.get().astype(np.float32)
    if exact:
        wrong = (y.view(np.uint32) != want.astype(np.float32).view(np.uint32)).sum()
        if wrong:
            raise AssertionError(f"{what}: {wrong} of {y.size} differ")
        return
    error = np.linalg.norm(y - want) / np.linalg.norm(want)
    if not error < (0.05 if "fp8" in what else 0.02):
        raise AssertionError(f"{what}: relative error {error}")


def corpus() -> None:
    """Run and check every case."""
    import cupy

    import nibblas as nb

    cupy.cuda.set_allocator(None)
    for i, (fmt, compute, dtype, m, n, k) in enumerate(PRODUCTS):
        q = tensor(nb, fmt, n, k, i)
        x = np.random.default_rng(99 + i).normal(size=(m, k)).astype(dtype)
        y = cupy.full((m, n), np.nan, x.dtype)
        nb.matmul(cupy.asarray(x), q.to("cuda:0").T, compute=compute, out=y)
        exact = compute.startswith("int8")
        host = x.astype(np.float32)
        if exact:
            want = nb.matmul(host, q.T, compute=compute, dtype=np.float32)
            want = want.astype(x.dtype)
        else:
            want = host @ q.dequantize().T
        compare(y, want, f"{fmt} {compute} {m}x{n}x{k}", exact)
    for bx, bw, m, n, k in PLANES:
        x, w = tensor(nb, f"bipolar{bx}", m, k, 1), tensor(nb, f"bipolar{bw}", n, k, 2)
        y = cupy.full((m, n), -1, np.int32)
        nb.matmul(x.to("cuda:0"), w.to("cuda:0").T, dtype=np.int32, out=y)
        want = x.codes().astype(np.float32) @ w.codes().astype(np.float32).T
        compare(y, want, f"bipolar{bx} by bipolar{bw} {m}x{n}x{k}", True)
    for fmt in SPARSE:
        q = tensor(nb, fmt, 2048, 4096, 3)
        for m in (3, 20):
            x = np.random.default_rng(m).normal(size=(m, 4096)).astype(np.float16)
            y = cupy.full((m, 2048), np.nan, np.float32)
            compute = "int8" if fmt.startswith("int8") else "f32"
            nb.matmul(cupy.asarray(x), q.to("cuda:0").T, compute=compute, out=y, dtype=np.float32)
            want = x.astype(np.float32)
            want = (
                nb.matmul(want, q.T, compute="int8")
                if compute == "int8"
                else want @ q.dequantize().T
            )
            compare(y, want, f"{fmt} {m}", compute == "int8")
    x = np.random.default_rng(5).normal(size=(9, 640)).astype(np.float16)
    gain = np.linspace(0.5, 2, 640, dtype=np.float32)
    w = tensor(nb, "int4_g128", 96, 640, 6).to("cuda:0")
    got = nb.cuda.activations(cupy.asarray(x)) @ w.T
    same = nb.matmul(cupy.asarray(x), w.T, compute="int8")
    compare(got, same.get(), "activations", True)
    nb.cuda.activations(cupy.asarray(x), norm=gain).matmul(w.T)
    planes = tensor(nb, "bipolar2", 96, 640, 7).to("cuda:0")
    nb.cuda.activations(cupy.asarray(x), "bipolar2", norm=gain).matmul(planes.T)
    for fmt in ("int4_g32", "uint3_g100", "mxfp4", "nf4", "bipolar3"):
        v = np.random.default_rng(8).normal(size=(37, 300)).astype(np.float32)
        if nb.quantize(cupy.asarray(v), fmt) != nb.quantize(v, fmt):
            raise AssertionError(f"quantise to {fmt}")
    cupy.cuda.Device().synchronize()
    print("corpus: every result is right", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", default=TOOLS, help=", ".join(TOOLS))
    parser.add_argument("--corpus", action="store_true", help="run the corpus without a tool")
    options = parser.parse_args()
    if options.corpus:
        corpus()
        return 0
    worst = 0
    for tool in options.tools:
        if tool not in TOOLS:
            parser.error(f"{tool!r} is not one of {', '.join(TOOLS)}")
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, __file__, "--corpus"]
        env = {**os.environ, "NIBBLAS_CUDA_RACECHECK": "1" if tool == "racecheck" else "0"}
        if tool == "racecheck":
            command[3:3] = ["--racecheck-report", "analysis"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        summary = re.findall(r"=+ (.*SUMMARY.*)", text)
        if done.returncode:
            worst = done.returncode
            print(text)
        print(f"{tool}: {'; '.join(summary)}, exit status {done.returncode}", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
