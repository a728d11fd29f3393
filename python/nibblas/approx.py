"""Products without a multiplier: shift-and-add, shifts, L-Mul, sums of signs, binary attention.

Models of arithmetic that hardware could be built for, exact to the bit and fast enough for whole
layers. On a machine that has multipliers none of them is the faster way to a product; what they
would save is counted by :mod:`nibblas.cost`.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core, _threads
from ._api import _bias, _check_inner, _import, _on_device, matmul, quantize
from .intops import _where_it_is
from .intops import matmul as exact
from .qtensor import QTensor

__all__ = [
    "Routed",
    "SmallFloat",
    "angular_attention",
    "expert_balance",
    "expert_matmul",
    "hamming_matmul",
    "hash_codes",
    "hashed_attention",
    "lmul",
    "lmul_matmul",
    "lmul_offset",
    "matadd",
    "shift_add_matmul",
    "shift_matmul",
]


def _rows(x: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return activations as a matrix, and the shape of the stack before it."""
    if x.ndim == 0:
        raise ValueError("activations need at least one dimension")
    lead = x.shape[:-1]
    return np.ascontiguousarray(x.reshape(math.prod(lead), x.shape[-1])), lead


def shift_add_matmul(
    a: ArrayLike,
    b: QTensor,
    /,
    *,
    bias: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Multiply by shifting and adding, scales after each group (MixPE).

    Parameters
    ----------
    a : array_like
        Activations ``(..., K)``. int8 is taken as codes with scale 1; float16 and bfloat16 by
        adding to exponents.
    b : QTensor
        ``qw.T`` of weights whose codes are integers: int, uint, bipolar or ternary.
    bias : array_like, optional
        One value per row of the weights, added last in float32.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    ndarray
        ``(..., N)``: float32 for int8, the bits of ``nb.matmul(a, qw.T, compute="int8")``; else the
        type of `a`, rounded once.

    Notes
    -----
    For floats the sum of a group is ``D = fl(D + w * a)`` with the integer ``w`` and k ascending,
    each product exact, and ``acc = fma(D, scale, acc)`` follows. Exponents are wider than
    float16's, so that terms do not overflow; rows with NaN, infinity or bfloat16's extremes follow
    IEEE multiplication. Floats take weights of at most 12 bits, whose products are exact.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> q = nb.quantize(np.eye(3, 8, dtype=np.float32), "int4")
    >>> a = np.arange(8, dtype=np.int8)
    >>> (nb.approx.shift_add_matmul(a, q.T) == nb.matmul(a, q.T, compute="int8")).all()
    np.True_
    """
    return _shifted("shift_add_matmul", "planes", a, b, bias, threads)


def shift_matmul(
    a: ArrayLike,
    b: QTensor,
    /,
    *,
    bias: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Multiply by weights that are 0 or powers of two: a shift layer (DeepShift, ShiftAddViT).

    Parameters
    ----------
    a : array_like
        Activations ``(..., K)``. int8 is taken as codes with scale 1; float16 and bfloat16 by
        adding to exponents.
    b : QTensor
        ``qw.T`` of weights whose levels are 0 and powers of two: ``"pow2_4"``, ``"e3m0"``,
        ``"log2_4"``, ``"ternary"``, ``"bipolar1"``, ``"int2"``.
    bias : array_like, optional
        One value per row of the weights, added last in float32.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    ndarray
        ``(..., N)``: float32 for int8; else the type of `a`, rounded once.

    Notes
    -----
    Bytes are shifted to the left alone, from the format's smallest power on, and summed as
    integers: exact, where right shifts would drop bits. Then ``acc = fma(f32(D), scale, acc)``
    after each group. The add layer beside it is :func:`matadd`.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> q = nb.quantize(np.float32([[1, -0.5, 0, 0.25]]), "pow2_4")
    >>> nb.approx.shift_matmul(np.int8([[100, 10, 3, 8]]), q.T)
    array([[97.]], dtype=float32)
    """
    return _shifted("shift_matmul", "powers", a, b, bias, threads)


def _shifted(
    name: str,
    by: str,
    a: ArrayLike,
    b: QTensor,
    bias: ArrayLike | None,
    threads: SupportsIndex | None,
) -> NDArray[Any]:
    if not isinstance(b, QTensor):
        raise TypeError(f"{name} needs a QTensor on the right, got {type(b).__name__}")
    x = _import(a)
    half = x.dtype == np.float16 or x.dtype.name == "bfloat16"
    if not half and x.dtype != np.int8:
        raise TypeError(f"activations are int8, float16 or bfloat16, got {x.dtype}")
    _check_inner(x.shape, b, True)
    storage = b._storage
    if storage.device != "cpu":
        raise ValueError(f"{name} is a model for the CPU: use qw.to('cpu')")
    matrix, lead = _rows(x)
    y = np.empty((len(matrix), storage.rows), np.float32)
    extra = _bias(bias, storage.rows)
    left = matrix.astype(np.float32) if half else matrix
    count = _threads.resolve(threads)
    _core.ops_shift_add(by, left.ravel(), storage.parts(), y.ravel(), extra, count, None)
    with np.errstate(over="ignore"):
        return y.reshape(*lead, storage.rows).astype(x.dtype if half else np.float32, copy=False)


class Routed(NamedTuple):
    """What a mixture of experts gives."""

    output: NDArray[Any]
    """``(..., N)``."""
    shifted: NDArray[np.bool_]
    """``(...)``: whether a token went to the shift expert."""
    gates: NDArray[np.float32]
    """``(..., 2)``: the router's probabilities, of multiplying and of shifting."""


def expert_matmul(
    a: ArrayLike,
    multiply: QTensor,
    shift: QTensor,
    router: ArrayLike | QTensor,
    /,
    *,
    bias: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
) -> Routed:
    """Send each token to a multiplication or to a shift expert (ShiftAddViT).

    Parameters
    ----------
    a : array_like
        Tokens ``(..., K)``: int8, taken as codes with scale 1, float16 or bfloat16.
    multiply : QTensor
        ``qw.T`` of the weights of the multiplication expert, see :func:`nibblas.matmul`.
    shift : QTensor
        ``qw.T`` of the weights of the shift expert, see :func:`shift_matmul`.
    router : array_like or QTensor
        ``(2, K)``: a token goes where its product with the router is larger, and to the
        multiplication expert where both are equal.
    bias : array_like, optional
        One value per output, added by either expert.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    Routed
        The output is the chosen expert's times its gate, the softmax of both products; float32 for
        int8, else the type of `a`.

    Notes
    -----
    A token's row is that of the expert's own product, whatever other tokens there are. What the
    router learns from is :func:`expert_balance`.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> w = np.eye(4, 8, dtype=np.float32)
    >>> experts = nb.quantize(w, "int8").T, nb.quantize(w, "pow2_4").T
    >>> router = np.zeros((2, 8), np.float32)
    >>> router[1, 0] = 1
    >>> x = np.zeros((2, 8), np.float16)
    >>> x[:, 0] = 2, -2
    >>> nb.approx.expert_matmul(x, *experts, router).shifted
    array([ True, False])
    """
    x = _import(a)
    for name, b in (("multiply", multiply), ("shift", shift)):
        if not isinstance(b, QTensor):
            raise TypeError(f"{name} must be a QTensor, got {type(b).__name__}")
    if multiply.shape != shift.shape:
        raise ValueError(f"experts differ in shape: {multiply.shape} and {shift.shape}")
    if not (x.dtype in (np.int8, np.float16) or x.dtype.name == "bfloat16"):
        raise TypeError(f"activations are int8, float16 or bfloat16, got {x.dtype}")
    _check_inner(x.shape, multiply, True)
    matrix, lead = _rows(x)
    rows, n = matrix.shape[0], multiply.shape[1]
    plan = router if isinstance(router, QTensor) else _router(router, matrix.shape[1])
    if plan.shape != (2, matrix.shape[1]):
        raise ValueError(f"router must have shape (2, {matrix.shape[1]}), got {plan.shape}")
    # One arithmetic for every machine: which expert is chosen must not depend on how sums are cut.
    scores: NDArray[Any] = matmul(matrix.astype(np.float32), plan.T, threads=threads)
    if not np.isfinite(scores).all():
        raise ValueError("tokens and router must be finite")
    shifted = scores[:, 1] > scores[:, 0]
    wide = scores.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    gates = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    exact = x.dtype == np.int8
    output = np.empty((rows, n), np.float32 if exact else x.dtype)
    for rule, own in ((~shifted, False), (shifted, True)):
        if not rule.any():
            continue
        part, gate = np.ascontiguousarray(matrix[rule]), gates[rule, int(own), None]
        y: NDArray[Any]
        if own:
            y = shift_matmul(part, shift, bias=bias, threads=threads)
        else:
            compute = "int8" if exact else "f32"
            y = matmul(part, multiply, compute=compute, bias=bias, threads=threads)
        output[rule] = (y.astype(np.float32) * gate).astype(output.dtype)
    return Routed(output.reshape(*lead, n), shifted.reshape(lead), gates.reshape(*lead, 2))


def _router(router: ArrayLike, cols: int) -> QTensor:
    weights = np.asarray(_import(router), np.float32)
    if weights.shape != (2, cols):
        raise ValueError(f"router must have shape (2, {cols}), got {weights.shape}")
    return quantize(weights, "f32")


def expert_balance(
    gates: ArrayLike, shifted: ArrayLike, latencies: tuple[float, float]
) -> tuple[float, float]:
    """Return how unevenly two experts are busy, by the router's wishes and by its choices.

    Both are squared coefficients of variation, 0 where the experts take equally long: of the sum of
    gates of an expert times its latency, and of its number of tokens times its latency. So the
    faster expert is balanced with more tokens (ShiftAddViT's latency-aware loss).

    Parameters
    ----------
    gates : array_like
        ``(..., 2)``, see :class:`Routed`.
    shifted : array_like of bool
        ``(...)``.
    latencies : tuple of float
        Measured times of a token in the multiplication and in the shift expert.

    Returns
    -------
    importance, load : float

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.approx.expert_balance([[0.5, 0.5]] * 3, [True, True, False], (2.0, 1.0))
    (0.1111111111111111, 0.0)
    """
    g, s = np.asarray(gates, np.float64), np.asarray(shifted)
    if s.dtype != np.bool_ or g.shape != (*s.shape, 2):
        raise ValueError(f"gates of shape {g.shape} do not fit choices of shape {s.shape}")
    if s.size == 0:
        raise ValueError("there is no token to balance")
    times = np.asarray(latencies, np.float64)
    if times.shape != (2,) or not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError(f"latencies are two positive numbers, got {latencies}")

    def variation(share: NDArray[np.float64]) -> float:
        busy = share * times / times.sum()
        return float(busy.var() / busy.mean() ** 2)

    count = float(s.sum())
    return variation(g.reshape(-1, 2).sum(axis=0)), variation(np.array([s.size - count, count]))


class SmallFloat(NamedTuple):
    """A binary float format: sign, exponent, mantissa."""

    exponent: int
    """Bits of the exponent."""
    mantissa: int
    """Bits of the mantissa."""
    specials: str
    """``"ieee"``: the highest exponent is Inf and NaN; ``"nan"``: all ones is NaN; ``"none"``."""

    @property
    def bias(self) -> int:
        """What is added to exponents."""
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        top = 2**self.exponent - 1 - (self.specials == "ieee") - self.bias
        last = 2.0**-self.mantissa * (1 + (self.specials == "nan"))
        return math.ldexp(2 - last, top)

    @property
    def smallest(self) -> float:
        """The smallest normal number."""
        return math.ldexp(1.0, 1 - self.bias)

    @classmethod
    def parse(cls, name: str) -> SmallFloat:
        """Return the format of a name.

        Parameters
        ----------
        name : str
            ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"e<X>m<Y>"``. As in the OCP standards,
            ``"e4m3"`` has NaN and no infinity, ``"e3m2"``, ``"e2m3"`` and ``"e2m1"`` have neither;
            the others have both.

        Raises
        ------
        ValueError
            If the name does not parse, or float32 does not hold the format.
        """
        named = {"fp32": "e8m23", "bf16": "e8m7", "fp16": "e5m10"}.get(name, name)
        found = re.fullmatch(r"e([0-9]{1,2})m([0-9]{1,2})", named)
        if found is None:
            raise ValueError(f"unknown format {name!r}: expected fp32, bf16, fp16 or e<X>m<Y>")
        e, m = int(found[1]), int(found[2])
        if not (2 <= e <= 8 and 1 <= m <= 23):
            raise ValueError(f"{name}: expected 2 to 8 bits of exponent and 1 to 23 of mantissa")
        none = ("e3m2", "e2m3", "e2m1")
        return cls(e, m, "nan" if named == "e4m3" else "none" if named in none else "ieee")


# One constant apart: what stands for the product of two mantissas.
_OFFSETS = {"mitchell": 0.0, "least_squares": 0.05533}
_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}


