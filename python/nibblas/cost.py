"""What products cost: operations by kind, bytes by component, time floors, energy.

Counts are exact for the named way of computing (a *scheme*); bytes are those of the portable
layout, scales and zero points included; energy is counts and bytes times a published table. A time
floor takes the bandwidth and the peak of a machine, measured by :func:`measure` or given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from . import _threads
from ._api import matmul, quantize
from .formats import Format

__all__ = [
    "ENERGY",
    "SCHEMES",
    "Cost",
    "EnergyTable",
    "Machine",
    "Roofline",
    "attention",
    "energy",
    "layer",
    "measure",
    "product",
    "roofline",
    "shift_add_counts",
    "weight_bytes",
]


class EnergyTable(NamedTuple):
    """Picojoules per operation and per byte."""

    name: str
    source: str
    operations: Mapping[str, float]
    sram: float
    """Per byte of a small on-chip memory (32 KiB)."""
    dram: float
    """Per byte of external memory."""
    sources: Mapping[str, str] = MappingProxyType({})
    """Where each figure is from, those of the memories as ``"sram"`` and ``"dram"``."""


_HOROWITZ = (
    "M. Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, "
    "figure 1.1.9: rough energy costs in 45 nm at 0.9 V"
)
_JOUPPI = (
    "N. Jouppi et al., Ten lessons from three generations shaped Google's TPUv4i, ISCA 2021, "
    "table 2: energy per operation, 45 nm and 7 nm"
)
_SHIFTADDNET = (
    "H. You et al., ShiftAddNet, NeurIPS 2020, table 1: a 32-bit shift in 45 nm; shorter ones cost "
    "less"
)


def _table(
    name: str,
    source: str,
    published: Mapping[str, float],
    shift: tuple[float, str],
    access: tuple[float, float],
) -> EnergyTable:
    """Add what nobody published to a table; memories as picojoules per access of 64 bits."""
    half, bit = published["int32_add"] / 2, published["int8_add"] / 8
    guesses = {
        "int16_add": (half, "an estimate: half of an int32 addition"),
        "shift": shift,
        "bit": (bit, "an estimate: an XNOR and a counted bit as an eighth of an int8 addition"),
    }
    return EnergyTable(
        name,
        source,
        {**published, **{kind: value for kind, (value, _) in guesses.items()}},
        access[0] / 8,
        access[1] / 8,
        {
            **dict.fromkeys((*published, "sram", "dram"), source),
            **{kind: why for kind, (_, why) in guesses.items()},
        },
    )


# Memories: a cache of 32 KiB; DRAM, the lower end at 45 nm, DDR3 and DDR4 at 7 nm.
ENERGY: dict[str, EnergyTable] = {
    "45nm": _table(
        "45nm",
        _HOROWITZ,
        {
            "int8_add": 0.03,
            "int32_add": 0.1,
            "int8_mul": 0.2,
            "int32_mul": 3.1,
            "fp16_add": 0.4,
            "fp16_mul": 1.1,
            "fp32_add": 0.9,
            "fp32_mul": 3.7,
        },
        (0.13, _SHIFTADDNET),
        (20.0, 1300.0),
    ),
    "7nm": _table(
        "7nm",
        _JOUPPI,
        {
            "int8_add": 0.007,
            "int32_add": 0.03,
            "int8_mul": 0.07,
            "int32_mul": 1.48,
            "fp16_add": 0.16,
            "fp16_mul": 0.34,
            "fp32_add": 0.38,
            "fp32_mul": 1.31,
        },
        (0.13 * 0.03 / 0.1, "an estimate: the shift in 45 nm, times what an int32 addition became"),
        (8.5, 1300.0),
    ),
}


class Cost(NamedTuple):
    """Operations by kind and bytes by component."""

    operations: dict[str, float]
    bytes: dict[str, float]

    def __add__(self, other: object) -> Cost:
        """Return the sum of two costs."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(_total((self.operations, other.operations)), _total((self.bytes, other.bytes)))

    @property
    def nbytes(self) -> float:
        """All bytes."""
        return sum(self.bytes.values())

    @property
    def operation_count(self) -> float:
        """All operations."""
        return sum(self.operations.values())


def _total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            out[name] = out.get(name, 0.0) + value
    return out


