"""From float scales to the integers that the kernels take: ``rust/ops/src/intops/scale.rs`` again.

Every operation is the IEEE one of the core, in its order, so that both get the same integers.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EXPONENT",
    "Pieces",
    "Ratio",
    "Reach",
    "Shape",
    "Short",
    "affine",
    "pieces",
    "positive",
    "published",
    "ratio",
    "reach",
    "shape",
    "short",
]

EXPONENT = 26
LN_2 = 0.6931471805599453
_TOP32 = 2**32 - 1


class Ratio(ctypes.Structure):
    """``x * ratio * 2**fraction = (x * m) >> shift``."""

    _fields_ = [("m", ctypes.c_int), ("shift", ctypes.c_uint)]


class Reach(ctypes.Structure):
    """``d * scale * 2**fraction = (d * m) >> shift`` in 32 bits, for d up to `limit`."""

    _fields_ = [(name, ctypes.c_uint) for name in ("m", "shift", "limit")]


class Short(ctypes.Structure):
    """GELU in 32 bits, for results of 8."""

    _fields_ = [
        ("end", ctypes.c_int),
        ("coarse", ctypes.c_uint),
        ("place", ctypes.c_int),
        ("place_shift", ctypes.c_uint),
        ("top", ctypes.c_int),
        ("line_coarse", ctypes.c_uint),
        ("line", ctypes.c_int),
        ("unit", ctypes.c_int),
        ("shift", ctypes.c_uint),
    ]


class Pieces(ctypes.Structure):
    """What GELU lacks to the positive part, in 32 cubic pieces."""

    _fields_ = [
        *((name, ctypes.c_int * 32) for name in ("base", "slope", "bend")),
        *((name, ctypes.c_uint) for name in ("coarse", "up", "last")),
        ("fraction", ctypes.c_int),
    ]


class Shape(ctypes.Structure):
    """How rows are normalised."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("centre", "bits", "fraction", "log_cols")),
        ("eps", ctypes.c_uint64),
        ("eps_shift", ctypes.c_int),
    ]


def _exponent(value: float) -> int:
    """Return e of ``value = m * 2**e`` with m in [1, 2)."""
    return math.frexp(value)[1] - 1


def _away(v: float) -> int:
    """Round, halves away from zero."""
    whole = math.trunc(v)
    return whole + (math.copysign(1, v) > 0 or -1) if abs(v - whole) >= 0.5 else whole


def encode(value: float, bits: int) -> tuple[int, int]:
    """Return m and shift of the nearest ``m * 2**-shift``, m of `bits` bits unless 0."""
    if value <= 0:
        return 0, 0
    m, e = math.frexp(value) if value < math.inf else (0.5, 1025)
    digits = bits - 1
    whole = math.floor(math.ldexp(m, digits + 1) + 0.5)
    if whole >> bits:
        return whole >> 1, digits - e
    return whole, digits - e + 1


def _shown(v: float, scientific: bool = False) -> str:
    """Print a number as the core does."""
    if math.isnan(v):
        return "NaN"
    if scientific and math.isfinite(v):
        return np.format_float_scientific(v, trim="-", exp_digits=1).replace("e+", "e")
    return np.format_float_positional(v, trim="-")