def lmul_offset(format: str, offset: str | float | None = None) -> float:
    """Return what L-Mul adds to the sum of two mantissas.

    Parameters
    ----------
    format : str
        As for :meth:`SmallFloat.parse`.
    offset : str or float, optional
        None or ``"lmul"``: ``2**-l(m)`` with ``l(m) = m`` up to 3 bits of mantissa, 3 for 4, 4
        beyond. ``"mitchell"``: 0. ``"least_squares"``: the least mean square of the relative error
        for evenly spread mantissas. A number in ``[0, 1)``. All are rounded to the mantissa's bits.

    Returns
    -------
    float

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.approx.lmul_offset("fp32"), nb.approx.lmul_offset("e4m3")
    (0.0625, 0.125)
    """
    m = SmallFloat.parse(format).mantissa
    if offset is None or offset == "lmul":
        return 2.0 ** -(m if m <= 3 else 3 if m == 4 else 4)
    if isinstance(offset, str):
        if offset not in _OFFSETS:
            raise ValueError(f"unknown offset {offset!r}: expected lmul, mitchell or least_squares")
        offset = _OFFSETS[offset]
    c = float(offset)
    if not 0 <= c < 1:
        raise ValueError(f"offset must lie in [0, 1), got {c}")
    return math.ldexp(round(math.ldexp(c, m)), -m)


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def _model(
    fmt: SmallFloat, name: str, offset: str | float | None, overflow: str
) -> tuple[int, int, int, int]:
    """Return the offset, the smallest, the largest number and what is beyond, as float32's bits."""
    if overflow not in ("saturate", "inf"):
        raise ValueError(f"unknown overflow {overflow!r}: expected saturate or inf")
    if overflow == "inf" and fmt.specials != "ieee":
        raise ValueError(f"{name} has no infinity: overflow='inf' has no result")
    correction = int(math.ldexp(lmul_offset(name, offset), 23))
    largest = _bits(fmt.largest)
    beyond = 0x7F800000 if overflow == "inf" else largest
    return 0x3F800000 - correction, _bits(fmt.smallest), largest, beyond