class _Work(NamedTuple):
    m: int
    n: int
    k: int
    groups: int
    bits: int
    digits: float
    zeros: bool

    @property
    def macs(self) -> float:
        return float(self.m) * self.n * self.k

    @property
    def outputs(self) -> float:
        return float(self.m) * self.n

    @property
    def ends(self) -> float:
        """Ends of groups: an output and a group each."""
        return self.outputs * self.groups


def _float(kind: str) -> Callable[[_Work], dict[str, float]]:
    return lambda w: {f"{kind}_mul": w.macs, "fp32_add": w.macs}


def _int8(w: _Work) -> dict[str, float]:
    # A scale per end of a group, a fused multiply-add, and the zero point's product.
    zero = w.ends if w.zeros else 0.0
    return {
        "int8_mul": w.macs,
        "int32_add": w.macs + zero,
        "int32_mul": zero,
        "fp32_mul": w.ends,
        "fp32_add": w.ends,
    }


def _first(product: str) -> Callable[[_Work], dict[str, float]]:
    """Dequantise every weight, then multiply floats."""

    def count(w: _Work) -> dict[str, float]:
        weights = float(w.n) * w.k
        zero = {"int16_add": weights} if w.zeros else {}
        return _total(({f"{product}_mul": w.macs + weights, "fp32_add": w.macs}, zero))

    return count


def _shift_add(w: _Work) -> dict[str, float]:
    # One addition for each bit that is set; a shift for each plane of a group; sums of activations.
    zero = w.ends if w.zeros else 0.0
    return {
        "int16_add": w.macs * w.digits,
        "shift": w.ends * w.bits,
        "int32_add": w.ends * w.bits + float(w.m) * w.k + zero,
        "int32_mul": zero,
        "fp32_mul": w.ends,
        "fp32_add": w.ends,
    }


def _shift_add_half(w: _Work) -> dict[str, float]:
    # A shift of a float is an int8 addition to its exponent.
    return {
        "int8_add": w.macs * w.digits,
        "fp16_add": w.macs * w.digits,
        "fp32_add": w.macs + w.ends,
        "fp32_mul": w.ends,
    }


def _lmul(w: _Work) -> dict[str, float]:
    # Two integer additions of 16 bits: the bit patterns, and the offset.
    return {"int16_add": 2 * w.macs, "fp32_add": w.macs}


def _ternary(w: _Work) -> dict[str, float]:
    return {"int16_add": w.macs * w.digits, "fp32_mul": w.ends, "fp32_add": w.ends}


def _binary(w: _Work) -> dict[str, float]:
    return {"bit": w.macs, "int32_add": w.macs / 64, "fp32_mul": w.ends}


def _matadd(w: _Work) -> dict[str, float]:
    return {"int16_add": w.macs, "fp32_mul": w.ends, "fp32_add": w.ends}


def _shift(w: _Work) -> dict[str, float]:
    return {"shift": w.macs, "int32_add": w.macs, "fp32_mul": w.ends, "fp32_add": w.ends}


class Scheme(NamedTuple):
    """A way to compute a product."""

    name: str
    about: str
    format: str | None
    """Of the weights; None for float16."""
    activation_bits: int
    counts: Callable[[_Work], dict[str, float]]
    digits: float
    """Bits that are set in a weight, on average; 0 where they do not matter."""


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("fp16", "float16 products, float32 sums", None, 16, _float("fp16"), 0),
        Scheme("w8a8", "int8 products, a scale per row", "int8", 8, _int8, 0),
        Scheme(
            "w4a16", "weights decoded first, float16 products", "int4_g128", 16, _first("fp16"), 0
        ),
        Scheme("w4a8", "int8 products, scales after each group", "int4_g128", 8, _int8, 0),
        Scheme(
            "w4a8_mixpe", "shift and add, scales after each group", "int4_g128", 8, _shift_add, 2
        ),
        Scheme(
            "w4a16_mixpe",
            "additions to exponents, scales after each group",
            "int4_g128",
            16,
            _shift_add_half,
            2,
        ),
        Scheme("lmul", "sums of bit patterns for products, bfloat16", None, 16, _lmul, 0),
        # Two thirds of the weights are not 0, as quantising normal values gives.
        Scheme("ternary", "int8 activations added or subtracted", "ternary", 8, _ternary, 2 / 3),
        Scheme("shift", "int8 activations shifted by powers of two", "pow2_4_g128", 8, _shift, 0),
        Scheme("matadd", "int8 activations added under signs", "bipolar1", 8, _matadd, 0),
        Scheme("binary", "differing bits counted", "bipolar1", 1, _binary, 0),
    )
}


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}: expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _extent(name: str, value: SupportsIndex) -> int:
    n = int(value)
    if n < 0:
        raise ValueError(f"{name} must not be negative, got {n}")
    return n


