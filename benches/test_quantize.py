"""Quantising: ours beside the same arithmetic in NumPy, and the scale search beside rounding."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import nibblas as nb


def in_numpy(w: np.ndarray, group: int) -> np.ndarray:
    """Codes of int4 by NumPy alone: absolute maximum of a group, division, rounding, clipping."""
    parts = w.reshape(w.shape[0], -1, group)
    scales = np.abs(parts).max(axis=-1, keepdims=True) / 7
    return np.clip(np.round(parts / scales), -8, 7).astype(np.int8)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["numpy", "rtn", "mse"])
@pytest.mark.parametrize("group", [8, 32, 128])
def test_quantize(benchmark, size, group, method, threads):
    w = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    benchmark.extra_info.update(method=method, group=group, threads=threads, values=w.size)
    with threadpool_limits(threads):
        if method == "numpy":
            benchmark.pedantic(in_numpy, (w, group), rounds=5, warmup_rounds=1)
        else:
            call = (w, f"int4_g{group}")
            benchmark.pedantic(nb.quantize, call, {"method": method}, rounds=5, warmup_rounds=1)