def _round(x: NDArray[np.float32], fmt: SmallFloat) -> NDArray[np.float32]:
    """Round to a format, ties to even; past the largest number to it."""
    wide = x.astype(np.float64)
    _, e = np.frexp(wide)
    step = np.maximum(e - 1, 1 - fmt.bias) - fmt.mantissa
    with np.errstate(invalid="ignore"):
        near = np.ldexp(np.rint(np.ldexp(wide, -step)), step)
    finite = np.isfinite(wide)
    near = np.where(finite, np.clip(near, -fmt.largest, fmt.largest), wide)
    if fmt.specials != "ieee" and np.isinf(wide).any():
        raise ValueError("the format has no infinity")
    if fmt.specials == "none" and np.isnan(wide).any():
        raise ValueError("the format has no NaN")
    return np.asarray(near, np.float32)


def _decode(u: NDArray[Any], fmt: SmallFloat) -> NDArray[np.float32]:
    """Return the values of bit patterns."""
    e, m = fmt.exponent, fmt.mantissa
    if u.size and int(u.max()) >> (1 + e + m):
        raise ValueError(f"bit patterns of {1 + e + m} bits, got {int(u.max())}")
    w = u.astype(np.int64)
    field, fraction = (w >> m) & (2**e - 1), w & (2**m - 1)
    normal = np.ldexp(1.0 + fraction * 2.0**-m, field - fmt.bias)
    value = np.where(field == 0, np.ldexp(fraction * 2.0**-m, 1 - fmt.bias), normal)
    if fmt.specials == "ieee":
        special = np.where(fraction == 0, np.inf, np.nan)
        value = np.where(field == 2**e - 1, special, value)
    elif fmt.specials == "nan":
        value = np.where((field == 2**e - 1) & (fraction == 2**m - 1), np.nan, value)
    return np.asarray(np.where(w >> (e + m), -value, value), np.float32)


