"""Products without a multiplier, against arithmetic written a second time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import levels

import nibblas as nb
from nibblas import _core, approx, testing

SHAPES = [(1, 5, 40), (3, 70, 129), (17, 33, 300), (2, 1, 1), (5, 64, 600)]
FORMATS = [
    "int2_g32",
    "int4_g32",
    "int4_g128",
    "int8",
    "uint4_g32",
    "uint8",
    "uint3_g24",
    "bipolar1_g64",
    "bipolar3",
    "bipolar8_g128",
    "ternary_g32",
    "int6_g40_sbf16",
]


def shift_add(a: np.ndarray, q: nb.QTensor, isa: str, by: str = "planes") -> np.ndarray:
    y = np.empty((len(a), len(q)), np.float32)
    _core.ops_shift_add(by, a, q._storage.parts(), y, None, 1, isa)
    return y


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("fmt", FORMATS)
def test_shift_add_has_the_bits_of_the_integer_product(fmt: str, isa: str) -> None:
    """Scales after the group: the order that all grouped kernels use."""
    rng = np.random.default_rng(5)
    for m, n, k in SHAPES:
        a = rng.integers(-128, 128, (m, k)).astype(np.int8)
        q = nb.quantize(testing.values((n, k), 3), fmt)
        want = nb.matmul(a, q.T, compute="int8")
        np.testing.assert_array_equal(shift_add(a, q, isa).view(np.int32), want.view(np.int32))
        np.testing.assert_array_equal(approx.shift_add_matmul(a, q.T, threads=3), want)
        bias = testing.values((n,), 9)
        np.testing.assert_array_equal(
            approx.shift_add_matmul(a, q.T, bias=bias),
            nb.matmul(a, q.T, compute="int8", bias=bias),
        )


@pytest.mark.parametrize("fmt", ["int4_g32", "uint4_g32", "int8_g128", "bipolar3_g32"])
def test_scales_after_the_group_equal_scales_before(fmt: str, rng: np.random.Generator) -> None:
    """Decoding every weight first, in float64: within 1e-6, and equal for powers of two."""
    a = rng.integers(-128, 128, (9, 256)).astype(np.int8)
    q = nb.quantize(rng.normal(size=(40, 256)).astype(np.float32), fmt)
    powers = np.exp2(rng.integers(-3, 3, q.scales.shape)).astype(np.float32)
    zeros = None if q.zeros is None else np.asarray(q.zeros)
    even = nb.QTensor.from_parts(fmt, q.codes(), powers, zeros)
    for w, bound in ((q, 1e-6), (even, 0.0)):
        decoded = w.dequantize().astype(np.float64)
        first = a.astype(np.float64) @ decoded.T
        size = np.abs(a.astype(np.float64)) @ np.abs(decoded).T
        for after in (approx.shift_add_matmul(a, w.T), nb.matmul(a, w.T, compute="int8")):
            assert (np.abs(after - first) <= bound * size).all()


def test_shift_add_of_all_pairs() -> None:
    """Every 4-bit weight times every byte: 4096 products."""
    a = np.arange(-128, 128).astype(np.int8)[:, None]
    w = np.arange(-8, 8)[:, None]
    q = nb.QTensor.from_parts("int4", w, np.ones(16))
    np.testing.assert_array_equal(approx.shift_add_matmul(a, q.T), a.astype(int) * w[:, 0])


def test_shift_add_of_the_extremes() -> None:
    """Where sums of 16 bits would overflow, were they not emptied in time."""
    k = 5000
    for value in (-128, 127):
        a = np.full((2, k), value, np.int8)
        for w in (-128, 127):
            q = nb.QTensor.from_parts("int8", np.full((3, k), w), np.ones(3))
            want = np.float32(value * w * k)
            np.testing.assert_array_equal(approx.shift_add_matmul(a, q.T), np.full((2, 3), want))


def float_zeros() -> nb.QTensor:
    rng = np.random.default_rng(1)
    codes, scales = rng.integers(0, 16, (20, 96)), rng.random((20, 3)) + 0.5
    return nb.QTensor.from_parts("uint4_g32", codes, scales, rng.random((20, 3)) * 15)


def test_shift_add_with_float_zero_points() -> None:
    q, a = float_zeros(), np.random.default_rng(2).integers(-128, 128, (7, 96)).astype(np.int8)
    want = nb.matmul(a, q.T, compute="int8")
    np.testing.assert_array_equal(approx.shift_add_matmul(a, q.T), want)
    with pytest.raises(ValueError, match="float zero points have no binary digits"):
        approx.shift_add_matmul(a.astype(np.float16), q.T)


def half_product(a: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """The definition: exact products, float32 sums per group, one fma for the scale."""
    w = q.codes().astype(np.int64)
    group = q.format.group or max(w.shape[1], 1)
    y = np.zeros((len(a), len(w)), np.float32)
    scales = q.scales.astype(np.float64)
    for g, start in enumerate(range(0, w.shape[1], group)):
        part = slice(start, min(start + group, w.shape[1]))
        value = w[:, part] - (0 if q.zeros is None else q.zeros[:, g : g + 1].astype(np.int64))
        d = np.zeros_like(y)
        for k in range(value.shape[1]):
            product = a[:, part].astype(np.float64)[:, k : k + 1] * value[:, k]
            assert np.array_equal(product, product.astype(np.float32), equal_nan=True)
            d = (d.astype(np.float64) + product).astype(np.float32)
        y = (d.astype(np.longdouble) * scales[:, g] + y).astype(np.float32)
    return y


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("fmt", ["int4_g32", "uint4_g32", "int8", "bipolar3", "ternary_g32"])
def test_shift_add_of_halves(fmt: str, isa: str) -> None:
    for m, n, k in SHAPES:
        a = testing.values((m, k), 8).astype(np.float16)
        a[0, : min(k, 5)] = np.array([0.0, -0.0, 6e-8, -3e-5, 65504.0])[: min(k, 5)]
        q = nb.quantize(testing.values((n, k), 3), fmt)
        got = shift_add(a.astype(np.float32), q, isa)
        # The sum of an exact product and a float32 in float64 may round twice, once in 2^29.
        np.testing.assert_allclose(got, half_product(a, q), rtol=3e-7, atol=0)
        near = a.astype(np.float64) @ q.dequantize().astype(np.float64).T
        bound = np.abs(a.astype(np.float64)) @ np.abs(q.dequantize().astype(np.float64)).T
        assert (np.abs(got - near) <= (k + 2) * 2.0**-23 * bound + 1e-30).all()


def test_shift_add_of_halves_is_exact_where_numbers_are() -> None:
    """Every 4-bit weight times every finite float16, subnormal numbers included."""
    a = np.arange(2**16, dtype=np.uint16).view(np.float16)
    a = a[np.isfinite(a)][:, None]
    w = np.arange(-8, 8)[:, None]
    q = nb.QTensor.from_parts("int4", w, np.ones(16))
    want = a.astype(np.float32) * w[:, 0].astype(np.float32)
    got = shift_add(a.astype(np.float32), q, levels()[-1])
    np.testing.assert_array_equal(got, want)
    out = approx.shift_add_matmul(a, q.T)
    assert out.dtype == np.float16
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, want.astype(np.float16))


def test_shift_add_of_rows_that_are_not_finite() -> None:
    a = np.ones((4, 40), np.float16)
    a[1, 3], a[2, 5] = np.nan, np.inf
    w = np.ones((2, 40))
    w[1, 5] = 0
    y = approx.shift_add_matmul(a, nb.QTensor.from_parts("int4", w.astype(int), np.ones(2)).T)
    np.testing.assert_array_equal(y[[0, 3]], [[40, 39]] * 2)
    assert np.isnan(y[1]).all()
    assert np.isposinf(y[2, 0])
    assert np.isnan(y[2, 1])


def test_shift_add_bad_input() -> None:
    q = nb.quantize(np.ones((4, 8), np.float32), "int4")
    with pytest.raises(TypeError, match="int8, float16 or bfloat16, got float32"):
        approx.shift_add_matmul(np.ones((2, 8), np.float32), q.T)
    with pytest.raises(ValueError, match="mismatch in its core dimension"):
        approx.shift_add_matmul(np.ones((2, 7), np.int8), q.T)
    with pytest.raises(TypeError, match="needs a QTensor"):
        approx.shift_add_matmul(np.ones((2, 8), np.int8), np.ones((8, 4)))
    for fmt in ("nf4", "mxfp4", "e4m3"):
        table = nb.quantize(np.ones((4, 32), np.float32), fmt)
        with pytest.raises(ValueError, match="no binary digits"):
            approx.shift_add_matmul(np.ones((2, 32), np.int8), table.T)
    none = nb.quantize(np.ones((4, 0), np.float32), "int4")
    assert (approx.shift_add_matmul(np.ones((2, 0), np.int8), none.T) == 0).all()
    assert approx.shift_add_matmul(np.ones((0, 8), np.int8), q.T).shape == (0, 4)
    assert approx.shift_add_matmul(np.ones((2, 3, 8), np.int8), q.T).shape == (2, 3, 4)
    bf16 = np.ones((2, 8), ml_dtypes.bfloat16)
    assert approx.shift_add_matmul(bf16, q.T).dtype == ml_dtypes.bfloat16


# L-Mul.


def lmul_of_bits(x: int, y: int, e: int, m: int, kind: str, correction: int) -> int:
    """One product of bit patterns by the integer addition, special cases first."""
    bias = 2 ** (e - 1) - 1
    top = (2**e - 1) << m
    mask = 2 ** (e + m) - 1
    sign = (x ^ y) >> (e + m) << (e + m)
    x, y = x & mask, y & mask
    largest = {"ieee": top - 1, "nan": mask - 1, "none": mask}[kind]
    zero_x, zero_y = x >> m == 0, y >> m == 0
    if kind == "ieee" and (x > top or y > top):
        return -1
    if kind == "nan" and mask in (x, y):
        return -1
    if kind == "ieee" and (x == top or y == top):
        return -1 if zero_x or zero_y else sign | top
    if zero_x or zero_y:
        return sign
    r = x + y - (bias << m) + correction
    return sign | (0 if r < 1 << m else min(r, largest))


EIGHT = [("e4m3", 4, 3, "nan", 1), ("e5m2", 5, 2, "ieee", 1), ("e3m4", 3, 4, "ieee", 2)]


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize(("name", "e", "m", "kind", "correction"), EIGHT)
def test_every_pair_of_eight_bits(
    name: str, e: int, m: int, kind: str, correction: int, isa: str
) -> None:
    u = np.arange(256, dtype=np.uint8)
    want = np.array(
        [[lmul_of_bits(x, y, e, m, kind, correction) for y in range(256)] for x in range(256)]
    )
    got = approx.lmul(u[:, None], u, format=name).astype(int)
    nan = want == -1
    np.testing.assert_array_equal(got[~nan], want[~nan])
    values = approx._decode(got.astype(np.uint8), approx.SmallFloat.parse(name))
    assert np.isnan(values[nan]).all()
    fmt = approx.SmallFloat.parse(name)
    x = approx._decode(u, fmt)
    left, right = (np.ascontiguousarray(v) for v in np.broadcast_arrays(x[:, None], x))
    y = np.empty(left.shape, np.float32)
    _core.ops_lmul(left, right, y, approx._model(fmt, name, None, "saturate"), 1, isa)
    np.testing.assert_array_equal(y, values)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e4m3", "float8_e4m3fn"),
        ("e5m2", "float8_e5m2"),
        ("e3m2", "float6_e3m2fn"),
        ("e2m3", "float6_e2m3fn"),
        ("e2m1", "float4_e2m1fn"),
        ("bf16", "bfloat16"),
    ],
)
def test_formats_are_those_of_ml_dtypes(name: str, dtype: str) -> None:
    other = np.dtype(getattr(ml_dtypes, dtype))
    fmt = approx.SmallFloat.parse(name)
    bits = 1 + fmt.exponent + fmt.mantissa
    word = np.uint16 if bits > 8 else np.uint8
    u = np.arange(2**bits, dtype=word)
    values = approx._decode(u, fmt)
    np.testing.assert_array_equal(values, u.view(other).astype(np.float32))
    assert fmt.largest == float(ml_dtypes.finfo(other).max)
    clean = np.isfinite(values)
    # -0 keeps its sign, subnormal numbers are flushed by products and not by the coding.
    normal = clean & (np.abs(values) >= fmt.smallest)
    np.testing.assert_array_equal(approx._encode(values[normal], fmt, word), u[normal])
    x = testing.values((4000,), 2) * 3
    near = x.astype(other).astype(np.float32)
    keep = np.abs(near) < fmt.largest
    np.testing.assert_array_equal(approx._round(x, fmt)[keep], near[keep])


def test_scalar_values() -> None:
    a, b = np.float32([1, 1.5, 3, -2, 0, -0.0]), np.float32([1, 1.5, 5, 0.75, 7, 7])
    want = np.float32([1.0625, 2.125, 14.5, -1.5625, 0, -0.0])
    np.testing.assert_array_equal(approx.lmul(a, b).view(np.int32), want.view(np.int32))
    offsets = {"fp32": 0x3F780000, "bf16": 0x3F78, "fp16": 0x3BC0, "e4m3": 0x37, "e5m2": 0x3B}
    for name, want_offset in offsets.items():
        fmt = approx.SmallFloat.parse(name)
        one = approx._model(fmt, name, None, "saturate")[0]
        assert (one >> (23 - fmt.mantissa)) - ((127 - fmt.bias) << fmt.mantissa) == want_offset


TABLE = [
    (None, 0.405, 2.65, 3.09, -7.29, 6.25),
    ("mitchell", -3.85, 3.85, 4.84, -11.11, 0.0),
    (0.125, 4.85, 5.10, 5.82, -3.2, 12.5),
    (0.045, -0.81, 2.53, 3.14, -8.38, 4.5),
    # Without a mean error.
    (0.0567, 0.0, 2.58, 3.05, -7.65, 5.67),
]


@pytest.mark.parametrize(("offset", "mean", "absolute", "rms", "low", "high"), TABLE)
def test_error_table(
    offset: object, mean: float, absolute: float, rms: float, low: float, high: float
) -> None:
    """Two million pairs with evenly spread mantissas, in per cent."""
    rng = np.random.default_rng(7)
    x, y = (1 + rng.random((2, 2_000_000))).astype(np.float32)
    product = approx.lmul(x, y, offset=offset).astype(np.float64)
    error = 100 * (product / (x.astype(np.float64) * y) - 1)
    found = [
        error.mean(),
        np.abs(error).mean(),
        np.sqrt((error**2).mean()),
        error.min(),
        error.max(),
    ]
    np.testing.assert_allclose(found, [mean, absolute, rms, low, high], atol=0.02)


def test_least_squares_is_least() -> None:
    grid = 1 + (np.arange(700, dtype=np.float32) + 0.5) / 700
    x, y = np.meshgrid(grid, grid)

    def loss(offset: object) -> float:
        error = approx.lmul(x, y, offset=offset) / (x.astype(np.float64) * y) - 1
        return float((error**2).mean())

    best = loss("least_squares")
    assert all(best <= loss(c) for c in (0.05, 0.0525, 0.058, 0.06, 1 / 16, 0))


def test_special_values() -> None:
    inf, nan = np.inf, np.nan
    a = np.float32([nan, inf, inf, -inf, inf, 1e-40, 3e38, 1e-30, -1e-30])
    b = np.float32([1.0, 2.0, 0.0, 3.0, -inf, 1e30, 3e38, 1e-30, 1e-30])
    got = approx.lmul(a, b)
    top = np.finfo(np.float32).max
    np.testing.assert_array_equal(got, np.float32([nan, inf, nan, -inf, -inf, 0, top, 0, -0.0]))
    assert np.signbit(got[-1])
    over = approx.lmul(np.float32([3e38, -3e38]), np.float32([3e38, 3e38]), overflow="inf")
    np.testing.assert_array_equal(over, [inf, -inf])
    for name in ("float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        big = np.array([ml_dtypes.finfo(dtype).max], dtype)
        assert approx.lmul(big, big).astype(np.float32) == np.float32(big)
        assert approx.lmul(big, big).dtype == dtype
    with pytest.raises(ValueError, match="has no infinity"):
        approx.lmul(np.uint8([1]), np.uint8([1]), format="e4m3", overflow="inf")


def test_sixteen_bits_equal_their_bit_patterns(rng: np.random.Generator) -> None:
    for name, dtype in (("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)):
        fmt = approx.SmallFloat.parse(name)
        u, v = rng.integers(0, 2**16, (2, 4000)).astype(np.uint16)
        got = approx.lmul(u.view(dtype), v.view(dtype))
        bits = approx.lmul(u, v, format=name)
        m = fmt.mantissa
        want = [
            lmul_of_bits(int(x), int(y), fmt.exponent, m, "ieee", 1 << (m - 4))
            for x, y in zip(u, v, strict=True)
        ]
        good = np.array(want) != -1
        np.testing.assert_array_equal(bits[good], np.array(want)[good])
        np.testing.assert_array_equal(got.view(np.uint16)[good], np.array(want)[good])
        assert np.isnan(got[~good].astype(np.float32)).all()


def test_lmul_bad_input() -> None:
    f = np.ones(3, np.float32)
    with pytest.raises(TypeError, match="float64 need format"):
        approx.lmul(f.astype(np.float64), f)
    with pytest.raises(TypeError, match="differ in type"):
        approx.lmul(f, f.astype(np.float16))
    with pytest.raises(ValueError, match="unknown format 'fp9'"):
        approx.lmul(f, f, format="fp9")
    with pytest.raises(ValueError, match="2 to 8 bits of exponent"):
        approx.lmul(f, f, format="e9m3")
    with pytest.raises(ValueError, match=r"offset must lie in \[0, 1\), got 1.5"):
        approx.lmul(f, f, offset=1.5)
    with pytest.raises(ValueError, match="unknown offset 'best'"):
        approx.lmul(f, f, offset="best")
    with pytest.raises(ValueError, match="unknown overflow"):
        approx.lmul(f, f, overflow="wrap")
    with pytest.raises(ValueError, match="bit patterns of 4 bits, got 16"):
        approx.lmul(np.uint8([16]), np.uint8([1]), format="e2m1")
    with pytest.raises(TypeError, match="too short"):
        approx.lmul(np.uint8([16]), np.uint8([1]), format="fp16")
    with pytest.raises(ValueError, match="do not fit"):
        approx.lmul_matmul(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match="has no infinity"):
        approx.lmul(np.float32([np.inf]), f, format="e2m1")


def sequential(a: np.ndarray, b: np.ndarray, **options: object) -> np.ndarray:
    y = np.zeros((len(a), b.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for k in range(len(b)):
            y = y + approx.lmul(a[:, k : k + 1], b[k], **options).astype(np.float32)
    return y


@pytest.mark.parametrize("isa", levels())
def test_lmul_matmul(isa: str) -> None:
    fmt = approx.SmallFloat.parse("fp32")
    for m, n, k in [*SHAPES, (9, 700, 30)]:
        a, b = testing.values((m, k), 1), testing.values((k, n), 2)
        a[0, 0], b[k // 2, n // 2] = 0, 1e-41
        y = np.empty((m, n), np.float32)
        _core.ops_lmul_matmul(a, b, y, n, k, approx._model(fmt, "fp32", None, "saturate"), 1, isa)
        np.testing.assert_array_equal(y, sequential(a, b))
        for threads in (2, 5):
            np.testing.assert_array_equal(approx.lmul_matmul(a, b, threads=threads), y)
    a[0, 3], b[2, 4], b[5, 5] = np.inf, np.nan, -np.inf
    np.testing.assert_array_equal(approx.lmul_matmul(a, b), sequential(a, b))
    assert approx.lmul_matmul(a[:, :0], b[:0]).tolist() == np.zeros((9, 700)).tolist()
    assert approx.lmul_matmul(a[:0], b).shape == (0, 700)


def test_lmul_matmul_of_formats() -> None:
    a, b = testing.values((4, 50), 1), testing.values((50, 9), 2)
    for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        x, y = a.astype(dtype), b.astype(dtype)
        np.testing.assert_array_equal(approx.lmul_matmul(x, y), sequential(x, y))
    options = {"format": "e3m4", "offset": "mitchell"}
    np.testing.assert_array_equal(approx.lmul_matmul(a, b, **options), sequential(a, b, **options))


# Signs.


def test_hamming_and_matadd(rng: np.random.Generator) -> None:
    for m, n, k in SHAPES:
        a, b = rng.integers(0, 2, (m, k)) * 2 - 1, rng.integers(0, 2, (n, k)) * 2 - 1
        got = approx.hamming_matmul(a, b)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, a @ b.T)
        np.testing.assert_array_equal(approx.hamming_matmul(a > 0, b > 0), a @ b.T)
        x = rng.integers(-128, 128, (m, k)).astype(np.int8)
        np.testing.assert_array_equal(approx.matadd(x, b), x.astype(int) @ b.T)
        f = testing.values((m, k), 4)
        total = np.zeros((m, n), np.float32)
        for i in range(k):
            total = total + f[:, i : i + 1] * b[:, i].astype(np.float32)
        np.testing.assert_array_equal(approx.matadd(f, b), total)
    q = nb.quantize(testing.values((6, 40), 1), "bipolar1")
    signs = q.codes().astype(int)
    np.testing.assert_array_equal(approx.hamming_matmul(q, q), signs @ signs.T)
    none = np.zeros((2, 0), np.int8), np.zeros((3, 0), np.int8)
    for product in (approx.hamming_matmul, approx.matadd):
        np.testing.assert_array_equal(product(*none), np.zeros((2, 3)))
    floats = approx.matadd(none[0].astype(np.float32), none[1])
    np.testing.assert_array_equal(floats, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="-1 and 1 alone"):
        approx.hamming_matmul([[0, 1]], [[1, 1]])
    with pytest.raises(ValueError, match="one scale per row"):
        approx.hamming_matmul(nb.quantize(np.ones((2, 64), np.float32), "bipolar1_g32"), a)
    with pytest.raises(TypeError, match="int8 or floats"):
        approx.matadd(np.ones((2, 4), np.int32), np.ones((3, 4)))


def test_hashed_attention(rng: np.random.Generator) -> None:
    """The linear form equals the quadratic one; what was published does not."""
    tokens, bits, d = 37, 16, 8
    x = rng.standard_normal((tokens, 12))
    anchors, projection = rng.standard_normal((25, 12)), rng.standard_normal((bits, 25))
    h = approx.hash_codes(x, anchors, projection)
    assert h.shape == (tokens, bits)
    assert set(np.unique(h)) == {-1, 1}
    np.testing.assert_array_equal(approx.hash_codes(3 * x, anchors, projection), h)
    assert (approx.hash_codes(x, anchors, 0 * projection) == 1).all()
    v = rng.standard_normal((tokens, d)).astype(np.float32)
    weights = h.astype(float) @ h.T + bits + 1
    assert weights.min() >= 1
    want = weights @ v / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(approx.hashed_attention(h, h, v), want, atol=1e-5)
    ones = np.ones((tokens, d), np.float32)
    np.testing.assert_allclose(approx.hashed_attention(h, h, ones), ones, atol=1e-5)
    published = approx.hashed_attention(h, h, v, compat="ecoformer")
    own = (h @ (h.T.astype(float) @ v) + (bits + 1) * v) / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(published, own, atol=1e-5)
    assert np.abs(published - want).max() > 0.01
    with pytest.raises(ValueError, match="no token"):
        approx.hashed_attention(h, h[:0], v[:0])
    with pytest.raises(ValueError, match="do not fit"):
        approx.hashed_attention(h, h, v[1:])
    with pytest.raises(ValueError, match="as long"):
        approx.hashed_attention(h[1:], h, v, compat="ecoformer")
    assert approx.hashed_attention(h[:3], h, v).shape == (3, d)


def test_angular_attention(rng: np.random.Generator) -> None:
    q, k = rng.integers(0, 2, (2, 19, 16)) * 2 - 1
    v = rng.standard_normal((19, 6)).astype(np.float32)
    want = v / 2 + q @ (k.T @ v.astype(float)) / np.pi
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(approx.angular_attention(q, k, v), want, atol=1e-5)
    assert not approx.angular_attention(q, k, 0 * v).any()
    with pytest.raises(ValueError, match="do not fit"):
        approx.angular_attention(q[1:], k, v)


# Shifts.

POWERS = ["pow2_3", "pow2_4", "pow2_4_g32", "pow2_5_g24", "pow2_6", "e3m0", "log2_4_g32"]
POWERS += ["ternary_g32", "bipolar1_g64", "int2"]


def shift_sums(a: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """Group by group in Python integers, from the levels of the format."""
    scales = q.scales.astype(np.float64)
    ones = np.ones_like(q.scales)
    level = nb.QTensor.from_parts(q.format, q.codes(), ones).dequantize().astype(np.float64)
    low = np.abs(level[level != 0]).min(initial=1)
    steps = np.rint(level / low).astype(np.int64)
    assert np.array_equal(steps * low, level)
    group = q.format.group or max(q.shape[1], 1)
    y = np.zeros((len(a), len(q)), np.float32)
    for g, start in enumerate(range(0, q.shape[1], group)):
        part = slice(start, start + group)
        d = a[:, part].astype(np.int64) @ steps[:, part].T
        near = d.astype(np.float32).astype(np.longdouble) * low
        y = (near * scales[:, g] + y).astype(np.float32)
    return y


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("fmt", POWERS)
def test_shift_matmul(fmt: str, isa: str) -> None:
    rng = np.random.default_rng(5)
    for m, n, k in SHAPES:
        a = rng.integers(-128, 128, (m, k)).astype(np.int8)
        q = nb.quantize(testing.values((n, k), 3), fmt)
        got = shift_add(a, q, isa, "powers")
        np.testing.assert_array_equal(got, shift_sums(a, q))
        np.testing.assert_array_equal(approx.shift_matmul(a, q.T, threads=3), got)
        if "int8" in q.format.computes:
            np.testing.assert_array_equal(got, nb.matmul(a, q.T, compute="int8"))
        half = testing.values((m, k), 8).astype(np.float16)
        wide = half.astype(np.float32)
        ones = nb.QTensor.from_parts(q.format, q.codes(), np.ones_like(q.scales)).dequantize()
        group, y = q.format.group or k, np.zeros((m, n), np.float32)
        for g, start in enumerate(range(0, k, group)):
            d = np.zeros((m, n), np.float32)
            for i in range(start, min(start + group, k)):
                d += wide[:, i : i + 1] * ones[:, i]
            y = (d.astype(np.longdouble) * q.scales[:, g].astype(np.float64) + y).astype(np.float32)
        np.testing.assert_array_equal(shift_add(wide, q, isa, "powers"), y)


def test_shift_matmul_of_all_pairs() -> None:
    """Every byte and every power; every finite float16 and every power."""
    q = nb.QTensor.from_parts("pow2_4", np.arange(16)[:, None], np.ones(16))
    w = q.dequantize()[:, 0]
    a = np.arange(-128, 128).astype(np.int8)[:, None]
    np.testing.assert_array_equal(approx.shift_matmul(a, q.T), a.astype(np.float32) * w)
    a = np.arange(2**16, dtype=np.uint16).view(np.float16)
    a = a[np.isfinite(a)][:, None]
    got = shift_add(a.astype(np.float32), q, levels()[-1], "powers")
    np.testing.assert_array_equal(got, a.astype(np.float32) * w)


def test_shift_sums_do_not_wrap() -> None:
    """The largest sums of every width, over more values than 32 bits hold."""
    k = 5000
    for fmt in ("pow2_3", "pow2_4", "pow2_5", "pow2_6"):
        values = nb.Format(fmt).element.values
        top = int(np.argmax(values))
        q = nb.QTensor.from_parts(fmt, np.full((2, k), top), np.ones(2))
        for value in (-128, 127):
            a = np.full((1, k), value, np.int8)
            np.testing.assert_array_equal(approx.shift_matmul(a, q.T), np.full((1, 2), value * k))


@pytest.mark.parametrize("product", [approx.shift_add_matmul, approx.shift_matmul])
def test_shifts_at_the_ends_of_bfloat16(product) -> None:
    """Where adding to the exponent would leave float32: what multiplication gives."""
    values = [1e-39, -1e-40, 1.2e-38, 1e38, 3e38, -3e38, np.inf, np.nan, 0.0, -0.0]
    a = np.array(values, ml_dtypes.bfloat16)[:, None]
    fmt, codes = (
        ("int4", [7, 3, -8, 1]) if product is approx.shift_add_matmul else ("int2", [1, -2])
    )
    q = nb.QTensor.from_parts(fmt, np.array(codes)[:, None], np.ones(len(codes)))
    with np.errstate(over="ignore"):
        want = (a.astype(np.float32) * np.float32(codes)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(product(a, q.T).astype(np.float32), want.astype(np.float32))


def test_shift_add_of_more_than_eight_bits() -> None:
    rng = np.random.default_rng(4)
    a = rng.integers(-128, 128, (3, 300)).astype(np.int8)
    for fmt in ("bfp9", "bfp12", "bfp16", "dfp16"):
        q = nb.quantize(testing.values((5, 300), 2), fmt)
        exact = a.astype(np.float64) @ q.dequantize().astype(np.float64).T
        for isa in levels():
            np.testing.assert_allclose(shift_add(a, q, isa), exact, rtol=1e-5, atol=1e-4)
    half = a.astype(np.float16)
    near = approx.shift_add_matmul(half, nb.quantize(testing.values((5, 300), 2), "bfp12").T)
    assert np.isfinite(near).all()
    with pytest.raises(ValueError, match="exact up to 12 bits"):
        approx.shift_add_matmul(half, q.T)


def test_shift_matmul_bad_input() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        approx.shift_matmul(np.ones((1, 8), np.int8), nb.quantize(np.ones((4, 8)), "int4").T)
    with pytest.raises(ValueError, match="powers of two"):
        approx.shift_matmul(np.ones((1, 8), np.int8), nb.quantize(np.ones((4, 8)), "uint2").T)
    q = nb.quantize(np.ones((4, 8), np.float32), "pow2_4")
    with pytest.raises(TypeError, match="int8, float16 or bfloat16, got float32"):
        approx.shift_matmul(np.ones((2, 8), np.float32), q.T)
    with pytest.raises(TypeError, match="shift_matmul needs a QTensor"):
        approx.shift_matmul(np.ones((2, 8), np.int8), np.ones((8, 4)))
    with pytest.raises(ValueError, match="mismatch in its core dimension"):
        approx.shift_matmul(np.ones((2, 7), np.int8), q.T)
    none = nb.quantize(np.ones((4, 0), np.float32), "pow2_4")
    assert (approx.shift_matmul(np.ones((2, 0), np.int8), none.T) == 0).all()
    assert approx.shift_matmul(np.ones((0, 8), np.int8), q.T).shape == (0, 4)
    bias = np.float32([1, 2, 3, 4])
    np.testing.assert_array_equal(
        approx.shift_matmul(np.ones((1, 8), np.int8), q.T, bias=bias), [8 + bias]
    )
    a = np.ones((2, 8), np.float16)
    a[1, 0] = np.inf
    np.testing.assert_array_equal(approx.shift_matmul(a, q.T), [[8] * 4, [np.inf] * 4])


# The mixture of a multiplication and a shift expert.


@pytest.mark.parametrize("dtype", [np.int8, np.float16])
def test_experts(dtype: type, rng: np.random.Generator) -> None:
    w = rng.normal(size=(2, 24, 64)).astype(np.float32)
    multiply, shift = nb.quantize(w[0], "int8"), nb.quantize(w[1], "pow2_4_g32")
    router = rng.normal(size=(2, 64)).astype(np.float32)
    bias = rng.normal(size=24).astype(np.float32)
    x = (rng.normal(size=(3, 40, 64)) * 20).astype(dtype)
    routed = approx.expert_matmul(x, multiply.T, shift.T, router, bias=bias)
    scores = x.astype(np.float64) @ router.astype(np.float64).T
    np.testing.assert_array_equal(routed.shifted, scores[..., 1] > scores[..., 0])
    assert 0.2 < routed.shifted.mean() < 0.8
    odds = 1 / (1 + np.exp(scores[..., 0] - scores[..., 1]))
    np.testing.assert_allclose(routed.gates, np.stack([1 - odds, odds], -1), atol=1e-4)
    compute = "int8" if dtype == np.int8 else "f32"
    both = (
        nb.matmul(x, multiply.T, compute=compute, bias=bias),
        approx.shift_matmul(x, shift.T, bias=bias),
    )
    chosen = np.where(routed.shifted[..., None], both[1], both[0]).astype(np.float32)
    gate = np.where(routed.shifted, routed.gates[..., 1], routed.gates[..., 0])
    want = (chosen * gate[..., None]).astype(np.float32 if dtype == np.int8 else dtype)
    assert routed.output.dtype == want.dtype
    np.testing.assert_array_equal(routed.output, want)
    alone = approx.expert_matmul(x[1, 7], multiply.T, shift.T, router, bias=bias)
    np.testing.assert_array_equal(alone.output, want[1, 7])
    assert alone.shifted.shape == ()


def test_experts_where_one_has_nothing_to_do(rng: np.random.Generator) -> None:
    w = nb.quantize(np.eye(4, 8, dtype=np.float32), "int8")
    powers = nb.quantize(np.eye(4, 8, dtype=np.float32), "pow2_4")
    router = np.zeros((2, 8), np.float32)
    x = rng.integers(-9, 9, (5, 8)).astype(np.int8)
    equal = approx.expert_matmul(x, w.T, powers.T, router)
    assert not equal.shifted.any()
    assert (equal.gates == 0.5).all()
    np.testing.assert_allclose(equal.output, x[:, :4] / 2, rtol=1e-3)
    empty = approx.expert_matmul(x[:0], w.T, powers.T, nb.quantize(router, "f32"))
    assert empty.output.shape == (0, 4)


def test_expert_balance() -> None:
    shifted = np.array([True] * 6 + [False] * 2)
    gates = np.where(shifted[:, None], (0.25, 0.75), (0.75, 0.25))
    # Three times as fast, three times as many tokens.
    importance, load = approx.expert_balance(gates, shifted, (3.0, 1.0))
    assert load == 0
    # 3 and 5 of 8 by the gates: busy for 9 and 5.
    assert importance == pytest.approx((2 / 7) ** 2)
    assert approx.expert_balance(gates, shifted, (1.0, 1.0))[1] == pytest.approx(0.25)


def test_experts_bad_input(rng: np.random.Generator) -> None:
    w = nb.quantize(rng.normal(size=(4, 8)).astype(np.float32), "int8")
    powers = nb.quantize(rng.normal(size=(4, 8)).astype(np.float32), "pow2_4")
    x, router = np.ones((2, 8), np.int8), np.zeros((2, 8), np.float32)
    for arguments, error, match in [
        ((x.astype(np.float32), w.T, powers.T, router), TypeError, "int8, float16 or bfloat16"),
        ((x, w.T, powers.dequantize(), router), TypeError, "shift must be a QTensor"),
        ((x, w.T, powers[:3].T, router), ValueError, "experts differ"),
        ((x, w.T, w.T, np.ones((2, 8)) * [[0], [1]]), ValueError, "powers of two"),
        ((x, w.T, powers.T, router[:1]), ValueError, r"router must have shape \(2, 8\)"),
        ((x[:, :7], w.T, powers.T, router), ValueError, "mismatch"),
        ((np.float16([[np.nan] * 8]), w.T, powers.T, router), ValueError, "finite"),
    ]:
        with pytest.raises(error, match=match):
            approx.expert_matmul(*arguments)
    for arguments in [
        ([[0.5, 0.5]], [True, False], (1.0, 1.0)),
        ([[0.5, 0.5]], [True], (1.0, 0.0)),
        (np.ones((0, 2)), np.ones(0, bool), (1.0, 1.0)),
    ]:
        with pytest.raises(ValueError, match=r"gates of shape|latencies are|no token"):
            approx.expert_balance(*arguments)
