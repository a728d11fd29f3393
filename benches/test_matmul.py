"""nibblas and NumPy's float32 side by side: formats, computes, M, hot and cold, threads."""

from __future__ import annotations

import pytest
from peers import make

# What the peers' own packages warn about is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

WEIGHTS = {
    "int4_g128": ("int", 4, 128),
    "int4_g32": ("int", 4, 32),
    "int8": ("int", 8, 0),
    "int2_g128": ("int", 2, 128),
    "ternary_g128": ("ternary", 2, 128),
}
LANES = [
    pytest.param("numpy f32 dense", ("int", 4, 128), id="numpy-f32"),
    *(
        pytest.param(f"nibblas {compute}", weights, id=f"{name}-{compute}")
        for name, weights in WEIGHTS.items()
        for compute in ("f32", "int8", "bf16")
    ),
]


@pytest.mark.parametrize("m", [1, 4, 16, 64, 256, 1024])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize(("name", "weights"), LANES)
def test_matmul(time_product, name, weights, cold, threads, m):
    time_product(make(name), weights, m, cold=cold, threads=threads)