def _encode(x: NDArray[np.float32], fmt: SmallFloat, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the bit patterns of values that the format has."""
    e, m = fmt.exponent, fmt.mantissa
    bits = x.view(np.uint32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    u = np.where(magnitude == 0, 0, (magnitude >> (23 - m)) - ((127 - fmt.bias) << m))
    if fmt.specials == "ieee":
        top = (2**e - 1) << m
        u = np.where(np.isinf(x), top, np.where(np.isnan(x), top | 1 << (m - 1), u))
    elif fmt.specials == "nan":
        u = np.where(np.isnan(x), 2 ** (e + m) - 1, u)
    out: NDArray[Any] = (u | (bits >> 31 << (e + m))).astype(dtype)
    return out


class _Operand(NamedTuple):
    values: NDArray[np.float32]
    dtype: np.dtype[Any]
    name: str


def _operand(x: ArrayLike, format: str | None) -> _Operand:
    a = _import(x)
    if not isinstance(format, str | None):
        raise TypeError(f"format must be a string, got {type(format).__name__}")
    if format is None:
        name = _DTYPES.get(a.dtype.name)
        if name is None:
            known = ", ".join(_DTYPES)
            raise TypeError(f"arrays of {a.dtype} need format=; without it: {known}")
        return _Operand(np.ascontiguousarray(a, np.float32), a.dtype, name)
    fmt = SmallFloat.parse(format)
    if a.dtype.kind == "u":
        if a.dtype.itemsize * 8 < 1 + fmt.exponent + fmt.mantissa:
            raise TypeError(f"{a.dtype} is too short for the bits of {format}")
        return _Operand(np.ascontiguousarray(_decode(a, fmt)), a.dtype, format)
    if a.dtype.kind not in "fV" or (a.dtype.kind == "V" and a.dtype.name not in _DTYPES):
        raise TypeError(f"expected floats, or unsigned integers as bit patterns, got {a.dtype}")
    with np.errstate(over="ignore"):
        wide = a.astype(np.float32)
    return _Operand(np.ascontiguousarray(_round(wide, fmt)), np.dtype(np.float32), format)


def _pair(a: ArrayLike, b: ArrayLike, format: str | None) -> tuple[_Operand, _Operand]:
    x, y = _operand(a, format), _operand(b, format)
    if x.dtype != y.dtype:
        raise TypeError(f"operands differ in type: {x.dtype} and {y.dtype}")
    return x, y


@_where_it_is
def lmul(
    a: ArrayLike,
    b: ArrayLike,
    *,
    format: str | None = None,
    offset: str | float | None = None,
    overflow: str = "saturate",
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Multiply floats by adding their bit patterns (L-Mul).

    Parameters
    ----------
    a, b : array_like
        Shapes that broadcast. Without `format`: float32, float16, bfloat16, float8_e4m3fn or
        float8_e5m2. With it: floats, which are rounded to the format first, or unsigned integers,
        which are its bit patterns.
    format : str, optional
        See :meth:`SmallFloat.parse`.
    offset : str or float, optional
        See :func:`lmul_offset`.
    overflow : {"saturate", "inf"}
        What a product past the largest finite number is.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray
        In the type of the operands; float32 for floats with `format`.

    Notes
    -----
    Zero and subnormal operands, and products below the smallest normal number, give a zero with the
    product's sign. NaN, and zero times infinity, give NaN.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.approx.lmul(np.float32([1, 1.5, 3, -2]), np.float32([1, 1.5, 5, 0.75]))
    array([ 1.0625,  2.125 , 14.5   , -1.5625], dtype=float32)
    """
    if _on_device(a) or _on_device(b):
        from . import cuda

        product: NDArray[Any] = cuda.lmul(a, b, format, offset, overflow)
        return product
    x, y = _pair(a, b, format)
    fmt = SmallFloat.parse(x.name)
    left, right = np.broadcast_arrays(x.values, y.values)
    out = np.empty(left.shape, np.float32)
    numbers = _model(fmt, x.name, offset, overflow)
    _core.ops_lmul(
        np.ascontiguousarray(left).ravel(),
        np.ascontiguousarray(right).ravel(),
        out.ravel(),
        numbers,
        _threads.resolve(threads),
        None,
    )
    if x.dtype.kind == "u":
        return _encode(out, fmt, x.dtype)
    return out.astype(x.dtype, copy=False)


@_where_it_is
def lmul_matmul(
    a: ArrayLike,
    b: ArrayLike,
    *,
    format: str | None = None,
    offset: str | float | None = None,
    overflow: str = "saturate",
    threads: SupportsIndex | None = None,
) -> NDArray[np.float32]:
    """Matrix product whose products are L-Mul's, summed in float32 with k ascending.

    Parameters
    ----------
    a : array_like
        ``(..., K)``.
    b : array_like
        ``(K, N)``.
    format, offset, overflow
        As for :func:`lmul`.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    ndarray of float32
        ``(..., N)``.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.approx.lmul_matmul(np.float32([[1, 3]]), np.float32([[1], [5]]))
    array([[15.5625]], dtype=float32)
    """
    if _on_device(a) or _on_device(b):
        from . import cuda

        sums: NDArray[np.float32] = cuda.lmul_matmul(a, b, format, offset, overflow)
        return sums
    x, y = _pair(a, b, format)
    if y.values.ndim != 2:
        raise ValueError(f"b must have two dimensions, got shape {y.values.shape}")
    matrix, lead = _rows(x.values)
    k, n = y.values.shape
    if matrix.shape[1] != k:
        raise ValueError(f"shapes {x.values.shape} and {y.values.shape} do not fit")
    numbers = _model(SmallFloat.parse(x.name), x.name, offset, overflow)
    out = np.empty((len(matrix), n), np.float32)
    _core.ops_lmul_matmul(
        matrix.ravel(),
        y.values.ravel(),
        out.ravel(),
        n,
        k,
        numbers,
        _threads.resolve(threads),
        None,
    )
    return out.reshape(*lead, n)


def _unit(element: str, codes: NDArray[Any]) -> QTensor:
    """Return codes with scale 1, and no scale where rows are empty."""
    rows, cols = codes.shape
    return QTensor.from_parts(element, codes, np.ones((rows, min(cols, 1)), np.float32))


def _signs(x: ArrayLike | QTensor, name: str) -> QTensor:
    """Return a matrix of +-1 as one bit per value with scale 1."""
    if isinstance(x, QTensor):
        if not str(x.format).startswith("bipolar1") or x.format.group is not None:
            raise ValueError(f"{name} must be bipolar1 with one scale per row, got {x.format}")
        return x
    codes = _import(x)
    if codes.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {codes.shape}")
    if codes.dtype == np.bool_:
        codes = np.where(codes, np.int8(1), np.int8(-1))
    elif not np.isin(codes, (-1, 1)).all():
        raise ValueError(f"{name} must hold -1 and 1 alone")
    return _unit("bipolar1", codes.astype(np.int8))


def _device_signs(x: Any, name: str) -> Any:
    """Return -1 and 1 as bytes of a device."""
    from .cuda import import_array

    codes = import_array(x)
    if codes.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {codes.shape}")
    if codes.dtype == np.bool_:
        return codes.astype(np.int8) * 2 - 1
    if codes.dtype.kind not in "iuf" or not bool((abs(codes) == 1).all()):
        raise ValueError(f"{name} must hold -1 and 1 alone")
    return codes.astype(np.int8)


def _device_right(b: Any) -> Any:
    """Return what a product on a device takes on its right."""
    return _device_signs(b, "b").T if _on_device(b) else _signs(b, "b").T


@_where_it_is
def hamming_matmul(
    a: ArrayLike | QTensor,
    b: ArrayLike | QTensor,
    *,
    threads: SupportsIndex | None = None,
) -> NDArray[np.int32]:
    """Products of signs, ``a @ b.T``, by counting the bits that differ.

    Parameters
    ----------
    a, b : array_like or QTensor
        ``(M, K)`` and ``(N, K)``: -1 and 1, bools (False is -1), or bipolar1 tensors, whose scales
        are left out.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray of int32
        ``K - 2 * differing`` for each pair of rows; where `a` lies, if that is a device.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.approx.hamming_matmul([[1, -1, 1]], [[1, 1, 1], [-1, 1, -1]])
    array([[ 1, -3]], dtype=int32)
    """
    if _on_device(a):
        counted: NDArray[np.int32] = exact(_device_signs(a, "a"), _device_right(b))
        return counted
    left, right = _signs(a, "a"), _signs(b, "b")
    y: NDArray[np.int32] = matmul(left, right.T, dtype=np.int32, threads=threads)
    return y


@_where_it_is
def matadd(
    a: ArrayLike,
    b: ArrayLike | QTensor,
    *,
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Multiply by signs, ``a @ b.T``: every product is an addition or a subtraction.

    Parameters
    ----------
    a : array_like
        ``(..., K)``: int8, or floats.
    b : array_like or QTensor
        ``(N, K)``: as for :func:`hamming_matmul`.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray
        int32 and exact for int8; for floats their type, summed in float32 with k ascending (on a
        device as :func:`nibblas.matmul` does there).

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.approx.matadd(np.array([[5, 7, 1]], np.int8), [[1, -1, 1]])
    array([[-1]], dtype=int32)
    """
    if _on_device(a):
        from .cuda import import_array

        there = import_array(a)
        if there.dtype == np.int8:
            added: NDArray[Any] = exact(there, _device_right(b))
            return added
        if there.dtype.kind in "iub":
            raise TypeError(f"a must be int8 or floats, got {there.dtype}")
        weights = _unit("bipolar1", _signs(b, "b").codes())
        floats: NDArray[Any] = matmul(there, weights.T, threads=threads)
        return floats
    right = _signs(b, "b")
    x = _import(a)
    if x.dtype == np.int8:
        matrix, lead = _rows(x)
        y: NDArray[Any] = matmul(_unit("int8", matrix), right.T, dtype=np.int32, threads=threads)
        return y.reshape(*lead, y.shape[-1])
    if x.dtype.kind in "iub":
        raise TypeError(f"a must be int8 or floats, got {x.dtype}")
    # Scales of 1 leave the products exact: +-a.
    plain = _unit("bipolar1", right.codes()) if isinstance(b, QTensor) else right
    product: NDArray[Any] = matmul(x, plain.T, threads=threads)
    return product


def hash_codes(x: ArrayLike, anchors: ArrayLike, projection: ArrayLike) -> NDArray[np.int8]:
    """Hash vectors to signs with a Gaussian kernel (EcoFormer).

    Parameters
    ----------
    x : array_like
        ``(..., d)``; each vector is scaled to length 1.
    anchors : array_like
        ``(m, d)``.
    projection : array_like
        ``(bits, m)``.

    Returns
    -------
    ndarray of int8
        ``(..., bits)`` of -1 and 1; the sign of 0 is 1.
    """
    v = np.asarray(x, np.float64)
    points, weights = np.asarray(anchors, np.float64), np.asarray(projection, np.float64)
    if points.ndim != 2 or weights.ndim != 2 or v.ndim < 1:
        raise ValueError("expected x (..., d), anchors (m, d), projection (bits, m)")
    if points.shape[1] != v.shape[-1] or weights.shape[1] != points.shape[0]:
        raise ValueError(
            f"x {v.shape}, anchors {points.shape} and projection {weights.shape} do not fit"
        )
    if not (np.isfinite(v).all() and np.isfinite(points).all() and np.isfinite(weights).all()):
        raise ValueError("vectors, anchors and projection must be finite")
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    v = v / np.where(length == 0, 1, length)
    distance = (v * v).sum(-1)[..., None] - 2 * (v @ points.T) + (points * points).sum(-1)
    distance = np.maximum(distance, 0)
    spread = distance.mean() if distance.size else 1.0
    kernel = np.exp(-distance / (2 * (spread if spread > 0 else 1.0)))
    kernel = kernel - (kernel.mean(axis=tuple(range(kernel.ndim - 1))) if kernel.size else 0)
    return np.where(kernel @ weights.T >= 0, np.int8(1), np.int8(-1))


def hashed_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    compat: str | None = None,
    threads: SupportsIndex | None = None,
) -> NDArray[np.float32]:
    """Attention of hash codes with a cost linear in the number of tokens (EcoFormer).

    ``out_i = sum_j (c + q_i . k_j) v_j / sum_j (c + q_i . k_j)`` with ``c = bits + 1``, so that
    weights are at least 1. ``k^T v`` is formed first: additions and subtractions alone.

    Parameters
    ----------
    q, k : array_like
        ``(M, bits)`` and ``(N, bits)`` of -1 and 1, see :func:`hash_codes`.
    v : array_like
        ``(N, d)``.
    compat : {"ecoformer"}, optional
        What was published adds ``c`` times the token's own value, where the sum over all belongs;
        it needs M = N.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray of float32
        ``(M, d)``.
    """
    if compat not in (None, "ecoformer"):
        raise ValueError(f"unknown compat {compat!r}: expected ecoformer")
    left, right = _signs(q, "q"), _signs(k, "k")
    values = np.asarray(v, np.float32)
    if values.ndim != 2 or len(values) != len(right) or left.shape[1] != right.shape[1]:
        raise ValueError(f"q {left.shape}, k {right.shape} and v {values.shape} do not fit")
    if compat is not None and len(left) != len(right):
        raise ValueError("the published form adds each token's own value: q and k must be as long")
    tokens, bits = right.shape
    if tokens == 0:
        raise ValueError("attention over no token has no result")
    c = np.float32(bits + 1)
    state = matadd(values.T, right.codes().T, threads=threads).T
    total = values.sum(axis=0, dtype=np.float32)
    own = values if compat else total
    top = matadd(np.ascontiguousarray(state.T), left.codes(), threads=threads).T + c * own
    count = right.codes().sum(axis=0, dtype=np.int64)
    bottom = left.codes().astype(np.int64) @ count + tokens * (bits + 1)
    return np.asarray(top / bottom[:, None], np.float32)


def angular_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    threads: SupportsIndex | None = None,
) -> NDArray[np.float32]:
    """Attention of signs with a cost linear in the number of tokens (ShiftAddViT).

    ``v / 2 + q (k^T v) / pi``, each row scaled to length 1: both products are additions and
    subtractions alone. The convolution that the paper adds afterwards is the caller's.

    Parameters
    ----------
    q, k : array_like
        ``(N, bits)`` of -1 and 1.
    v : array_like
        ``(N, d)``.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray of float32
        ``(N, d)``; rows of zeros stay zero.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.approx.angular_attention([[1, -1]], [[1, -1]], np.float32([[3, 4]])).round(3)
    array([[0.6, 0.8]], dtype=float32)
    """
    left, right = _signs(q, "q"), _signs(k, "k")
    values = np.asarray(v, np.float32)
    if values.ndim != 2 or not len(values) == len(left) == len(right) or left.shape != right.shape:
        raise ValueError(f"q {left.shape}, k {right.shape} and v {values.shape} do not fit")
    state = matadd(values.T, right.codes().T, threads=threads)
    mixed = matadd(np.ascontiguousarray(state), left.codes(), threads=threads).T
    out = values * np.float32(0.5) + mixed * np.float32(1 / math.pi)
    length = np.linalg.norm(out, axis=-1, keepdims=True)
    return np.asarray(out / np.where(length == 0, np.float32(1), length), np.float32)
