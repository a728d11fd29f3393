"""Operators of integers, against arithmetic written a second time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import levels

import nibblas as nb
from nibblas import _core, intops

erf = np.vectorize(math.erf, otypes=[float])
NARROW = [np.int8, np.uint8, np.int16, np.uint16, np.int32]


def half_up(x: np.ndarray) -> np.ndarray:
    return np.floor(x + 0.5)


# Rescaling.


def single(x: int, m: int, n: int) -> int:
    return math.floor(Fraction(x * m, 2 ** (31 + n)) + Fraction(1, 2))


def gemmlowp(x: int, m: int, n: int) -> int:
    x = max(-(2**31), min(2**31 - 1, x << max(-n, 0)))
    product = x * m
    nudge = 2**30 if product >= 0 else 1 - 2**30
    quotient = abs(product + nudge) // 2**31
    high = min(quotient if product + nudge >= 0 else -quotient, 2**31 - 1)
    exact = Fraction(high, 2 ** max(n, 0))
    away = math.floor(abs(exact) + Fraction(1, 2))
    return away if exact >= 0 else -away


def as_float(x: int, m: int, n: int) -> int:
    product = np.float32(x) * np.float32(math.ldexp(m, -31 - n))
    return int(np.rint(product))


ROUNDINGS = {"single": single, "gemmlowp": gemmlowp, "float": as_float}


@pytest.mark.parametrize(
    ("x", "multiplier", "shift", "one", "two"),
    [
        (91581, 2012766816, 3, 10729, 10730),
        (-521882, 1382566725, 4, -20999, -21000),
        # Halves: one rounding goes up, gemmlowp's first too, its second away from zero.
        (3, 2**30, 0, 2, 2),
        (-3, 2**30, 0, -1, -1),
        (-1, 2**31 - 1, 1, 0, -1),
        (-(2**31), -(2**31), 0, 2**31 - 1, 2**31 - 1),
    ],
)
def test_requantize_triples(x: int, multiplier: int, shift: int, one: int, two: int) -> None:
    arguments = {"multiplier": multiplier, "shift": shift, "dtype": np.int32}
    assert intops.requantize([x], **arguments)[0] == one
    assert intops.requantize([x], rounding="gemmlowp", **arguments)[0] == two


def test_two_roundings_differ_in_one_of_twenty() -> None:
    """In 4.6 % of random cases, and by one."""
    rng = np.random.default_rng(11)
    differ = []
    for shift in range(1, 12):
        x = rng.integers(-(2**20), 2**20, 20_000, endpoint=True)
        m = rng.integers(2**30, 2**31, len(x))
        more = {"multiplier": m, "shift": shift, "dtype": np.int32}
        apart = intops.requantize(x, **more) - intops.requantize(x, rounding="gemmlowp", **more)
        assert set(np.unique(apart)) <= {-1, 0, 1}
        differ.append((apart != 0).mean())
    assert np.mean(differ) == pytest.approx(0.046, abs=0.003)


def edges(rng: np.random.Generator, n: int) -> np.ndarray:
    wide = rng.integers(-(2**31), 2**31, n)
    near = rng.integers(-(2**20), 2**20, n)
    special = [0, 1, -1, 2**31 - 1, -(2**31), 2**24 + 1, -(2**24) - 1]
    return np.concatenate([wide, near, special]).astype(np.int32)


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_requantize_is_the_written_formula(
    rounding: str, isa: str, rng: np.random.Generator
) -> None:
    x = edges(rng, 150)
    rule = ROUNDINGS[rounding]
    for shift in (-31, -30, -7, -1, 0, 1, 5, 11, 30, 31):
        for m in (2**30, 2**31 - 1, 1382566725, -1382566725, 0):
            for zero, dtype in ((0, np.int32), (-3, np.int8), (200, np.uint8), (7, np.int16)):
                info = np.iinfo(dtype)
                y = np.empty(x.shape, dtype)
                _core.ops_requantize(x, y, [m], [shift], 1, zero, rounding, 1, isa)
                sat = (max(-(2**31), min(2**31 - 1, rule(int(v), m, shift))) for v in x)
                if rounding == "single":
                    sat = (rule(int(v), m, shift) for v in x)
                want = [max(info.min, min(info.max, v + zero)) for v in sat]
                assert y.tolist() == want, (shift, m, zero)


def test_requantize_per_channel(rng: np.random.Generator) -> None:
    x = rng.integers(-(2**20), 2**20, (4, 5, 6)).astype(np.int32)
    for axis in (0, 1, 2, -1, -3):
        c = x.shape[axis]
        m, s = rng.integers(2**30, 2**31, c), rng.integers(-2, 12, c)
        got = intops.requantize(x, multiplier=m, shift=s, axis=axis, dtype=np.int32)
        moved = np.moveaxis(x, axis, -1).reshape(-1, c)
        want = [
            [single(int(v), int(a), int(b)) for v, a, b in zip(r, m, s, strict=True)] for r in moved
        ]
        np.testing.assert_array_equal(np.moveaxis(got, axis, -1).reshape(-1, c), want)


@pytest.mark.parametrize("rounding", ["single", "gemmlowp"])
def test_requantize_promises(rounding: str) -> None:
    """Never decreasing, 0 at 0, and no further from the product than the roundings."""
    x = np.arange(-70000, 70000, 7, dtype=np.int32)
    for scale in (0.9, 0.031, 1.7):
        m, s = intops.dyadic(scale)
        y = intops.requantize(x, multiplier=m, shift=s, rounding=rounding, dtype=np.int32)
        exact = x * math.ldexp(m, -31 - s)
        assert (np.diff(y) >= 0).all()
        assert y[10000] == 0
        assert np.abs(y - exact).max() <= (0.5 if rounding == "single" else 1.0)


def test_dyadic() -> None:
    for scale in (1.0, 0.75, 1 / 3, 2.0**-32, 2.0**30, math.pi, 1 - 2.0**-40, 5e-9):
        m, s = intops.dyadic(scale)
        assert 2**30 <= m < 2**31
        assert abs(math.ldexp(m, -31 - s) - scale) <= scale * 2.0**-31
    assert intops.dyadic(1 - 2.0**-40) == (2**30, -1)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            intops.dyadic(bad)
    with pytest.raises(ValueError, match="underflows"):
        intops.dyadic(1e-12)
    with pytest.raises(ValueError, match="overflows"):
        intops.dyadic(1e12)


# The sum.


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("each", [False, True])
def test_add(isa: str, each: bool, rng: np.random.Generator) -> None:
    a = rng.integers(-(2**15), 2**15, 3000).astype(np.int32)
    b = rng.integers(-128, 128, 3000).astype(np.int8)
    for sa, sb, so in ((0.5, 0.25, 1.0), (0.01, 0.3, 0.07), (1e-4, 2.0, 0.5)):
        y = np.empty(a.shape, np.int16)
        _core.ops_add(a, sa, b, sb, so, each, y, 1, isa)
        fa, fb = a * (sa / so), b * (sb / so)
        want = half_up(fa) + half_up(fb) if each else half_up(fa + fb)
        sure = np.abs(np.mod(fa + fb, 1) - 0.5) > 1e-3
        if each:
            sure = (np.abs(np.mod(fa, 1) - 0.5) > 1e-3) & (np.abs(np.mod(fb, 1) - 0.5) > 1e-3)
        assert sure.mean() > 0.2
        np.testing.assert_array_equal(y[sure], np.clip(want, -(2**15), 2**15 - 1)[sure])


# Functions of one value.


@pytest.mark.parametrize("scale", [1 / 16, 1 / 64, 1 / 256, 1e-3, 1e-6, 0.7, 3.0])
def test_exp_is_near(scale: float) -> None:
    q = -np.unique(np.geomspace(1, min(40 / scale, 2e9), 20000).astype(np.int64))
    q = np.append(q, 0)
    codes, s = intops.exp(q, scale)
    exact = np.exp(q * scale)
    assert np.abs(codes * s - exact).max() < 3e-6
    large = exact > 1e-4
    assert np.abs(codes * s / exact - 1)[large].max() < 1.5e-5
    assert codes[-1] == 2**30
    order = np.argsort(q)
    assert (np.diff(codes[order]) >= 0).all()


def test_exp_far_out_and_bad_input() -> None:
    codes, _ = intops.exp(np.array([-(2**31), -1, 0], np.int32), 1e6)
    assert codes.tolist() == [0, 0, 2**30]
    codes, _ = intops.exp(np.array([-(2**31), -1, 0], np.int32), 1e-300)
    assert codes.tolist() == [2**30] * 3
    with pytest.raises(ValueError, match="at most 0, got 3"):
        intops.exp([3], 0.1)
    with pytest.raises(ValueError, match="scale must be positive"):
        intops.exp([-3], math.nan)


FUNCTIONS = {
    "gelu": (lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))), 7e-6),
    "silu": (lambda x: x / (1 + np.exp(-x)), 6e-6),
}


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_near(name: str, isa: str, rng: np.random.Generator) -> None:
    exact, bound = FUNCTIONS[name]
    x = np.concatenate([rng.integers(-(2**31), 2**31, 2000), np.arange(-60000, 60000, 17)])
    x = x.astype(np.int32)
    for scale in (1 / 4096, 1e-3, 0.01):
        y = np.empty(x.shape, np.int32)
        # A result fine enough to see the function's own error.
        out = 2.0**-22 if scale < 1e-3 else 2.0**-18
        near = np.abs(x) < 2**30 * out / scale
        _core.ops_apply(name, x[near], scale, out, y[: near.sum()], 1, isa)
        with np.errstate(over="ignore"):
            want = exact(x[near] * scale)
        error = np.abs(y[: near.sum()] * out - want)
        assert (error - np.abs(want) * 2.0**-29).max() < bound + out, (scale, error.max())
        _core.ops_apply(name, x, scale, scale, y, 1, isa)
        far = np.abs(x * scale) > 40
        np.testing.assert_array_equal(y[far], np.maximum(x, 0)[far])


def test_gelu_of_extreme_scales() -> None:
    """Steps so coarse that only the line is left, so fine that the curve is never reached."""
    ends = np.array([-(2**31), -1, 0, 1, 2**31 - 1], np.int32)
    assert intops.gelu(ends, 1e300)[0].tolist() == [0, 0, 0, 1, 2**31 - 1]
    assert intops.gelu(ends, 5e-324, out_scale=1)[0].tolist() == [0] * 5
    assert intops.gelu(ends, 1.0, out_scale=1e300)[0].tolist() == [0] * 5
    # A scale of 1: single codes are pieces of their own.
    few = np.arange(-7, 8)
    codes, scale = intops.gelu(few, 1.0, out_scale=2.0**-12)
    assert np.abs(codes * scale - FUNCTIONS["gelu"][0](few.astype(float))).max() < 2.0**-12
    for scale in (1e-320, 1e-300):
        with pytest.raises(ValueError, match="too large for integers"):
            intops.gelu(ends, scale)


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_gelu_of_eight_bits(isa: str, dtype: type) -> None:
    """Results of 8 bits have a polynomial of their own."""
    info = np.iinfo(dtype)
    for scale in (1e-6, 1 / 4096, 0.01, 0.04, 0.3):
        end = min(2e9, 40 / scale)
        x = np.unique(np.geomspace(1, end, 20000).astype(np.int32))
        x = np.concatenate([-x[::-1], [0], x, [2**31 - 1, -(2**31)]]).astype(np.int32)
        exact = FUNCTIONS["gelu"][0](x * scale)
        for out in (2.0**-9, 0.02, 0.05, 1.0, 30.0):
            y = np.empty(x.shape, dtype)
            _core.ops_apply("gelu", x, scale, out, y, 1, isa)
            error = np.abs(y - np.clip(exact / out, info.min, info.max)).max()
            assert error < 0.5 + 0.03 + 3e-4 / out, (scale, out, error)


@pytest.mark.parametrize("name", ["gelu", "silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_bytes_equal_wider_codes(name: str, dtype: type) -> None:
    """Bytes take the way through a table where there are enough of them."""
    info = np.iinfo(dtype)
    x = np.tile(np.arange(info.min, info.max + 1), 33).astype(dtype)
    function = getattr(intops, name)
    got, scale = function(x, 0.04, dtype=np.int8)
    want, again = function(x.astype(np.int32), 0.04, dtype=np.int8)
    assert scale == again
    np.testing.assert_array_equal(got, want)


def test_sigmoid_is_near() -> None:
    x = np.arange(-30000, 30001, dtype=np.int32)
    codes, scale = intops.sigmoid(x, 1e-3, dtype=np.int32)
    exact = 1 / (1 + np.exp(-x * 1e-3))
    assert scale == 2.0**-30
    assert np.abs(codes * scale - exact).max() < 3e-6
    assert (np.diff(codes) >= -4).all()


# Rows.


def exact_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("cols", [1, 2, 3, 17, 64, 197, 1000, 4096])
def test_softmax_is_near(isa: str, cols: int, rng: np.random.Generator) -> None:
    q = (rng.standard_normal((5, cols)) * 32).astype(np.int16)
    for scale in (1 / 16, 1e-3, 2.0):
        exact = exact_softmax(q * scale)
        for dtype in NARROW:
            y = np.empty(q.shape, dtype)
            _core.ops_softmax(q, y, cols, scale, 1, isa)
            digits = np.iinfo(dtype).max.bit_length()
            want = np.minimum(exact * 2.0**digits, np.iinfo(dtype).max)
            error = np.abs(y - want).max()
            assert error <= 0.5 + 4e-6 * 2.0**digits, (scale, dtype)


def test_softmax_keeps_its_mass(rng: np.random.Generator) -> None:
    for cols in (16, 197, 1024, 4096):
        q = np.rint(rng.normal(0, 2, (50, cols)) * 16).astype(np.int32)
        codes, scale = intops.softmax(q, 1 / 16, dtype=np.uint16)
        assert abs((codes * scale).sum(-1).mean() - 1) < 0.01
        lost, scale = intops.softmax(q, 1 / 16, compat="ivit")
        known = {16: 0.946, 197: 0.696, 1024: 0.399, 4096: 0.177}[cols]
        assert (lost * scale).sum(-1).mean() == pytest.approx(known, abs=0.015)


def test_softmax_edges() -> None:
    hot = np.array([[0, 2000, 0, 0]])
    assert intops.softmax(hot, 0.1)[0].tolist() == [[0, 255, 0, 0]]
    assert intops.softmax(hot, 0.1, dtype=np.int8)[0].tolist() == [[0, 127, 0, 0]]
    assert intops.softmax(hot, 0.1, compat="ibert")[0].tolist() == [[0, 255, 0, 0]]
    assert intops.softmax(hot, 0.1, compat="ivit")[0].tolist() == [[0, 127, 0, 0]]
    with pytest.raises(ValueError, match="scale 2 is too coarse"):
        intops.softmax(hot, 2.0, compat="ibert")
    equal = np.full((2, 8), 77)
    assert (intops.softmax(equal, 0.1)[0] == 32).all()
    assert intops.softmax(np.zeros((3, 0), np.int8), 0.1)[0].shape == (3, 0)
    assert intops.softmax(np.zeros((0, 3), np.int8), 0.1)[0].shape == (0, 3)
    mask = np.array([True, False, True, True])
    codes, scale = intops.softmax(np.array([5, 100, 5, 5]), 0.1, where=mask, dtype=np.uint16)
    np.testing.assert_allclose(codes * scale, [1 / 3, 0, 1 / 3, 1 / 3], atol=2e-5)
    assert (intops.softmax(equal, 0.1, where=np.zeros(8, bool))[0] == 0).all()
    wide = np.array([[-(2**31) + 1, 2**31 - 1]])
    assert intops.softmax(wide, 1e-9, dtype=np.uint16)[0].tolist() == [[882, 64654]]
    moved = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(
        intops.softmax(moved, 0.5, axis=0)[0], intops.softmax(moved.T, 0.5)[0].T
    )
    with pytest.raises(ValueError, match="does not broadcast"):
        intops.softmax(hot, 0.1, where=np.ones((2, 4), bool))
    with pytest.raises(TypeError, match="bools"):
        intops.softmax(hot, 0.1, where=np.ones(4))
    with pytest.raises(np.exceptions.AxisError):
        intops.softmax(hot, 0.1, axis=2)


def exact_norm(
    x: np.ndarray, w: np.ndarray, b: np.ndarray | float, eps: float, centre: bool
) -> np.ndarray:
    if centre:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w + b


@pytest.mark.parametrize("isa", levels())
@pytest.mark.parametrize("centre", [True, False])
def test_norms_are_near(centre: bool, isa: str, rng: np.random.Generator) -> None:
    for cols in (2, 3, 31, 384, 1000):
        w = rng.normal(1, 0.3, cols).astype(np.float32)
        b = rng.normal(0, 0.5, cols).astype(np.float32) if centre else None
        for magnitude, dtype in (
            (3, np.int8),
            (100, np.int8),
            (30000, np.int16),
            (2**30, np.int32),
        ):
            q = rng.integers(-magnitude, magnitude + 1, (6, cols)).astype(dtype)
            q[1] += dtype(q[1].max() // 2 * 0 + 5)
            q[0, 0] += 1
            scale = 0.37
            for eps in (0.0, 1e-5, 100.0):
                y = np.empty(q.shape, np.int32)
                out = 2.0**-18
                _core.ops_norm(q, y, centre, scale, w, b, eps, out, 1, isa)
                x = q.astype(np.float64) * scale
                with np.errstate(invalid="ignore"):
                    want = exact_norm(x, w.astype(float), 0.0 if b is None else b, eps, centre)
                alive = np.ptp(x, -1) > 0
                error = np.abs(y * out - want)[alive].max()
                assert error < 6e-6 * max(1.0, np.abs(want[alive]).max()), (cols, magnitude, eps)


@pytest.mark.parametrize("compat", [None, "ibert", "ivit"])
def test_layernorm_of_constant_rows_is_the_bias(compat: str | None) -> None:
    w, b = np.array([1.0, -2.0, 0.5, 1.0]), np.array([0.5, 0.25, -1.0, 0.0])
    for value in (0, 7, -(2**31), 2**31 - 1):
        q = np.full((2, 4), value)
        y, scale = intops.layernorm(q, 0.1, w, b, out_scale=None if compat else 0.25, compat=compat)
        np.testing.assert_allclose(y * scale, [b, b], atol=1e-6)
    if compat is None:
        y, _ = intops.layernorm(np.full((1, 4), 3), 0.1, 0 * w, b, out_scale=0.25)
        assert y.tolist() == [[2, 1, -4, 0]]


def test_rows_with_one_hot_value() -> None:
    q = np.array([[0, 0, 0, 1000], [0, -1, 0, 0], [2**31 - 1, 0, 0, 0], [0, 0, 0, -(2**31)]])
    x = q.astype(np.float64)
    ones, out = np.ones(4, np.float32), 2.0**-20
    centred, _ = intops.layernorm(q, 0.5, ones, out_scale=out, dtype=np.int32)
    np.testing.assert_allclose(centred * out, exact_norm(x, ones, 0.0, 0.0, True), atol=6e-6)
    plain, _ = intops.rmsnorm(q, 0.5, ones, out_scale=out, dtype=np.int32)
    np.testing.assert_allclose(plain * out, exact_norm(x, ones, 0.0, 0.0, False), atol=6e-6)
    codes, scales = intops.rmsnorm_quantize(q, 0.5, ones)
    assert codes.tolist() == (127 * np.sign(q)).tolist()
    np.testing.assert_allclose(scales * 127, np.full((4, 1), 2.0), rtol=1e-6)


def test_norm_edges() -> None:
    w = np.ones(3)
    assert intops.layernorm(np.zeros((0, 3), int), 1, w, out_scale=1)[0].shape == (0, 3)
    assert intops.layernorm(np.zeros((4, 0), int), 1, [], out_scale=1)[0].shape == (4, 0)
    assert (intops.rmsnorm(np.zeros((2, 3), int), 1, w, out_scale=1)[0] == 0).all()
    # A weight that is not 1, a row of one value: its root mean square is itself.
    assert intops.rmsnorm([[-5]], 1, [2.0], out_scale=0.5)[0].tolist() == [[-4]]
    for kwargs, message in (
        ({"out_scale": 0.0}, "out_scale must be positive"),
        ({"out_scale": 1e-30}, "out_scale 1e-30 is too small"),
        ({"out_scale": 1, "eps": -1}, "eps must be finite"),
        ({"out_scale": 1, "eps": math.nan}, "eps must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            intops.layernorm([[1, 2, 3]], 1, w, w, **kwargs)
    with pytest.raises(ValueError, match="must be finite"):
        intops.layernorm([[1, 2, 3]], 1, [1, math.inf, 1], out_scale=1)
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), got \(2,\)"):
        intops.layernorm([[1, 2, 3]], 1, [1, 1], out_scale=1)
    with pytest.raises(TypeError, match="out_scale is missing"):
        intops.layernorm([[1, 2, 3]], 1, w)
    with pytest.raises(ValueError, match="divide by the weight"):
        intops.layernorm([[1, 2, 3]], 1, 0 * w, compat="ibert")


@pytest.mark.parametrize("isa", levels())
def test_rmsnorm_quantize(isa: str, rng: np.random.Generator) -> None:
    for cols in (1, 5, 64, 1000):
        q = rng.integers(-3000, 3000, (7, cols)).astype(np.int32)
        q[3] = 0
        w = rng.normal(1, 0.2, cols).astype(np.float32)
        for eps in (0.0, 1e-6, 1e4):
            y, pairs = np.empty(q.shape, np.int8), np.empty((7, 2), np.int32)
            _core.ops_norm_codes(q, y, pairs, 0.01, w, eps, 1, isa)
            scales = np.ldexp(pairs[:, :1].astype(float), -31 - pairs[:, 1:])
            alive = np.arange(7) != 3
            want = exact_norm(q[alive] * 0.01, w.astype(float), 0.0, eps, False)
            top = np.abs(want).max(-1, keepdims=True)
            np.testing.assert_allclose(scales[alive], top / 127, rtol=1e-6)
            assert np.abs(y[alive] - want / top * 127).max() < 0.5 + 1e-4
            assert (np.abs(y[alive]).max(-1) == 127).all()
            assert not y[3].any()
            assert scales[3] == 0


# Square roots.


def test_sqrt_is_exact() -> None:
    rng = np.random.default_rng(3)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        top = np.iinfo(dtype).max
        roots = rng.integers(0, math.isqrt(top), 3000, endpoint=True, dtype=np.uint64)
        squares = roots * roots
        near = [
            squares,
            squares - (squares > 0),
            np.minimum(squares + np.uint64(1), np.uint64(top)),
        ]
        v = np.concatenate([*near, rng.integers(0, top, 3000, endpoint=True, dtype=np.uint64)])
        v = np.append(v, np.array([0, 1, 2, 3, 4, top, top - 1], np.uint64)).astype(dtype)
        got = intops.sqrt(v)
        assert got.dtype == v.dtype
        assert got.tolist() == [math.isqrt(int(x)) for x in v]


@pytest.mark.parametrize("isa", levels())
def test_sqrt_on_every_level(isa: str) -> None:
    """Every square of 32 bits, with its neighbours."""
    r = np.arange(2**16, dtype=np.uint64)
    for v, want in ((r * r, r), (r * r + 2 * r, r), (r[1:] ** 2 - np.uint64(1), r[:-1])):
        x = v.astype(np.uint32).view(np.int32)
        y = np.empty_like(x)
        _core.ops_sqrt(x, y, False, 1, isa)
        np.testing.assert_array_equal(y.view(np.uint32), want)
        x, y = v.view(np.int64), np.empty(len(v), np.int64)
        _core.ops_sqrt(x, y, False, 1, isa)
        np.testing.assert_array_equal(y, want.astype(np.int64))


def test_sqrt_of_ivit_is_wrong_as_published() -> None:
    v = np.array([100, 1000, 10_000, 100_000, 2**32 - 1])
    assert intops.sqrt(v, compat="ivit").tolist() == [64, 68, 108, 316, 65536]
    assert intops.sqrt(v).tolist() == [10, 31, 100, 316, 65535]
    with pytest.raises(ValueError, match="negative"):
        intops.sqrt([-1])
    with pytest.raises(TypeError, match="integers"):
        intops.sqrt([1.5])


# The published operators, from their formulas, in Python integers.


def ibert_exp(q: int, s: float) -> int:
    a, b, c = 0.35815147, 0.96963238, 1.0
    q0 = math.floor(-0.6931 / s)
    q = max(q, 30 * q0)
    z = math.floor(Fraction(q, q0))
    r = q - q0 * z
    p = r * (r + math.floor(b / a / s)) + math.floor(c / a / (s * s))
    return max(0, math.floor(p * 2 ** (30 - z)))


def ivit_exp(q: int, s: float, n: int = 15) -> int:
    q0 = math.floor(-1 / s)
    q = max(q + (q >> 1) - (q >> 4), n * q0)
    z = math.floor(Fraction(q, q0))
    return ((q - q0 * z >> 1) - q0) * 2 ** (n - z)


def ibert_gelu(q: int, s: float) -> int:
    e = s / 1.4142
    qb, qc = math.floor(-1.769 / e), math.floor(1 / -0.2888 / (e * e))
    p = (min(abs(q), -qb) + qb) ** 2 + qc
    p *= (q > 0) - (q < 0)
    return q * ((p >> 14) + math.floor(1 / (-0.2888 * e * e * 2**14)))


@pytest.mark.parametrize("scale", [1 / 16, 1 / 64, 1 / 256, 1 / 1024])
def test_published_functions(scale: float) -> None:
    q = [*np.unique(-np.geomspace(1, 40 / scale, 400).astype(int)).tolist(), 0]
    assert intops.exp(q, scale, compat="ibert")[0].tolist() == [ibert_exp(v, scale) for v in q]
    assert intops.exp(q, scale, compat="ivit")[0].tolist() == [ivit_exp(v, scale) for v in q]
    q += [-v for v in q]
    assert intops.gelu(q, scale, compat="ibert")[0].tolist() == [ibert_gelu(v, scale) for v in q]


def test_published_errors() -> None:
    """The largest errors that the formulas have, as measured when they were noted."""
    for scale, ibert, ivit in (
        (1 / 16, 2.7e-2, 6.5e-2),
        (1 / 64, 5.4e-3, 5.0e-2),
        (1 / 256, 1.93e-3, 4.6e-2),
    ):
        q = -np.arange(int(20 / scale) + 1)
        exact = np.exp(q * scale)
        for compat, want in (("ibert", ibert), ("ivit", ivit)):
            codes, s = intops.exp(q, scale, compat=compat)
            assert np.abs(codes * s - exact).max() == pytest.approx(want, rel=0.05)
    q = np.arange(-(2**15), 2**15 + 1)
    exact = FUNCTIONS["gelu"][0](q / 2**13)
    codes, s = intops.gelu(q, 2.0**-13, compat="ibert")
    error = codes * s - exact
    assert np.abs(error).max() == pytest.approx(1.82e-2, rel=0.02)
    assert np.sqrt((error**2).mean()) == pytest.approx(8.2e-3, rel=0.02)
    codes, s = intops.gelu(q, 2.0**-13)
    assert np.abs(codes * s - exact).max() < 7e-6 + s


@pytest.mark.parametrize("scale", [1 / 16, 1 / 200])
def test_published_softmax(scale: float, rng: np.random.Generator) -> None:
    q = np.rint(rng.normal(0, 2, (6, 40)) / scale).astype(int)
    for row, ibert, ivit in zip(
        q.tolist(),
        intops.softmax(q, scale, compat="ibert")[0].tolist(),
        intops.softmax(q, scale, compat="ivit")[0].tolist(),
        strict=True,
    ):
        one = ibert_exp(0, scale)
        e = [
            math.floor(Fraction(ibert_exp(v - max(row), scale) * 32767, one) + Fraction(1, 2))
            for v in row
        ]
        assert ibert == [v * (2**32 // sum(e)) >> 24 for v in e]
        e = [ivit_exp(v - max(row), scale) for v in row]
        assert ivit == [v * ((2**31 - 1) // min(sum(e), 2**31 - 1)) >> 24 for v in e]


def test_published_gelu_of_ivit_depends_on_the_row(rng: np.random.Generator) -> None:
    q, s = rng.integers(-900, 900, (4, 30)), 1 / 256
    got, scale = intops.gelu(q, s, compat="ivit")
    for row, out in zip(q.tolist(), got.tolist(), strict=True):
        top = 2**31 - 1
        e = [ivit_exp(v - max(row), 1.702 * s, 23) for v in row]
        floor = ivit_exp(-max(row), 1.702 * s, 23)
        assert out == [
            v * (p * (top // min(p + floor, top)) >> 24) for v, p in zip(row, e, strict=True)
        ]
    assert scale == s / 128
    alone, _ = intops.gelu(q[:, :1], s, compat="ivit")
    assert (alone[:, 0] != got[:, 0]).any()


@pytest.mark.parametrize("compat", ["ibert", "ivit"])
def test_published_layernorm(compat: str, rng: np.random.Generator) -> None:
    n = 48
    q = rng.integers(-40000, 40000, (5, n))
    w, b = rng.normal(1, 0.2, n).astype(np.float32), rng.normal(0, 1, n).astype(np.float32)
    got, scale = intops.layernorm(q, 0.1, w, b, compat=compat)
    unit = math.sqrt(n) * 2.0**-30
    np.testing.assert_allclose(scale, unit * w)
    bias = [math.floor(float(y) / float(x) / unit) for x, y in zip(w, b, strict=True)]
    for row, out in zip(q.tolist(), got.tolist(), strict=True):
        mean = round(Fraction(sum(row), n))
        y = [v - mean for v in row]
        if compat == "ibert":
            shift = 0
            while (total := sum((v >> shift) ** 2 for v in y)) >= 2**32:
                shift += 1
            factor = 2**31 // (math.isqrt(total) << shift)
        else:
            total, root = sum(v * v for v in y), 2**16
            for _ in range(10):
                root = (root + total // root) // 2
            factor = (2**31 - 1) // root
        assert out == [(v * factor >> 1) + c for v, c in zip(y, bias, strict=True)]
    exact = exact_norm(q.astype(float), w.astype(float), b, 0.0, True)
    assert np.abs(got * scale - exact).max() < 2e-2


def test_published_arithmetic_does_not_wrap() -> None:
    for call in (
        lambda: intops.exp([-1], 1e-9, compat="ibert"),
        lambda: intops.softmax([[-1]], 1e-9, compat="ibert"),
        lambda: intops.gelu([-1], 1e-8, compat="ibert"),
        lambda: intops.gelu([-1], 1e-12, compat="ivit"),
    ):
        with pytest.raises(ValueError, match="too small"):
            call()
    with pytest.raises(ValueError, match="unknown compat 'bert'"):
        intops.softmax([[1]], 1, compat="bert")


# What all have in common.


def calls() -> dict[str, object]:
    rng = np.random.default_rng(8)
    x = rng.integers(-(2**18), 2**18, (64, 1024)).astype(np.int32)
    w = np.ones(1024, np.float32)
    return {
        "requantize": lambda t: intops.requantize(x, multiplier=2**30, shift=8, threads=t),
        "add": lambda t: intops.add(x, 0.1, x[::-1], 0.3, out_scale=0.2, threads=t)[0],
        "gelu": lambda t: intops.gelu(x, 1e-4, threads=t)[0],
        "softmax": lambda t: intops.softmax(x, 1e-4, dtype=np.uint16, threads=t)[0],
        "layernorm": lambda t: intops.layernorm(x, 1e-4, w, out_scale=1e-3, threads=t)[0],
        "rmsnorm": lambda t: intops.rmsnorm_quantize(x, 1e-4, w, threads=t)[0],
        "sqrt": lambda t: intops.sqrt(np.abs(x), threads=t),
        "ivit": lambda t: intops.softmax(x, 1e-4, compat="ivit", threads=t)[0],
    }


@pytest.mark.parametrize("name", calls())
def test_threads(name: str) -> None:
    call = calls()[name]
    first = call(1)
    for threads in (2, 3, 7, 64):
        np.testing.assert_array_equal(call(threads), first)


def test_any_layout_and_type(rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, (6, 8, 10))
    want = intops.softmax(x, 0.1)[0]
    for other in (x.astype(np.int8), x.astype(np.int64), np.asfortranarray(x), x[::-1][::-1]):
        np.testing.assert_array_equal(intops.softmax(other, 0.1)[0], want)
    np.testing.assert_array_equal(intops.softmax(x[::-1, ::2], 0.1)[0], want[::-1, ::2])
    assert intops.gelu(5, 0.5)[0].shape == ()
    big = x.astype(np.int64)
    big[0] = 2**40
    with pytest.raises(ValueError, match="beyond int32"):
        intops.gelu(big, 0.1)
    with pytest.raises(TypeError, match="must hold integers, got float64"):
        intops.gelu(x * 0.5, 0.1)
    with pytest.raises(TypeError, match="dtype=float32 is not a result type"):
        intops.gelu(x, 0.1, dtype=np.float32)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            intops.softmax(x, bad)
    with pytest.raises(ValueError, match="too large"):
        intops.gelu(x, 1.0, out_scale=1e-9)
    with pytest.raises(ValueError, match=r"shift must lie in .*, got 40"):
        intops.requantize(x, multiplier=2**30, shift=40)
    with pytest.raises(ValueError, match="unknown rounding 'up'"):
        intops.requantize(x, multiplier=2**30, shift=0, rounding="up")
    with pytest.raises(ValueError, match="axis -1 of acc has 10 channels"):
        intops.requantize(x, multiplier=[2**30] * 4, shift=0)
    assert "intops" in dir(nb)


# Products.


def test_matmul(rng: np.random.Generator) -> None:
    a8, au = rng.integers(-128, 128, (7, 50)).astype(np.int8), rng.integers(0, 256, (7, 50))
    b8, bu = rng.integers(-128, 128, (50, 9)).astype(np.int8), rng.integers(0, 256, (50, 9))
    au, bu = au.astype(np.uint8), bu.astype(np.uint8)
    bias = rng.integers(-(2**20), 2**20, 9)
    for a, za in ((a8, 0), (a8, -128), (a8, 17), (au, 0), (au, 131)):
        for b, zb in ((b8, 0), (b8, 5), (bu, 0), (bu, 200)):
            want = (a.astype(np.int64) - za) @ (b.astype(np.int64) - zb)
            got = intops.matmul(a, b, a_zero=za, b_zero=zb)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, want)
            got = intops.matmul(a, b, a_zero=za, b_zero=zb, bias=bias, dtype=np.int64)
            np.testing.assert_array_equal(got, want + bias)
            stack = intops.matmul(a[None, :, None], b[None, None], a_zero=za, b_zero=zb)
            np.testing.assert_array_equal(stack[0, :, 0], want)
    for fmt in ("int8", "int4", "uint4", "ternary", "bipolar3"):
        q = nb.quantize(rng.standard_normal((9, 50)).astype(np.float32), fmt)
        w = q.codes().astype(np.int64) - (0 if q.zeros is None else q.zeros.astype(np.int64))
        for a, za in ((a8, 0), (a8, -3), (au, 9)):
            want = (a.astype(np.int64) - za) @ w.T + bias
            np.testing.assert_array_equal(intops.matmul(a, q.T, a_zero=za, bias=bias), want)
            got = intops.matmul(np.stack([a, a]), q.T, a_zero=za, bias=bias)
            np.testing.assert_array_equal(got, [want, want])


def test_matmul_does_not_overflow() -> None:
    k = 140_000
    a, b = np.full((1, k), -128, np.int8), np.full((k, 1), -128, np.int8)
    with pytest.raises(ValueError, match="may reach 2293760000, past int32"):
        intops.matmul(a, b)
    assert intops.matmul(a, b, dtype=np.int64).tolist() == [[128 * 128 * k]]
    small = np.ones((1, 1), np.int8)
    with pytest.raises(ValueError, match="past int32"):
        intops.matmul(small, small, bias=[2**31 - 1])
    assert intops.matmul(small, small, bias=[2**31 - 1], dtype=np.int64) == 2**31
    with pytest.raises(TypeError, match="a must be int8 or uint8, got int64"):
        intops.matmul([[1]], small)
    with pytest.raises(ValueError, match=r"a_zero must lie in \[-128, 127\], got 200"):
        intops.matmul(small, small, a_zero=200)
    with pytest.raises(ValueError, match="do not fit"):
        intops.matmul(small, np.ones((2, 1), np.int8))
    with pytest.raises(ValueError, match=r"bias must have shape \(1,\)"):
        intops.matmul(small, small, bias=[1, 2])
    with pytest.raises(TypeError, match="bias must hold integers"):
        intops.matmul(small, small, bias=[0.5])
    assert (
        intops.matmul(np.ones((3, 0), np.int8), np.ones((0, 2), np.int8)).tolist() == [[0, 0]] * 3
    )


def test_safe_chains() -> None:
    """Products of symmetric operands of equal width that int32 holds; and matmul keeps to them."""
    table = {16: 2, 15: 8, 14: 32, 13: 128, 12: 512, 10: 8224, 8: 133_144}
    for bits, chain in table.items():
        top = 2 ** (bits - 1) - 1
        assert intops.safe_chain(top, top) == chain
        assert chain * top * top < 2**31 <= (chain + 1) * top * top
    assert intops.safe_chain(32768, 32768) == 1
    assert intops.safe_chain(255, 255) == 33025
    assert intops.safe_chain(15, 128, bits=16) == 17
    assert intops.safe_chain(8, 128, bits=16) == 31
    k = intops.safe_chain(128, 128)
    a, b = np.full((1, k + 1), -128, np.int8), np.full((k + 1, 1), -128, np.int8)
    assert intops.matmul(a[:, :k], b[:k]).tolist() == [[k * 2**14]]
    with pytest.raises(ValueError, match="past int32"):
        intops.matmul(a, b)
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        intops.safe_chain(0, 5)
    with pytest.raises(ValueError, match=r"bits must lie in 2\.\.64, got 65"):
        intops.safe_chain(1, 1, bits=65)


def test_bitlinear(rng: np.random.Generator) -> None:
    q = rng.integers(-(2**15), 2**15, (2, 5, 64)).astype(np.int32)
    w = nb.quantize(rng.standard_normal((12, 64)).astype(np.float32), "ternary")
    norm = rng.normal(1, 0.1, 64).astype(np.float32)
    sums, scales = intops.bitlinear(q, 0.01, norm, w, eps=1e-6)
    assert sums.dtype == np.int32
    codes, rows = intops.rmsnorm_quantize(q, 0.01, norm, eps=1e-6)
    np.testing.assert_array_equal(sums, codes.astype(np.int64) @ w.codes().astype(np.int64).T)
    exact = exact_norm(q * 0.01, norm.astype(float), 0.0, 1e-6, False) @ w.dequantize().T
    error = np.abs(sums * scales - exact)
    nothing = nb.quantize(np.zeros((3, 0), np.float32), "ternary")
    empty, worth = intops.bitlinear(np.zeros((2, 0), np.int32), 1, [], nothing)
    assert empty.tolist() == [[0] * 3] * 2
    assert worth.shape == (2, 3)
    # Half a step for each activation at worst.
    assert (error <= rows / 2 * np.abs(w.dequantize()).sum(1) * 1.001).all()


def test_log2_softmax(rng: np.random.Generator) -> None:
    q = rng.integers(-900, 100, (4, 60))
    p = exact_softmax(q * 0.01)
    for base, steps in (("2", 1), ("sqrt2", 2)):
        for bits in (2, 4):
            for top in (1.0, 0.07):
                codes = intops.log2_softmax(q, 0.01, bits=bits, base=base, top=top)
                near = -steps * np.log2(p / top)
                sure = np.abs(near - np.floor(near) - 0.5) > 1e-3
                want = np.clip(np.rint(near), 0, 2**bits)
                assert sure.mean() > 0.9
                np.testing.assert_array_equal(codes[sure], want[sure])
                v = rng.integers(-128, 128, (60, 3)).astype(np.int8)
                sums, scale = intops.log2_matmul(codes, v, 0.5, bits=bits, base=base, top=top)
                level = np.where(codes < 2**bits, top * 2.0 ** (-codes.astype(float) / steps), 0)
                np.testing.assert_allclose(sums * scale, level @ v * 0.5, atol=scale * 2)
    hidden = intops.log2_softmax(q, 0.01, where=np.arange(60) < 1)
    assert (hidden[:, 1:] == 16).all()
    assert (hidden[:, 0] == 0).all()
    with pytest.raises(ValueError, match="top must lie"):
        intops.log2_softmax(q, 0.01, top=0.0)
    with pytest.raises(ValueError, match=r"codes lie in \[0, 16\]"):
        intops.log2_matmul([[17]], [[1]], 1.0)
    with pytest.raises(ValueError, match="scale must be positive and finite, got nan"):
        intops.log2_matmul([[1]], [[1]], math.nan)
    with pytest.raises(ValueError, match="unknown base"):
        intops.log2_softmax(q, 0.01, base="e")


def test_folded_scales_change_nothing(rng: np.random.Generator) -> None:
    k, n = 24, 7
    xhat = rng.standard_normal((50, k))
    g, b, w, c = (
        rng.normal(1, 1, k),
        rng.normal(0, 1, k),
        rng.normal(0, 1, (n, k)),
        rng.normal(0, 1, n),
    )
    y = xhat * g + b
    low, high = np.minimum(y.min(0), 0), np.maximum(y.max(0), 0)
    s = (high - low) / 255
    z = np.rint(-low / s)
    g2, b2, w2, c2, scale, zero = intops.fold_channel_scales(g, b, w, c, s, z)
    folded = xhat * g2 + b2
    np.testing.assert_allclose(folded @ w2.T + c2, y @ w.T + c, rtol=1e-9, atol=1e-9)
    # The same codes, now with one scale and one zero point.
    np.testing.assert_allclose(folded / scale + zero, y / s + z, rtol=1e-6, atol=1e-6)
    s[3] = 0
    assert np.isfinite(intops.fold_channel_scales(g, b, w, c, s)[2]).all()
    with pytest.raises(ValueError, match="norm and linear must be finite"):
        intops.fold_channel_scales(g, b, w * math.nan, c, s)
    with pytest.raises(ValueError, match="one of them positive"):
        intops.fold_channel_scales(g, b, w, c, 0 * s)
    with pytest.raises(ValueError, match="do not fit"):
        intops.fold_channel_scales(g, b, w, c[1:], s)
