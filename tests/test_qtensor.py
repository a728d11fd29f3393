"""The QTensor as an object: parts, slices, equality, pickles, repr."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nibblas as nb
from nibblas import testing

FORMATS = [
    "int4_g16",
    "int8",
    "uint4_g16",
    "uint3_g8_sf32",
    "bipolar3_g16_sbf16",
    "bipolar8",
    "ternary",
    "int5_g24",
    "int4_g16_si8",
    "uint4_g8_si8",
]


@pytest.fixture(params=FORMATS)
def q(request: pytest.FixtureRequest) -> nb.QTensor:
    w = np.random.default_rng(2).standard_normal((12, 48)).astype(np.float32)
    return nb.quantize(w, request.param)


def test_attributes(q: nb.QTensor) -> None:
    fmt = q.format
    groups = fmt.groups(48)
    assert q.shape == (12, 48)
    assert q.T.shape == (48, 12)
    assert (q.ndim, q.size, len(q), len(q.T), q.device) == (2, 576, 12, 48, "cpu")
    assert q.dtype == np.float32
    assert q.scales.shape == (12, groups)
    assert q.error_bound.shape == (12, groups)
    assert q.T.scales.shape == (groups, 12)
    zero_bytes = 0 if q.zeros is None else q.zeros.nbytes
    zero_bytes += 0 if q.row_scales is None else q.row_scales.nbytes
    assert (q.zeros is not None) == fmt.has_zeros
    assert q.nbytes == 12 * fmt.row_bytes(48) + q.scales.nbytes + zero_bytes
    assert q.bits_per_weight == 8 * q.nbytes / 576
    for a in (q.scales, q.zeros, q.error_bound):
        assert a is None or not a.flags.writeable
    types = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.uint8}
    assert q.scales.dtype == types[fmt.scale]


def test_error_bound_holds(rng: np.random.Generator, q: nb.QTensor) -> None:
    w = np.random.default_rng(2).standard_normal((12, 48)).astype(np.float32)
    length = q.format.group or 48
    bound = np.repeat(q.error_bound, length, axis=1)[:, :48]
    assert (np.abs(w.astype(np.float64) - q.dequantize()) <= bound).all()


def test_repr(q: nb.QTensor) -> None:
    size = f"{q.nbytes} B" if q.nbytes < 1024 else f"{q.nbytes / 1024:.1f} KiB"
    assert repr(q) == f"QTensor({q.format}, shape=(12, 48), {size}, device=cpu, packed=no)"
    q.pack()
    assert f"packed={nb.info()['isa']['active']})" in repr(q)
    assert "\n" not in repr(q)


def test_transpose_is_a_flag(q: nb.QTensor) -> None:
    assert q == q.T.T
    assert q != q.T
    np.testing.assert_array_equal(q.T.dequantize(), q.dequantize().T)
    np.testing.assert_array_equal(q.T.codes(), q.codes().T)
    q.T.pack()
    assert "packed=no" not in repr(q)
    assert np.shares_memory(q.T.scales, q.scales)


def test_from_parts_round_trip(q: nb.QTensor) -> None:
    further = {} if q.row_scales is None else {"row_scales": q.row_scales}
    again = nb.QTensor.from_parts(q.format, q.codes(), q.scales, q.zeros, **further)
    assert again == q
    assert again.error_bound is None
    wide = nb.QTensor.from_parts(
        str(q.format),
        q.codes().astype(np.int64)[::-1][::-1],
        q.scales.astype(np.float64),
        None if q.zeros is None else q.zeros.tolist(),
        **further,
        shape=(12, 48),
    )
    assert wide == q


def test_from_parts_copies() -> None:
    scales = np.ones((2, 1), np.float32)
    q = nb.QTensor.from_parts("int8", np.ones((2, 8), np.int8), scales)
    scales[:] = 7
    np.testing.assert_array_equal(q.dequantize(), np.ones((2, 8)))
    assert scales.flags.writeable


def test_float_zero_points() -> None:
    codes = np.arange(16).reshape(2, 8)
    scales = np.array([[0.5], [0.25]], np.float32)
    zeros = np.array([[1.5], [7.25]], np.float32)
    q = nb.QTensor.from_parts("uint4", codes, scales, zeros)
    assert q.zeros.dtype == np.float32
    np.testing.assert_array_equal(q.dequantize(), (codes - zeros) * scales)
    x = np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(x @ q.T, x @ q.dequantize().T, rtol=1e-6)
    assert pickle.loads(pickle.dumps(q)) == q
    assert q != nb.QTensor.from_parts("uint4", codes, scales, np.array([[1], [7]]))


def test_axis(rng: np.random.Generator) -> None:
    w = rng.standard_normal((48, 20)).astype(np.float32)
    q = nb.quantize(w, "int4_g16", axis=0)
    assert q == nb.quantize(w.T, "int4_g16").T
    assert q.shape == w.shape
    assert q == nb.quantize(w, "int4_g16", axis=-2)
    assert nb.quantize(w, "int4_g16", axis=1) == nb.quantize(w, "int4_g16")
    x = rng.standard_normal((3, 48)).astype(np.float32)
    np.testing.assert_array_equal(x @ q, x @ nb.quantize(w.T, "int4_g16").T)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.int64, bool, ">f4"]
)
def test_quantize_takes_every_real_type(rng: np.random.Generator, dtype: Any) -> None:
    w = (rng.standard_normal((6, 32)) * 10).astype(dtype)
    want = nb.quantize(w.astype(np.float32), "int4_g16")
    assert nb.quantize(w, "int4_g16") == want
    for v in (np.asfortranarray(w), np.repeat(w, 2, 1)[:, ::2], w[::-1][::-1]):
        assert nb.quantize(v, "int4_g16") == want
    assert nb.quantize(w.tolist(), "int4_g16") == want


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_threads_do_not_change_the_codes(rng: np.random.Generator, method: str) -> None:
    w = rng.standard_normal((130, 256)).astype(np.float32)
    first = nb.quantize(w, "int4_g32", method=method, threads=1)
    for n in (2, 3, 7, 64):
        assert nb.quantize(w, "int4_g32", method=method, threads=n) == first


def test_mse_is_never_worse(rng: np.random.Generator) -> None:
    w = rng.standard_normal((16, 256)).astype(np.float32)
    for fmt in ("int2_g32", "int4_g32", "uint4_g32", "bipolar2", "ternary_g64"):
        error = [
            np.square(nb.quantize(w, fmt, method=m).dequantize().astype(np.float64) - w).sum()
            for m in ("rtn", "mse")
        ]
        assert error[1] <= error[0] * (1 + 1e-9), fmt


# slices


ROWS = [
    slice(3, 9),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(5, 5),
    slice(-4, None),
    slice(0, 100),
    np.array([3, 1, 1, -1]),
    [0, 11],
    [],
    np.arange(12) % 3 == 0,
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows(q: nb.QTensor, rows: Any) -> None:
    dense = q.dequantize()
    part = q[rows]
    np.testing.assert_array_equal(part.dequantize(), dense[rows])
    np.testing.assert_array_equal(part.codes(), q.codes()[rows])
    np.testing.assert_array_equal(part.error_bound, q.error_bound[rows])
    np.testing.assert_array_equal(q.T[:, rows].dequantize(), dense[rows].T)
    x = np.arange(48, dtype=np.float32)
    np.testing.assert_array_equal(x @ part.T, (x @ q.T)[rows])
    assert q[rows, ...] == part
    assert q[rows, :] == part
    assert pickle.loads(pickle.dumps(part)) == part


def test_row_slices_are_views() -> None:
    q = nb.quantize(np.ones((100, 64), np.float32), "int4_g16")
    assert np.shares_memory(q[10:50].scales, q.scales)
    assert q[...] == q
    assert q[:] == q


def test_columns() -> None:
    w = np.random.default_rng(2).standard_normal((12, 52)).astype(np.float32)
    q = nb.quantize(w, "int4_g16")
    dense = q.dequantize()
    for start, stop in [(0, 16), (16, 48), (32, 52), (48, 52), (0, 52), (16, 16), (-20, None)]:
        part = q[2:7, start:stop]
        np.testing.assert_array_equal(part.dequantize(), dense[2:7, start:stop])
        np.testing.assert_array_equal(q.T[start:stop, 2:7].dequantize(), dense[2:7, start:stop].T)
        assert pickle.loads(pickle.dumps(part)) == part
    joined = [q[:, :16], q[:, 16:]]
    x = np.random.default_rng(3).standard_normal((4, 52))
    total = sum(x[:, a : a + p.shape[1]] @ p.T for a, p in zip((0, 16), joined, strict=True))
    np.testing.assert_allclose(total, x @ q.T, rtol=1e-5, atol=1e-5)


def test_refused_slices() -> None:
    q = nb.quantize(np.ones((12, 64), np.float32), "int4_g16")
    odd = nb.quantize(np.ones((12, 64), np.float32), "int3_g9")
    for key in [
        (slice(None), slice(3, 16)),
        (slice(None), slice(0, 15)),
        (slice(None), slice(8, 24)),
    ]:
        with pytest.raises(ValueError, match="group"):
            q[key]
    with pytest.raises(ValueError, match="bytes"):
        odd[:, 9:18]
    with pytest.raises(ValueError, match="group"):
        nb.quantize(np.ones((12, 64), np.float32), "int8")[:, :32]
    for bad in (
        0,
        -1,
        12,
        np.int64(3),
        None,
        "a",
        1.5,
        (0, 0),
        (slice(None), 3),
        (slice(None), [0, 1]),
        (slice(None), slice(None, None, 2)),
        (slice(None), slice(None), slice(None)),
        np.zeros((2, 2), int),
        [0.5],
        np.array([99]),
        np.ones(5, bool),
        True,
    ):
        with pytest.raises(IndexError):
            q[bad]
    with pytest.raises(TypeError):
        iter(q)
    with pytest.raises(TypeError):
        q[0:2] = 1
    with pytest.raises(AttributeError):
        q.shape = (1, 1)
    with pytest.raises(AttributeError):
        q.anything = 1


# equality, hashing, copies


def test_equality(q: nb.QTensor) -> None:
    w = np.random.default_rng(2).standard_normal((12, 48)).astype(np.float32)
    same = nb.quantize(w, q.format)
    assert (q == same) is True
    assert (q != same) is False
    w[3, 5] = -w[3, 5]
    assert (q == nb.quantize(w, q.format)) is False
    assert q != q[:6]
    assert q != q.dequantize().tolist()
    assert q != "int4"
    assert q is not None
    assert q != nb.quantize(w, "int7")
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("transposed", [False, True])
def test_pickle(q: nb.QTensor, protocol: int, transposed: bool) -> None:
    q.pack()
    start = q.T if transposed else q
    again = pickle.loads(pickle.dumps(start, protocol=protocol))
    assert again == start
    assert again.shape == start.shape
    np.testing.assert_array_equal(again.error_bound, start.error_bound)
    assert not again.scales.flags.writeable
    x = np.arange(48, dtype=np.float32)
    if transposed:
        np.testing.assert_array_equal(x @ again, x @ start)


def test_pickle_out_of_band() -> None:
    q = nb.quantize(np.random.default_rng(2).standard_normal((256, 1024)), "int4_g32")
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(q, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1500
    assert sum(b.raw().nbytes for b in buffers) == q.nbytes + q.error_bound.nbytes
    again = pickle.loads(data, buffers=buffers)
    assert again == q
    assert np.shares_memory(again.scales, q.scales)
    frozen = [bytes(b) for b in buffers]
    assert pickle.loads(data, buffers=frozen) == q


def test_pickle_of_nonsense_is_refused() -> None:
    q = nb.quantize(np.ones((4, 16), np.float32), "ternary")
    build, state = q.__reduce__()
    assert build(*state) == q
    for at, bad in [
        (1, 5),
        (2, 17),
        (2, 2**62),
        (1, -1),
        (1, 2**70),
        (0, "int9"),
        (3, state[3] | {"scales": np.full((4, 1), np.nan, "f4")}),
        (3, state[3] | {"scales": np.ones(4, "f4")}),
        (3, state[3] | {"scales": np.ones((4, 1), "f2")}),
        (3, state[3] | {"zeros": np.ones((4, 1), "u1")}),
        (3, {"codes": state[3]["codes"]}),
    ]:
        changed = list(state)
        changed[at] = bad
        with pytest.raises(ValueError, match=r"length|shape|scale|element|arrays"):
            build(*changed)
    changed = list(state)
    changed[3] = state[3] | {"codes": np.full_like(state[3]["codes"], 0xFF)}
    with pytest.raises(ValueError, match="code"):
        build(*changed)


def test_copies(q: nb.QTensor) -> None:
    shallow, deep = copy.copy(q), copy.deepcopy(q)
    assert shallow == q == deep
    assert np.shares_memory(shallow.scales, q.scales)
    assert not np.shares_memory(deep.scales, q.scales)
    assert copy.deepcopy(q.T) == q.T


def test_memory_is_given_back() -> None:
    q = nb.quantize(np.ones((8, 64), np.float32), "int4").pack()
    ref = weakref.ref(q)
    np.ones(64, np.float32) @ q.T
    del q
    gc.collect()
    assert ref() is None


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts references")
def test_no_reference_leaks() -> None:
    q = nb.quantize(np.ones((8, 64), np.float32), "int4").pack()
    x = np.ones((2, 64), np.float32)
    out = np.zeros((2, 8), np.float32)
    bias = np.zeros(8, np.float32)

    def work() -> None:
        x @ q.T
        nb.matmul(x, q.T, out=out, bias=bias, compute="int8")
        with pytest.raises(ValueError, match="mismatch"):
            x[:, 1:] @ q.T

    work()
    before = [sys.getrefcount(a) for a in (x, out, bias, q._storage, q._storage.packed)]
    for _ in range(50):
        work()
    gc.collect()
    assert [sys.getrefcount(a) for a in (x, out, bias, q._storage, q._storage.packed)] == before


@pytest.mark.parametrize("any_format", FORMATS)
@pytest.mark.parametrize("zeros", ["stored", "float"])
@pytest.mark.parametrize("k", [0, 1, 63, 200, 256])
def test_pack_without_the_portable_arrays(any_format: str, k: int, zeros: str) -> None:
    """Panels give back codes, scales and zero points bit for bit, and everything works on."""
    fmt = nb.Format(any_format)
    if zeros == "float" and (not fmt.has_zeros or fmt.scale == "i8"):
        pytest.skip("no zero points")
    want = nb.quantize(testing.values((37, k), k), any_format)
    if zeros == "float":
        z = testing.values(want.scales.shape, 3)
        want = nb.QTensor.from_parts(any_format, want.codes(), want.scales, z)
    q = copy.deepcopy(want)
    parts = {name: a.tobytes() for name, a in want.parts.items()}
    x = testing.values((3, k), 9)
    y = x @ q.T
    assert q.pack(keep=False) is q
    assert "codes" not in q._storage._arrays
    assert {name: a.tobytes() for name, a in q.parts.items()} == parts
    assert "codes" not in q._storage._arrays
    assert q == want
    assert q.nbytes == want.nbytes
    assert (q.codes() == want.codes()).all()
    assert q.scales.dtype == want.scales.dtype
    assert pickle.loads(pickle.dumps(q)) == want
    assert q[3:20] == want[3:20]
    assert (q.dequantize() == want.dequantize()).all()
    assert (x @ q.T == y).all()
    assert (x @ q.pack(keep=False).T == y).all()