def positive(name: str, value: float) -> float:
    """Return a scale, or raise."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {_shown(value)}")
    return value


def ratio(name: str, value: float, fraction: int) -> Ratio:
    """Encode a ratio that integers of 32 bits are multiplied by."""
    m, shift = encode(value * 2.0**fraction, 31)
    if math.isnan(value) or shift < 0:
        raise ValueError(f"{name} {_shown(value, True)} is too large for integers of 32 bits")
    return Ratio(0, 0) if shift > 62 else Ratio(m, shift)


def reach(scale: float, fraction: int) -> Reach:
    """Encode a scale that magnitudes are multiplied by, and which of them stay within 32 bits."""
    step = scale * 2.0**fraction
    bound = (2.0**32 - 2.0) / step if step > 0 else math.inf
    limit = min(math.floor(bound), _TOP32) if bound < 2.0**33 else _TOP32
    m, shift = encode(step, 32)
    return Reach(m, shift, limit) if 0 <= shift <= 63 else Reach(0, 0, limit)


def affine(
    gain: NDArray[np.float32], bias: NDArray[np.float32] | None, out: float, fraction: int
) -> tuple[NDArray[np.int32], NDArray[np.int64] | None, int]:
    """Return gain, bias and shift of ``(xhat * gain + bias) >> shift``."""
    if not (np.isfinite(gain).all() and (bias is None or np.isfinite(bias).all())):
        raise ValueError("weight and bias must be finite")

    def exponent(v: NDArray[np.float32]) -> int:
        top = float(np.abs(v).max(initial=0)) / out
        return _exponent(top) + 1 if 0 < top < math.inf else 1025 if top else -64

    by_gain = fraction + 30 - exponent(gain)
    by_bias = 61 - (-64 if bias is None else exponent(bias))
    shift = min(by_gain, by_bias, 60)
    if shift < 1:
        raise ValueError(f"out_scale {_shown(out, True)} is too small for the weight and bias")

    def scaled(v: NDArray[np.float32], unit: float, dtype: Any) -> NDArray[Any]:
        wide = v.astype(np.float64) * unit
        whole = np.trunc(wide)
        away = np.where(np.abs(wide - whole) >= 0.5, np.copysign(1.0, wide), 0.0)
        return np.asarray((whole + away).astype(dtype))

    gains = scaled(gain, 2.0 ** (shift - fraction) / out, np.int32)
    return gains, None if bias is None else scaled(bias, 2.0**shift / out, np.int64), shift


def shape(cols: int, centre: bool, scale: float, eps: float) -> Shape:
    """Return how rows of `cols` values are normalised."""
    s = positive("scale", scale)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {_shown(eps)}")
    m, eps_shift = encode(eps / s / s, 31)
    log_cols = cols.bit_length()
    return Shape(
        int(centre),
        min(23, (62 - log_cols) // 2),
        min(24, 30 - -(-log_cols // 2)),
        log_cols,
        m * cols,
        eps_shift,
    )


def short(scale: float, out: float, digits: int) -> Short | None:
    """Return GELU in 32 bits, None where they would show."""
    end = 5.0
    last = math.ceil(end / scale) if end / scale < 2e9 else 2**31
    if digits > 8 or out < 2.0**-9 or not 16 <= last < 10**9:
        return None

    def bits(v: float) -> int:
        return _exponent(v) + 1

    coarse = max(bits(last) - 15, 0)
    place, place_shift = encode(scale / end * 2.0 ** (15 + coarse), 15)
    top = float(math.ceil(min(((2.0**digits + 1.0) * out + 0.2) / scale, float(2**31 - 1))))
    line_coarse = max(bits(top) - 15, 0)
    line = scale / out * 2.0**line_coarse
    unit = 2.0**-16 / out
    shift = min(30 - bits(top * scale / out + 1.0), 15 - _exponent(unit), 24)
    if not 0 <= place_shift <= 30 or shift < 1:
        return None
    return Short(
        last,
        coarse,
        place,
        place_shift,
        int(top),
        line_coarse,
        _int32(_away(line * 2.0**shift)),
        _int32(_away(unit * 2.0**shift)),
        shift,
    )


_END = 5.0


def _ends_before(scale: float, magnitude: int) -> bool:
    return magnitude * scale >= _END


def _normal(u: float) -> tuple[float, float]:
    """Return density and tail of the normal distribution."""
    peak = 0.3989422804014327
    x, term, exp, integral = -u * u / 2.0, 1.0, 1.0, 1.0
    for n in range(1, 80):
        term *= x / n
        exp += term
        integral += term / (2.0 * n + 1.0)
    return peak * exp, 0.5 - peak * u * integral


def _piece(scale: float, out: float, first: int, coarse: int, fraction: int) -> tuple[int, ...]:
    whole = 2.0**fraction / out
    part = whole / 256.0
    if _ends_before(scale, first):
        return 0, 0, 0, 0
    if coarse == 0:
        u = first * scale
        return _away(u * _normal(u)[1] * whole), 0, 0, 0
    h = (1 << coarse) * scale
    u = (first * scale) + h / 2.0
    density, tail = _normal(u)
    s = u * u
    d = density * h * h
    c4 = d * h * h * (s * s - 7.0 * s + 4.0) / 24.0
    c5 = d * h * h * h * u * (11.0 * s - 18.0 - s * s) / 120.0
    c0 = u * tail - c4 / 128.0
    c1 = h * (tail - u * density) - c5 * 5.0 / 256.0
    c2 = d * (s - 2.0) / 2.0 + c4 / 4.0
    c3 = d * h * u * (4.0 - s) / 6.0 + c5 * 5.0 / 16.0
    return _away(c0 * whole), _away(c1 * part), _away(c2 * part), _away(c3 * part)


def _int32(v: int) -> int:
    """Saturate, as the core's conversion does."""
    return max(-(2**31), min(2**31 - 1, v))


@functools.lru_cache(256)
def pieces(scale: float, out: float) -> Pieces:
    """Return GELU's pieces for a scale of the input and one of the output."""
    coarse = next((c for c in range(26) if _ends_before(scale, 31 << c)), 26)
    p = Pieces()
    p.fraction = min(_exponent(out * (32000.0 / 0.175)) + 8, 30)
    p.coarse, p.up, p.last = coarse, 32 - max(coarse, 1), (32 << coarse) - 1
    for i in range(32):
        c = [_int32(v) for v in _piece(scale, out, i << coarse, coarse, p.fraction)]
        p.base[i] = c[0]
        high = (c[2] << 16) & 0xFFFFFFFF
        p.slope[i] = ctypes.c_int((c[1] & 0xFFFF) | high).value
        p.bend[i] = c[3] & 0xFFFF
    return p


def published(function: str, compat: str, scale: float) -> tuple[int, int, int, int]:
    """Return q0, qb, qc and n of a published operator."""

    def within(what: str, bound: int) -> None:
        if bound >= 2**62:
            raise ValueError(f"the scale is too small: {what} would leave 62 bits")

    def floor(a: float, b: float) -> int:
        # Saturating, as the core's conversion.
        v = a / b if b else math.copysign(math.inf, a)
        return math.floor(max(-(2.0**63), min(2.0**63, v)))

    s = positive("scale", scale)
    if function == "layernorm":
        return 0, 0, 0, 0
    if function == "gelu" and compat == "ibert":
        t = s / 1.4142
        qb, qc = floor(-1.769, t), floor(1.0 / -0.2888, t * t)
        one = floor(-1.0, 0.2888 * t * t * 2.0**14)
        most = abs(qc) + qb * qb + abs(one)
        within("the polynomial", most)
        within("GELU", (most >> 13) << 31)
        return 0, qb, qc, one
    if compat == "ibert":
        a, b, c, n = 0.35815147, 0.96963238, 1.0, 30
        q0, qb, qc = floor(-0.6931, s), floor(b / a, s), floor(c / a, s * s)
        within("the exponential", qc << n)
        return q0, qb, qc, n
    n = 23 if function == "gelu" else 15
    q0 = floor(-1.0, 1.702 * s if function == "gelu" else s)
    within("the exponential", -q0 << n)
    return q0, 0, 0, n
