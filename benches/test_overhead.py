"""What a call costs: products so small that nothing else counts, beside NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest

import nibblas as nb

W = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("name", ["numpy-f32", "int4_g32", "int8"])
def test_call(benchmark, name, m):
    """``x @ w.T`` for a 64 x 64 weight, on one thread."""
    x = np.random.default_rng(m).standard_normal((m, 64), dtype=np.float32)
    benchmark.group = f"64 x 64, M = {m}"
    if name == "numpy-f32":
        w = np.ascontiguousarray(W)
        np.testing.assert_allclose(benchmark(lambda: x @ w.T), x @ W.T)
        return
    q = nb.quantize(W, name).pack()
    want = x.astype(np.float64) @ q.dequantize().T
    np.testing.assert_allclose(benchmark(lambda: x @ q.T), want, rtol=1e-3, atol=1e-3)