def weight_bytes(rows: int, cols: int, format: str | None) -> dict[str, float]:
    """Return the bytes of a weight by component, float16 for None."""
    if format is None:
        return {"weights": 2.0 * rows * cols}
    f = Format(format)
    groups = f.groups(cols)
    width = {"f32": 4, "f16": 2, "bf16": 2}.get(f.scale, 1)
    parts = {"weights": float(rows * f.row_bytes(cols)), "scales": float(rows * groups * width)}
    if f.has_zeros:
        parts["zeros"] = float(rows * groups)
    return parts


def product(
    m: SupportsIndex,
    n: SupportsIndex,
    k: SupportsIndex,
    scheme: str,
    *,
    format: str | None = None,
    digits: float | None = None,
) -> Cost:
    """Count what a product ``(M, K) @ (K, N)`` costs under a scheme.

    Parameters
    ----------
    m, n, k : int
        Rows of activations, output features, input features.
    scheme : str
        One of :data:`SCHEMES`.
    format : str, optional
        Of the weights; the scheme's own by default.
    digits : float, optional
        Bits set in a weight on average, for schemes that add once for each: the scheme's assumption
        by default (half of the bits, two thirds for ternary).

    Returns
    -------
    Cost

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.cost.product(1, 4096, 4096, "w8a8").operations["int8_mul"]
    16777216.0
    """
    s = _scheme(scheme)
    if digits is not None and not (math.isfinite(digits) and digits >= 0):
        raise ValueError(f"digits must be finite and not negative, got {digits}")
    rows, outs, deep = _extent("m", m), _extent("n", n), _extent("k", k)
    name = s.format if format is None else Format(format)
    f = None if name is None else Format(name)
    bits = 16 if f is None else f.bits
    groups = 1 if f is None else f.groups(deep)
    set_bits = (
        float(digits)
        if digits is not None
        else s.digits and s.digits * (bits / 4 if s.name.endswith("mixpe") else 1)
    )
    work = _Work(rows, outs, deep, groups, bits, set_bits, f is not None and f.has_zeros)
    operations = {kind: v for kind, v in s.counts(work).items() if v}
    moved = weight_bytes(outs, deep, name)
    moved["activations"] = rows * deep * s.activation_bits / 8
    moved["output"] = rows * outs * 2.0
    return Cost(operations, moved)


def attention(
    tokens: SupportsIndex,
    context: SupportsIndex,
    heads: SupportsIndex,
    width: SupportsIndex,
    scheme: str = "fp16",
    *,
    kv_heads: SupportsIndex | None = None,
) -> Cost:
    """Count scores, softmax and mixing of one attention.

    Parameters
    ----------
    tokens, context : int
        Queries, and keys that each of them sees.
    heads, width : int
        Number of heads and their width.
    scheme : {"fp16", "int8", "binary"}
        float16; int8; or hash codes of 16 bits with linear cost: signs times int8 values.
    kv_heads : int, optional
        Heads of keys and values, `heads` by default.

    Returns
    -------
    Cost
    """
    t, c, h, d = (
        _extent(name, v)
        for name, v in (
            ("tokens", tokens),
            ("context", context),
            ("heads", heads),
            ("width", width),
        )
    )
    kv = h if kv_heads is None else _extent("kv_heads", kv_heads)
    macs = float(t) * c * h * d
    soft = float(t) * c * h
    if scheme == "fp16":
        operations = {"fp16_mul": 2 * macs, "fp32_add": 2 * macs + 2 * soft, "fp32_mul": 4 * soft}
        return Cost(operations, {"kv": 4.0 * c * kv * d, "activations": 4.0 * t * h * d})
    if scheme == "int8":
        operations = {
            "int8_mul": 2 * macs,
            "int32_add": 2 * macs + 6 * soft,
            "int32_mul": 6 * soft,
        }
        return Cost(operations, {"kv": 2.0 * c * kv * d, "activations": 2.0 * t * h * d})
    if scheme == "binary":
        bits = 16
        # The state is made once; every query adds or subtracts its 16 rows and divides once.
        made, read = float(c) * kv * bits * d, float(t) * h * bits * d
        operations = {"int16_add": made + read, "int32_mul": float(t) * h * d}
        return Cost(operations, {"kv": c * kv * (bits / 8 + d), "activations": 2.0 * t * h * d})
    raise ValueError(f"unknown scheme {scheme!r}: expected fp16, int8 or binary")


