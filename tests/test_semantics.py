"""NumPy's matmul semantics: the same shapes, types, aliasing and errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import nibblas as nb

N, K = 24, 40


@pytest.fixture(scope="module")
def q() -> nb.QTensor:
    w = np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)
    return nb.quantize(w, "int4_g16")


def check(got: np.ndarray, want: np.ndarray, rtol: float = 1e-5) -> None:
    assert type(got) is np.ndarray
    assert got.shape == want.shape
    np.testing.assert_allclose(
        got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=1e-4
    )


LEFT_SHAPES = [
    (K,),
    (1, K),
    (7, K),
    (0, K),
    (3, 5, K),
    (2, 1, 4, K),
    (2, 0, 4, K),
    (0, 3, 4, K),
    (1, 1, 1, 1, K),
]


@pytest.mark.parametrize("shape", LEFT_SHAPES, ids=str)
def test_shapes_on_the_left(
    q: nb.QTensor, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    want = np.matmul(x, q.dequantize().T)
    check(x @ q.T, want)
    check(np.matmul(x, q.T), want)
    check(nb.matmul(x, q.T), want)


RIGHT_SHAPES = [(K,), (K, 1), (K, 7), (K, 0), (3, K, 5), (2, 1, K, 4), (0, K, 4), (5, K, 1)]


@pytest.mark.parametrize("shape", RIGHT_SHAPES, ids=str)
def test_shapes_on_the_right(
    q: nb.QTensor, rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    want = np.matmul(q.dequantize(), x)
    check(q @ x, want)
    check(np.matmul(q, x), want)
    check(nb.matmul(q, x), want)


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("m", [0, 1, 3])
@pytest.mark.parametrize("fmt", ["int4", "int4_g32", "uint4_g32", "ternary"])
def test_empty_weights(n: int, k: int, m: int, fmt: str) -> None:
    qw = nb.quantize(np.ones((n, k), np.float32), fmt)
    w = qw.dequantize()
    x = np.ones((m, k), np.float32)
    for compute in qw.format.computes:
        check(nb.matmul(x, qw.T, compute=compute), x @ w.T, rtol=0.01)
        bias = np.arange(n, dtype=np.float32)
        check(nb.matmul(x, qw.T, compute=compute, bias=bias), x @ w.T + bias, rtol=0.01)
    check(qw @ x.T, w @ x.T)
    check(x[:1].reshape(-1)[:k] @ qw.T if m else np.zeros(n), w.sum(1) if m else np.zeros(n))
    assert qw.dequantize().shape == (n, k)


def variants(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same values in memory of every kind."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(x.dtype).reshape(x.shape)
    misaligned[...] = x
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    readonly = x.copy()
    readonly.setflags(write=False)
    return {
        "c": np.ascontiguousarray(x),
        "fortran": np.asfortranarray(x),
        "negative_rows": np.ascontiguousarray(x[::-1])[::-1],
        "negative_columns": np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        "every_second": wide[..., ::2],
        "misaligned": misaligned,
        "swapped": x.astype(x.dtype.newbyteorder()),
        "readonly": readonly,
        "offset": np.concatenate([x, x])[len(x) :],
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int8, np.int32])
@pytest.mark.parametrize("shape", [(6, K), (2, 3, K)], ids=str)
def test_any_memory(
    q: nb.QTensor, rng: np.random.Generator, dtype: type, shape: tuple[int, ...]
) -> None:
    x = (rng.standard_normal(shape) * 5).astype(dtype)
    for compute in ("f32", "int8"):
        want = nb.matmul(x, q.T, compute=compute)
        for name, v in variants(x).items():
            got = nb.matmul(v, q.T, compute=compute)
            np.testing.assert_array_equal(got, want, err_msg=name)
            left = nb.matmul(q, np.swapaxes(v, -1, -2), compute=compute)
            np.testing.assert_array_equal(np.swapaxes(left, -1, -2), want, err_msg=name)


def test_any_order_of_a_stack(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 5, K)).astype(np.float32)
    want = x @ q.T
    for axes in [(1, 0, 2), (2, 1, 0), (0, 2, 1), (2, 0, 1), (1, 2, 0)]:
        np.testing.assert_array_equal(x.transpose(*axes, 3) @ q.T, want.transpose(*axes, 3))
    np.testing.assert_array_equal(x[::-1, :, ::2] @ q.T, want[::-1, :, ::2])
    np.testing.assert_array_equal(
        np.broadcast_to(x[:, :1], (3, 9, 5, K)) @ q.T, np.broadcast_to(want[:, :1], (3, 9, 5, N))
    )
    np.testing.assert_array_equal(
        np.broadcast_to(x[:1, :1, :1], (3, 4, 5, K)) @ q.T,
        np.broadcast_to(want[:1, :1, :1], want.shape),
    )


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (np.float16, np.float16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (">f4", np.float32),
        (">f8", np.float64),
        (">f2", np.float16),
        (bool, np.float32),
        (np.int8, np.float32),
        (np.uint8, np.float32),
        (np.int16, np.float32),
        (np.int64, np.float32),
        (">i4", np.float32),
        (np.uint64, np.float32),
        (ml_dtypes.float8_e4m3fn, np.float32),
        (ml_dtypes.int4, np.float32),
    ],
    ids=str,
)
def test_dtypes(q: nb.QTensor, dtype: object, result: type) -> None:
    x = (np.arange(3 * K).reshape(3, K) % 7).astype(dtype)
    got = x @ q.T
    assert got.dtype == result
    exact = x.astype(np.float32) @ q.T
    np.testing.assert_array_equal(got, exact.astype(result))
    np.testing.assert_array_equal(q @ x.T, got.T)
    np.testing.assert_array_equal(x[0] @ q.T, got[0])


def test_float16_overflow_is_infinite(q: nb.QTensor) -> None:
    x = np.full((1, K), 60000, np.float16)
    want = (x.astype(np.float32) @ q.T)[0]
    got = (x @ q.T)[0]
    assert np.isinf(got[np.abs(want) > 66000]).all()
    assert np.isinf(got).any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("given", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8])
def test_dtype_argument(q: nb.QTensor, rng: np.random.Generator, dtype: type, given: type) -> None:
    x = (rng.standard_normal((4, K)) * 3).astype(given)
    got = nb.matmul(x, q.T, dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, (x.astype(np.float32) @ q.T).astype(dtype))
    np.testing.assert_array_equal(np.matmul(x, q.T, dtype=dtype), got)


@pytest.mark.parametrize(
    "x", [[1.0] * K, [[1] * K] * 2, tuple([True] * K)], ids=["1d", "2d", "tuple"]
)
def test_sequences(q: nb.QTensor, x: object) -> None:
    array = np.asarray(x)
    check(x @ q.T, (array @ q.dequantize().T).astype(np.asarray(x @ q.T).dtype))
    check(q @ np.asarray(x).T, np.asarray(x @ q.T).T)


# out=


def outs(shape: tuple[int, ...], dtype: type) -> dict[str, np.ndarray]:
    big = np.full((*shape[:-1], 2 * shape[-1]), -7, dtype)
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1, np.uint8)
    return {
        "c": np.full(shape, -7, dtype),
        "fortran": np.full(shape[::-1], -7, dtype).T,
        "every_second": big[..., ::2],
        "negative": np.full(shape, -7, dtype)[::-1, ::-1],
        "misaligned": raw[1:].view(dtype).reshape(shape),
        "swapped": np.full(shape, -7, np.dtype(dtype).newbyteorder()),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_out(q: nb.QTensor, rng: np.random.Generator, dtype: type) -> None:
    x = rng.standard_normal((5, K)).astype(np.float32)
    want = (x @ q.T).astype(dtype)
    for name, out in outs((5, N), dtype).items():
        assert nb.matmul(x, q.T, out=out) is out, name
        np.testing.assert_array_equal(out, want, err_msg=name)
        out[...] = 0
        assert np.matmul(x, q.T, out=out) is out, name
        np.testing.assert_array_equal(out, want, err_msg=name)
        assert nb.matmul(q, x.T, out=out.T) is not None
        np.testing.assert_array_equal(out, want, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_results_begin_with_a_line_of_the_cache(
    q: nb.QTensor, rng: np.random.Generator, dtype: type
) -> None:
    rows = 2**20 // (q.shape[0] * np.dtype(dtype).itemsize) + 5
    x = rng.standard_normal((rows, q.shape[1])).astype(dtype)
    out = np.empty((rows, q.shape[0]), dtype)
    np.matmul(x, q.T, out=out)
    for y in (x @ q.T, nb.matmul(x, q.T, compute="f32"), np.matmul(x[None], q.T)[0]):
        assert y.ctypes.data % 64 == 0
        assert y.flags.c_contiguous
        assert y.flags.writeable
        np.testing.assert_array_equal(y, out)


def test_out_takes_what_rounding_gave(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, K)).astype(np.float16)
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        out = np.zeros((5, N), dtype)
        nb.matmul(x, q.T, out=out)
        np.testing.assert_array_equal(out, (x @ q.T).astype(dtype))


def test_out_complex_takes_a_real_result(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, K)).astype(np.float32)
    out = np.zeros((5, N), np.complex64)
    assert nb.matmul(x, q.T, out=out) is out
    np.testing.assert_array_equal(out, x @ q.T)


def test_out_vector_and_tuple(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal(K).astype(np.float32)
    out = np.zeros(2 * N, np.float32)[::2]
    assert nb.matmul(x, q.T, out=(out,)) is out
    np.testing.assert_array_equal(out, x @ q.T)
    assert nb.matmul(q, x, out=out) is out
    np.testing.assert_array_equal(out, x @ q.T)


def test_out_with_a_longer_stack(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, K)).astype(np.float32)
    out = np.zeros((4, 3, N), np.float32)
    assert nb.matmul(x, q.T, out=out) is out
    np.testing.assert_array_equal(out, np.broadcast_to(x @ q.T, out.shape))


@pytest.fixture(scope="module")
def square() -> nb.QTensor:
    w = np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32)
    return nb.quantize(w, "int8_g16")


@pytest.mark.parametrize("compute", ["f32", "int8"])
def test_out_aliases_the_input(square: nb.QTensor, rng: np.random.Generator, compute: str) -> None:
    start = rng.standard_normal((40, 32)).astype(np.float32)
    want = nb.matmul(start[4:36], square.T, compute=compute)
    for rows in (slice(4, 36), slice(0, 32), slice(8, 40)):
        x = start.copy()
        nb.matmul(x[4:36], square.T, out=x[rows], compute=compute)
        np.testing.assert_array_equal(x[rows], want)
    x = start.copy()
    nb.matmul(x[4:36], square.T, out=x[35:3:-1], compute=compute)
    np.testing.assert_array_equal(x[35:3:-1], want)
    x = start.copy()
    nb.matmul(square, x[4:36].T, out=x[4:36].T, compute=compute)
    np.testing.assert_array_equal(x[4:36], want)


def test_out_aliases_the_bias(square: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal(32).astype(np.float32)
    bias = rng.standard_normal(32).astype(np.float32)
    want = nb.matmul(x, square.T, bias=bias)
    assert nb.matmul(x, square.T, bias=bias, out=bias) is bias
    np.testing.assert_array_equal(bias, want)


def test_out_with_repeated_elements(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = np.repeat(rng.standard_normal((1, K)).astype(np.float32), 3, axis=0)
    row = np.zeros(N, np.float32)
    out = np.lib.stride_tricks.as_strided(row, (3, N), (0, 4))
    nb.matmul(x, q.T, out=out)
    np.testing.assert_array_equal(row, x[0] @ q.T)


def test_in_place(square: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 32)).astype(np.float32)
    want = x @ square.T
    same = x
    x @= square.T
    assert x is same
    np.testing.assert_array_equal(x, want)


# bias


@pytest.mark.parametrize("compute", ["f32", "int8", "int8_g32"])
def test_bias_is_added_last(q: nb.QTensor, rng: np.random.Generator, compute: str) -> None:
    x = rng.standard_normal((2, 5, K)).astype(np.float32)
    bias = rng.standard_normal(N).astype(np.float32)
    want = nb.matmul(x, q.T, compute=compute) + bias
    np.testing.assert_array_equal(nb.matmul(x, q.T, bias=bias, compute=compute), want)
    np.testing.assert_array_equal(nb.matmul(x, q.T, bias=bias[::-1][::-1], compute=compute), want)
    left = nb.matmul(q, x.swapaxes(1, 2), bias=bias, compute=compute)
    np.testing.assert_array_equal(left.swapaxes(1, 2), want)
    for dtype in (np.float64, ml_dtypes.bfloat16, np.float16):
        given = bias.astype(dtype)
        rounded = nb.matmul(x, q.T, compute=compute) + given.astype(np.float32)
        np.testing.assert_array_equal(nb.matmul(x, q.T, bias=given, compute=compute), rounded)
    whole = np.arange(N)
    np.testing.assert_array_equal(
        nb.matmul(x, q.T, bias=whole.tolist(), compute=compute),
        nb.matmul(x, q.T, compute=compute) + whole.astype(np.float32),
    )


# other array types


class Foreign:
    """An array of another library: DLPack and a namespace, no NumPy protocol."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __dlpack__(self, **kwargs: object) -> object:
        return self.data.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def __array_namespace__(self, *, api_version: str | None = None) -> type[ForeignNamespace]:
        return ForeignNamespace


