"""Every installed peer, each with weights that it takes; the race compares them in turns."""

from __future__ import annotations

import pytest
from peers import PEERS, make

# What the peers' own packages warn about is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

#: The weights that each peer is timed with; int4_g128 for those not named.
WEIGHTS = {
    "onnxruntime MatMulInteger": ("int", 8, 0),
    "onnxruntime DynamicQuantizeMatMul": ("int", 8, 0),
    "torch _int_mm": ("int", 8, 0),
    "torch dynamic linear (oneDNN)": ("int", 8, 0),
    "numkong int8": ("int", 8, 0),
    "numkong int4": ("int", 4, 0),
    "numkong uint1": ("bipolar", 1, 0),
    "mkl s8u8s32": ("int", 8, 0),
    "ggml q4_0": ("int", 4, 32),
    "ggml q8_0": ("int", 8, 32),
    "ggml q2_K": ("int", 2, 32),
    "ggml q3_K": ("int", 3, 32),
    "ggml q6_K": ("int", 6, 32),
    "ggml tq1_0": ("ternary", 2, 128),
    "ggml tq2_0": ("ternary", 2, 128),
}


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("name", PEERS)
def test_peer(time_product, name, m):
    time_product(make(name), WEIGHTS.get(name, ("int", 4, 128)), m, cold=False, threads=1)
