"""Rows of `gpu.py` as benchmark cases, where a CUDA device is present."""

from __future__ import annotations

from typing import Any

import pytest

cupy = pytest.importorskip("cupy")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA device", allow_module_level=True)

import gpu  # noqa: E402
import numpy as np  # noqa: E402

import nibblas as nb  # noqa: E402

ROWS = [
    ("int4_g128", "f32", 1),
    ("int4_g128", "f32", 16),
    ("int4_g128", "f32", 1024),
    ("int4_g128", "int8", 1024),
    ("int8", "int8", 1024),
]


@pytest.mark.parametrize(("fmt", "compute", "m"), ROWS)
def test_product(benchmark: Any, size: int, fmt: str, compute: str, m: int) -> None:
    """Weights come from memory: the copies that take turns exceed the cache."""
    storage = gpu.random_storage(fmt, size, size)
    tensors = gpu.copies(gpu.Storage(storage, cupy.cuda.Device().id))
    x, y = gpu.random_half(m, size), cupy.empty((m, size), np.float16)
    gpu.check(storage, tensors[0], x[:300], compute)
    step = nb.cuda.graph(lambda: [c() for c in gpu.products(tensors, x, compute, y)])

    def run() -> None:
        step()
        cupy.cuda.get_current_stream().synchronize()

    benchmark.extra_info["products"] = len(tensors)
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