class ForeignNamespace:
    @staticmethod
    def from_dlpack(x: object) -> Foreign:
        return Foreign(np.from_dlpack(x))


def test_dlpack_in_and_the_same_namespace_out(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, K)).astype(np.float32)
    got = nb.matmul(Foreign(x), q.T)
    assert type(got) is Foreign
    np.testing.assert_array_equal(got.data, x @ q.T)
    got = Foreign(x) @ q.T
    assert type(got) is Foreign
    w = rng.standard_normal((8, 16)).astype(np.float32)
    assert nb.quantize(Foreign(w), "int4") == nb.quantize(w, "int4")


class Arraylike:
    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.data


def test_array_protocol_in(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, K)).astype(np.float32)
    np.testing.assert_array_equal(Arraylike(x) @ q.T, x @ q.T)
    np.testing.assert_array_equal(q @ Arraylike(x.T), q @ x.T)


def test_subclasses(q: nb.QTensor, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, K)).astype(np.float32)

    class Sub(np.ndarray):
        pass

    np.testing.assert_array_equal(np.asarray(x.view(Sub) @ q.T), x @ q.T)
    with pytest.raises(TypeError, match="masked"):
        np.matmul(np.ma.masked_array(x), q.T)


# two QTensors


def test_two_tensors(rng: np.random.Generator) -> None:
    a = nb.quantize(rng.standard_normal((9, K)).astype(np.float32), "int8")
    b = nb.quantize(rng.standard_normal((N, K)).astype(np.float32), "int4")
    got = a @ b.T
    assert got.dtype == np.float32
    check(got, a.dequantize() @ b.dequantize().T)
    sums = nb.matmul(a, b.T, dtype=np.int32)
    want = a.codes().astype(np.int64) @ b.codes().astype(np.int64).T
    assert sums.dtype == np.int32
    np.testing.assert_array_equal(sums, want)
    np.testing.assert_array_equal(np.matmul(a, b.T), got)
    np.testing.assert_array_equal(np.matmul(a, b.T, dtype=np.int64), want)
    # The integers exactly, then one rounding for each scale.
    scaled = (want.astype(np.float32) * b.scales[:, 0]) * a.scales
    np.testing.assert_allclose(got, scaled, rtol=1e-6)