def layer(
    scheme: str,
    *,
    hidden: SupportsIndex = 4096,
    ffn: SupportsIndex = 11008,
    heads: SupportsIndex = 32,
    kv_heads: SupportsIndex | None = None,
    tokens: SupportsIndex = 1,
    context: SupportsIndex = 2048,
) -> Cost:
    """Count one transformer layer: four products of attention, three of a gated feed-forward part.

    Parameters
    ----------
    scheme : str
        One of :data:`SCHEMES` for the products; ``"binary"`` means float16 products around binary
        attention. Attention is int8 with int8 activations, else float16.
    hidden, ffn, heads, kv_heads : int
        Shape of the layer.
    tokens, context : int
        Tokens computed, and tokens that attention sees.

    Returns
    -------
    Cost
    """
    e, f, h = _extent("hidden", hidden), _extent("ffn", ffn), _extent("heads", heads)
    if h == 0 or e % h:
        raise ValueError(f"hidden must be a multiple of heads, got {e} and {h}")
    kv = h if kv_heads is None else _extent("kv_heads", kv_heads)
    t = _extent("tokens", tokens)
    width = e // h
    linear = "fp16" if scheme == "binary" else scheme
    kind = _scheme(scheme)
    inner = {1: "binary", 8: "int8"}.get(kind.activation_bits, "fp16")
    shapes = [(e, e), (kv * width, e), (kv * width, e), (e, e), (f, e), (f, e), (e, f)]
    cost = attention(t, context, h, width, inner, kv_heads=kv)
    for n, k in shapes:
        cost = cost + product(t, n, k, linear)
    return cost


def energy(cost: Cost, table: str | EnergyTable = "45nm") -> dict[str, float]:
    """Estimate energy in picojoules.

    Parameters
    ----------
    cost : Cost
        Operations and bytes.
    table : str or EnergyTable
        One of :data:`ENERGY`, or your own.

    Returns
    -------
    dict
        By kind of operation, and ``"memory"``: each byte once from external memory.

    Examples
    --------
    >>> import nibblas as nb
    >>> e = nb.cost.energy(nb.cost.product(1, 64, 64, "w8a8"))
    >>> round(e["int8_mul"], 1)
    819.2
    """
    if isinstance(table, str):
        if table not in ENERGY:
            raise ValueError(f"unknown table {table!r}: expected one of {', '.join(ENERGY)}")
        table = ENERGY[table]
    out: dict[str, float] = {}
    for kind, count in cost.operations.items():
        if kind not in table.operations:
            raise ValueError(f"the table {table.name} has no {kind}")
        out[kind] = count * table.operations[kind]
    out["memory"] = cost.nbytes * table.dram
    return out


class Machine(NamedTuple):
    """What a machine reaches."""

    bandwidth: float
    """Bytes read per second by a product with one row."""
    peaks: dict[str, float]
    """Operations per second of a large product, two for a multiply-add, by ``compute``."""


def measure(
    *, seconds: float = 1.0, size: SupportsIndex = 1024, threads: SupportsIndex | None = None
) -> Machine:
    """Measure bandwidth and peaks with the package's own products.

    Parameters
    ----------
    seconds : float, default 1
        To spend on each figure.
    size : int, default 1024
        Rows and columns of the products that give the peaks; bandwidth takes a weight 8 times as
        wide and high.
    threads : int, optional
        At most this many.

    Returns
    -------
    Machine
    """
    n = _extent("size", size)
    if n == 0 or not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"size and seconds must be positive, got {n} and {seconds}")
    count = _threads.resolve(threads)

    def best(call: Callable[[], object]) -> float:
        call()
        least, end = math.inf, time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            call()
            now = time.perf_counter()
            least = min(least, now - start)
            if now >= end:
                return least

    rng = np.random.default_rng(0)
    tall = quantize(rng.standard_normal((8 * n, 8 * n), np.float32), "int8")
    row = np.ones((1, 8 * n), np.float32)
    read = best(lambda: matmul(row, tall.T, compute="int8", threads=count))
    x, w = rng.standard_normal((2, n, n), np.float32)
    q = quantize(w, "int8")
    peaks = {}
    for compute in ("f32", "bf16", "int8"):
        took = best(partial(matmul, x, q.T, compute=compute, threads=count))
        peaks[compute] = 2.0 * n**3 / took
    return Machine(tall.nbytes / read, peaks)


