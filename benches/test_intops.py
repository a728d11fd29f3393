"""Operators of integers beside PyTorch's float32; products without multipliers beside NumPy."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest

import nibblas as nb
from nibblas import approx, intops

SIDE = 4096
SCALE = 8 / 2**15


def ratio(slow: Callable[[], object], fast: Callable[[], object], turns: int = 5) -> float:
    """Median CPU time of one over that of the other, taken in turns; both on one thread."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns + 1):
        for call, found in zip((slow, fast), times, strict=True):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
    return median(times[0][1:]) / median(times[1][1:])


def operators() -> dict[str, tuple[Callable[[object], object], Callable[[np.ndarray], object]]]:
    torch = pytest.importorskip("torch")
    one, zero = torch.ones(SIDE), torch.zeros(SIDE)
    w, b = one.numpy(), zero.numpy()
    return {
        "softmax": (lambda t: torch.softmax(t, -1), lambda q: intops.softmax(q, SCALE)),
        "gelu": (
            torch.nn.functional.gelu,
            lambda q: intops.gelu(q, SCALE, out_scale=0.05, dtype=np.int8),
        ),
        "layernorm": (
            lambda t: torch.nn.functional.layer_norm(t, (SIDE,), one, zero),
            lambda q: intops.layernorm(q, SCALE, w, b, out_scale=0.03),
        ),
    }


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
@pytest.mark.parametrize("name", ["softmax", "gelu", "layernorm"])
def test_operators_are_as_fast_as_floats(name: str, dtype: type) -> None:
    torch = pytest.importorskip("torch")
    theirs, ours = operators()[name]
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32) * 2
    q = np.clip(np.rint(x / SCALE), -(2**15), 2**15 - 1).astype(dtype)
    t = torch.from_numpy(x)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with nb.threads(1):
            found = ratio(lambda: theirs(t), lambda: ours(q))
    finally:
        torch.set_num_threads(before)
    print(f"{name} {dtype.__name__}: {found:.2f}x PyTorch float32")
    assert found >= 1


def shift_add_in_numpy(a: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """Masked additions plane by plane, vectorised over rows, columns and a group."""
    group = q.format.group
    u = (q.codes().astype(np.int64) + 8).astype(np.uint8)
    wide = a.astype(np.int32)
    y = np.zeros((len(a), len(u)), np.float32)
    for g in range(u.shape[1] // group):
        part = slice(g * group, (g + 1) * group)
        d = np.zeros(y.shape, np.int32)
        for i in range(4):
            bit = ((u[:, part] >> i) & 1).astype(bool)
            d += np.where(bit[None], wide[:, None, part], 0).sum(-1, dtype=np.int32) << i
        d -= 8 * wide[:, part].sum(-1)[:, None]
        y = (d.astype(np.float64) * q.scales[:, g] + y).astype(np.float32)
    return y


def lmul_in_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums of bit patterns, vectorised over rows and columns."""
    y = np.zeros((len(a), b.shape[1]), np.float32)
    left, right = a.view(np.uint32).astype(np.int64), b.view(np.uint32).astype(np.int64)
    for k in range(len(b)):
        x, w = left[:, k : k + 1], right[k]
        m, n = x & 0x7FFFFFFF, w & 0x7FFFFFFF
        r = m + n - 0x3F780000
        dead = (m < 0x800000) | (n < 0x800000) | (r < 0x800000)
        r = np.where(dead, 0, np.minimum(r, 0x7F7FFFFF)) | ((x ^ w) & 0x80000000)
        y += r.astype(np.uint32).view(np.float32)
    return y


def test_products_are_twenty_times_their_emulation() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (64, 512)).astype(np.int8)
    q = nb.quantize(rng.standard_normal((256, 512), np.float32), "int4_g128")
    x, w = rng.standard_normal((64, 512), np.float32), rng.standard_normal((512, 256), np.float32)
    np.testing.assert_array_equal(shift_add_in_numpy(a, q), approx.shift_add_matmul(a, q.T))
    np.testing.assert_array_equal(lmul_in_numpy(x, w), approx.lmul_matmul(x, w))
    with nb.threads(1):
        shift = ratio(lambda: shift_add_in_numpy(a, q), lambda: approx.shift_add_matmul(a, q.T))
        lmul = ratio(lambda: lmul_in_numpy(x, w), lambda: approx.lmul_matmul(x, w))
    print(f"shift_add_matmul {shift:.0f}x, lmul_matmul {lmul:.0f}x NumPy")
    assert shift >= 20
    assert lmul >= 20