INTEGER_ELEMENTS = [
    e.name for e in nb.formats.table() if e.linear and e.bits <= 8 and e.group is None
]


@pytest.mark.parametrize("name", INTEGER_ELEMENTS)
def test_raw_sums_of_every_element(rng: np.random.Generator, name: str) -> None:
    a = nb.quantize(rng.standard_normal((5, 77)).astype(np.float32), name)
    b = nb.quantize(rng.standard_normal((6, 77)).astype(np.float32), "int8")

    def integers(q: nb.QTensor) -> np.ndarray:
        c = q.codes().astype(np.int64)
        return c if q.zeros is None else c - q.zeros.astype(np.int64)

    for p, r in ((a, b), (b, a), (a, a)):
        want = integers(p) @ integers(r).T
        for dtype in (np.int32, np.int64):
            got = nb.matmul(p, r.T, dtype=dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, want)
    out = np.zeros((6, 5), np.int64).T
    assert nb.matmul(a, b.T, dtype=np.int32, out=out) is out
    np.testing.assert_array_equal(out, integers(a) @ integers(b).T)


def test_raw_sums_past_int32() -> None:
    k = 2**31 // 127**2 + 2
    q = nb.QTensor.from_parts("int8", np.full((1, k), 127, np.int8), [1.0])
    with pytest.raises(ValueError, match="int64"):
        nb.matmul(q, q.T, dtype=np.int32)
    assert nb.matmul(q, q.T, dtype=np.int64).tolist() == [[k * 127 * 127]]