class Roofline(NamedTuple):
    """Where a product stands between memory and arithmetic."""

    operations: float
    """Two for each multiply-add."""
    bytes: dict[str, float]
    intensity: float
    """Operations per byte."""
    bound: str
    """``"memory"`` or ``"compute"``."""
    floor_seconds: float
    achieved: float | None
    """Floor over measured time, where a time was given."""


def roofline(
    m: SupportsIndex,
    n: SupportsIndex,
    k: SupportsIndex,
    format: str | None,
    *,
    compute: str = "int8",
    machine: Machine | None = None,
    seconds: float | None = None,
) -> Roofline:
    """Place a product on a machine's roofline.

    Parameters
    ----------
    m, n, k : int
        Rows of activations, output features, input features.
    format : str or None
        Of the weights, such as ``"int4_g128"``; None for float16.
    compute : str, default "int8"
        Which peak holds; activations count one byte for ``"int8"``, two for ``"bf16"``, four for
        ``"f32"``.
    machine : Machine, optional
        Measured now by default.
    seconds : float, optional
        What a call took.

    Returns
    -------
    Roofline

    Examples
    --------
    >>> import nibblas as nb
    >>> m = nb.cost.Machine(2039e9, {"int8": 624e12})
    >>> r = nb.cost.roofline(1, 4096, 4096, "uint4_g128", machine=m)
    >>> r.bound, round(1e6 * r.floor_seconds, 2)
    ('memory', 4.32)
    """
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be positive and finite, got {seconds}")
    where = measure() if machine is None else machine
    if compute not in where.peaks:
        raise ValueError(f"no peak for compute={compute!r}: expected {', '.join(where.peaks)}")
    if not (where.bandwidth > 0 and where.peaks[compute] > 0):
        raise ValueError("bandwidth and peaks must be positive")
    rows, outs, deep = _extent("m", m), _extent("n", n), _extent("k", k)
    width = {"int8": 1, "bf16": 2}.get(compute, 4)
    moved = weight_bytes(outs, deep, format)
    moved["activations"] = float(rows * deep * width)
    moved["output"] = float(rows * outs * (2 if compute == "bf16" else 4))
    operations = 2.0 * rows * outs * deep
    total = sum(moved.values())
    memory, arithmetic = total / where.bandwidth, operations / where.peaks[compute]
    floor = max(memory, arithmetic)
    return Roofline(
        operations,
        moved,
        operations / total if total else 0.0,
        "memory" if memory >= arithmetic else "compute",
        floor,
        None if seconds is None else floor / seconds,
    )


def shift_add_counts(m: SupportsIndex, q: Any, *, order: str = "deferred") -> dict[str, float]:
    """Count what :func:`nibblas.approx.shift_add_matmul` does, from the codes themselves.

    Parameters
    ----------
    m : int
        Rows of int8 activations.
    q : QTensor
        The weights ``(N, K)``, with integer codes.
    order : {"deferred", "first"}
        Scales after each group (MixPE), or every weight dequantised before its product.

    Returns
    -------
    dict
        ``adds``, ``shifts``, ``multiplies`` and ``dequantisations``.
    """
    if order not in ("deferred", "first"):
        raise ValueError(f"unknown order {order!r}: expected deferred or first")
    rows = _extent("m", m)
    n, k = q.shape
    element = q.format.element
    if not element.linear:
        raise ValueError(f"{q.format} has no binary digits to shift by")
    if order == "first":
        macs = float(rows) * n * k
        return {
            "adds": macs,
            "shifts": 0.0,
            "multiplies": macs + float(n) * k,
            "dequantisations": float(n) * k,
        }
    codes = q.codes().astype(np.int64)
    # The codes as they are stored: bipolar ones are 2 u - (2^b - 1).
    stored = codes - element.minimum
    if str(element.name).startswith("bipolar"):
        stored //= 2
    ones = sum(int(((stored >> i) & 1).sum()) for i in range(element.bits))
    ends = float(rows) * n * q.format.groups(k)
    return {
        "adds": float(rows) * ones + ends * element.bits + float(rows) * k,
        "shifts": ends * element.bits,
        "multiplies": ends * (2 if q.zeros is not None else 1),
        "dequantisations": ends,
    }
