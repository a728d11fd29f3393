"""Operators of integers alone: what a quantised network does between its products.

A tensor is an integer array and a positive float, its scale: the value is code times scale.
Scales are turned into integers once per call; from there to the result no operation is a float
one, so results are the same on every machine and for every number of threads. Operators that
choose the scale of their result return ``(codes, scale)``.

``compat="ibert"`` and ``compat="ivit"`` give the operators of I-BERT and I-ViT as published, with
their quirks, as int64.

CuPy arrays are computed where they are, with the same bits, on the current stream. Parameters
(multipliers, weights of norms) are read on the host. A check of values waits for the device: codes
of more than 32 bits, those of `exp` and `log2_matmul`, of signed types in `sqrt`, the published
layer norms.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, SupportsIndex, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core, _threads
from ._api import _import, _on_device
from ._api import matmul as _matmul
from .qtensor import QTensor

__all__ = [
    "add",
    "bitlinear",
    "dyadic",
    "exp",
    "fold_channel_scales",
    "gelu",
    "layernorm",
    "log2_matmul",
    "log2_softmax",
    "matmul",
    "requantize",
    "rmsnorm",
    "rmsnorm_quantize",
    "safe_chain",
    "sigmoid",
    "silu",
    "softmax",
    "sqrt",
]

_NARROW = tuple(np.dtype(t) for t in (np.int8, np.uint8, np.int16, np.uint16, np.int32))
_COMPAT = ("ibert", "ivit")
_INT32 = np.iinfo(np.int32)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _where_it_is(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Call with the device of the first argument as the current one.

    The function sees a CuPy array there, and gives arrays of the argument's own library.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not _on_device(first):
            return function(*args, **kwargs)
        from .cuda import device_of, export_arrays, import_array

        array = import_array(first)
        if args:
            args = (array, *args[1:])
        else:
            kwargs[next(iter(kwargs))] = array
        with device_of(array):
            return export_arrays(function(*args, **kwargs), first)

    return cast("Callable[_P, _R]", call)


def _array(x: Any) -> Any:
    """Return a NumPy array, or a CuPy array of what lies on a device."""
    if not _on_device(x):
        return np.asarray(x)
    from .cuda import import_array

    return import_array(x)


def _on_host(a: Any) -> bool:
    return isinstance(a, np.ndarray)


def _space(a: Any) -> Any:
    """Return NumPy or CuPy."""
    return np if _on_host(a) else sys.modules["cupy"]


def _engine(a: Any) -> Any:
    """Return what has the loops: the core, or the kernels of a device."""
    if _on_host(a):
        return _core
    from . import cuda

    return cuda


def _together(**arrays: Any) -> None:
    """Check that arrays lie on the host, or on one device."""
    places = [None if _on_host(a) else int(a.device.id) for a in arrays.values()]
    if len(set(places)) < 2:
        return
    names = " and ".join(arrays)
    if None in places:
        raise TypeError(f"{names} must lie on one device, not some on the host")
    raise ValueError(f"{names} must lie on one device, not on {sorted(map(str, places))}")


def _codes(q: Any, name: str = "q") -> NDArray[Any]:
    """Return integers of at most 32 bits, C-contiguous."""
    a: NDArray[Any] = _array(q)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {a.dtype}")
    if a.dtype not in _NARROW:
        wide = a.astype(np.int32, copy=False)
        if a.size and not (_INT32.min <= a.min() and a.max() <= _INT32.max):
            raise ValueError(f"{name} has values beyond int32: [{a.min()}, {a.max()}]")
        a = wide
    contiguous: NDArray[Any] = _space(a).ascontiguousarray(a).reshape(a.shape)
    return contiguous


def _narrow(dtype: DTypeLike) -> np.dtype[Any]:
    dt = np.dtype(dtype)
    if dt not in _NARROW:
        names = ", ".join(str(t) for t in _NARROW)
        raise TypeError(f"dtype={dt} is not a result type: expected one of {names}")
    return dt


def _check_compat(compat: str | None) -> None:
    if compat is not None and compat not in _COMPAT:
        raise ValueError(f"unknown compat {compat!r}: expected one of {', '.join(_COMPAT)}")


def _fraction(dtype: np.dtype[Any]) -> float:
    """Return the scale that gives a fraction all the bits of its type."""
    return math.ldexp(1.0, -(8 * dtype.itemsize - (dtype.kind == "i")))


def _last(a: NDArray[Any], axis: SupportsIndex) -> tuple[NDArray[Any], int]:
    """Return the array with an axis moved to the end, and that axis."""
    ax = operator.index(axis)
    if not -a.ndim <= ax < a.ndim:
        raise np.exceptions.AxisError(ax, a.ndim)
    xp = _space(a)
    last: NDArray[Any] = xp.ascontiguousarray(xp.moveaxis(a, ax, -1))
    return last, ax


def _float_vector(name: str, v: ArrayLike, length: int) -> NDArray[np.float32]:
    a = np.ascontiguousarray(_import(v), np.float32)
    if a.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {a.shape}")
    return a


def dyadic(scale: float) -> tuple[int, int]:
    """Encode a positive scale as ``multiplier * 2**-31 * 2**-shift``.

    Parameters
    ----------
    scale : float
        At least ``2**-32``, below ``2**31``.

    Returns
    -------
    multiplier, shift : int
        The multiplier in ``[2**30, 2**31)``, rounded half up; a positive shift goes to the right.

    Raises
    ------
    ValueError
        If the scale is not positive and finite, or out of range.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.dyadic(0.75)
    (1610612736, 0)
    """
    return _core.ops_dyadic(float(scale))


@_where_it_is
def requantize(
    acc: ArrayLike,
    *,
    multiplier: ArrayLike,
    shift: ArrayLike,
    zero: SupportsIndex = 0,
    rounding: str = "single",
    dtype: DTypeLike = np.int8,
    axis: SupportsIndex = -1,
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Rescale integer sums: ``zero + acc * multiplier * 2**-31 * 2**-shift``, saturated.

    Parameters
    ----------
    acc : array_like of int
        Sums that fit int32.
    multiplier, shift : int or array_like of int
        As :func:`dyadic` returns them, one for all or one per channel. Multipliers are int32,
        shifts lie in -31..31.
    zero : int, default 0
        Zero point of the result.
    rounding : {"single", "gemmlowp", "float"}
        One rounding, halves up; two roundings as gemmlowp defines them; or float32 arithmetic with
        halves to even.
    dtype : dtype, default int8
        int8, uint8, int16, uint16 or int32.
    axis : int, default -1
        The axis of channels.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    ndarray
        In the shape of `acc`.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.requantize([91581], multiplier=2012766816, shift=3, dtype="int16")
    array([10729], dtype=int16)
    """
    if rounding not in ("single", "gemmlowp", "float"):
        raise ValueError(f"unknown rounding {rounding!r}: expected single, gemmlowp or float")
    x, dt = _codes(acc, "acc"), _narrow(dtype)
    m, s = _import(multiplier), _import(shift)
    if m.dtype.kind not in "iu" or s.dtype.kind not in "iu":
        raise TypeError(f"multiplier and shift must be integers, got {m.dtype} and {s.dtype}")
    if m.ndim > 1 or s.ndim > 1:
        raise ValueError(f"one multiplier per channel, got shapes {m.shape} and {s.shape}")
    z = operator.index(zero)
    for name, v in (("multiplier", m), ("zero", np.asarray(z)), ("shift", s)):
        if v.size and not (_INT32.min <= v.min() and v.max() <= _INT32.max):
            raise ValueError(f"{name} is beyond int32")
    inner = 1
    if m.ndim or s.ndim:
        ax = operator.index(axis)
        if not -x.ndim <= ax < x.ndim:
            raise np.exceptions.AxisError(ax, x.ndim)
        channels = x.shape[ax]
        try:
            wide = np.broadcast_to(m, (channels,)), np.broadcast_to(s, (channels,))
        except ValueError:
            raise ValueError(
                f"axis {ax} of acc has {channels} channels, but multiplier and shift have shapes "
                f"{m.shape} and {s.shape}"
            ) from None
        m, s = wide
        inner = math.prod(x.shape[ax % x.ndim + 1 :])
    y: NDArray[Any] = _space(x).empty(x.shape, dt)
    ms, ss = np.ravel(m).tolist(), np.ravel(s).tolist()
    if x.size:
        count = _threads.resolve(threads)
        _engine(x).ops_requantize(x.ravel(), y.ravel(), ms, ss, inner, z, rounding, count, None)
    return y


@_where_it_is
def add(
    a: ArrayLike,
    a_scale: float,
    b: ArrayLike,
    b_scale: float,
    *,
    out_scale: float,
    rounding: str = "once",
    dtype: DTypeLike = np.int32,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """Add two integer tensors: the residual connection.

    Parameters
    ----------
    a, b : array_like of int
        Codes of the same shape, or shapes that broadcast.
    a_scale, b_scale, out_scale : float
        Their scales and that of the result.
    rounding : {"once", "each"}
        Round the sum, or both terms before it, as HAWQ does.
    dtype : dtype, default int32
        Of the result, which saturates.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float
        `out_scale`.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.add([10, 20], 0.5, [4, -4], 0.25, out_scale=1.0)
    (array([6, 9], dtype=int32), 1.0)
    """
    if rounding not in ("once", "each"):
        raise ValueError(f"unknown rounding {rounding!r}: expected once or each")
    x, y = _codes(a, "a"), _codes(b, "b")
    _together(a=x, b=y)
    xp = _space(x)
    if x.shape != y.shape:
        x, y = (xp.ascontiguousarray(v) for v in xp.broadcast_arrays(x, y))
    out = xp.empty(x.shape, _narrow(dtype))
    scales = float(a_scale), float(b_scale), float(out_scale)
    count = _threads.resolve(threads)
    each = rounding == "each"
    _engine(x).ops_add(
        x.ravel(), scales[0], y.ravel(), scales[1], scales[2], each, out.ravel(), count, None
    )
    return out, scales[2]


def _apply(
    function: str,
    q: ArrayLike,
    scale: float,
    out_scale: float,
    dtype: np.dtype[Any],
    threads: SupportsIndex | None,
) -> tuple[NDArray[Any], float]:
    x = _codes(q)
    y = _space(x).empty(x.shape, dtype)
    count = _threads.resolve(threads)
    _engine(x).ops_apply(function, x.ravel(), float(scale), out_scale, y.ravel(), count, None)
    return y, out_scale


def _published(
    function: str,
    compat: str,
    x: NDArray[Any],
    cols: int,
    scale: float,
    bias: NDArray[np.int64] | None,
    threads: SupportsIndex | None,
) -> NDArray[np.int64]:
    y: NDArray[np.int64] = _space(x).empty(x.shape, np.int64)
    count = _threads.resolve(threads)
    numbers = x.ravel(), cols, float(scale), bias, y.ravel(), count
    _engine(x).ops_compat(function, compat, *numbers)
    return y


@_where_it_is
def exp(
    q: ArrayLike,
    scale: float,
    *,
    dtype: DTypeLike = np.int32,
    compat: str | None = None,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """Exponential of numbers of at most 0.

    Parameters
    ----------
    q : array_like of int
        Codes of at most 0.
    scale : float
        Their scale.
    dtype : dtype, default int32
        Of the result: a fraction with all its bits, 30 for int32.
    compat : {"ibert", "ivit"}, optional
        The published operator, in int64.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float
        ``2**-30`` for int32.

    Examples
    --------
    >>> import nibblas as nb
    >>> codes, scale = nb.intops.exp([0, -100], 0.01)
    >>> (codes * scale).round(5).tolist()
    [1.0, 0.36788]
    """
    _check_compat(compat)
    x = _codes(q)
    if x.size and x.max() > 0:
        raise ValueError(f"exp is defined for codes of at most 0, got {x.max()}")
    if compat is None:
        dt = _narrow(dtype)
        return _apply("exp", x, scale, max(_fraction(dt), 2.0**-30), dt, threads)
    s = float(scale)
    y = _published("exp", compat, x, 1, s, None, threads)
    return y, 0.35815147 * s * s * 2.0**-30 if compat == "ibert" else s * 2.0**-15


@_where_it_is
def sigmoid(
    q: ArrayLike,
    scale: float,
    *,
    dtype: DTypeLike = np.uint8,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """Logistic function.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale.
    dtype : dtype, default uint8
        Of the result: a fraction with all its bits, 30 for int32.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.sigmoid([-300, 0, 300], 0.01)
    (array([ 12, 128, 244], dtype=uint8), 0.00390625)
    """
    dt = _narrow(dtype)
    return _apply("sigmoid", q, scale, max(_fraction(dt), 2.0**-30), dt, threads)


@_where_it_is
def gelu(
    q: ArrayLike,
    scale: float,
    *,
    out_scale: float | None = None,
    dtype: DTypeLike = np.int32,
    compat: str | None = None,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """``x * Phi(x)``, within 7e-6 (3e-4 for 8 bits) and the rounding of the result.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale.
    out_scale : float, optional
        That of the result; `scale` by default.
    dtype : dtype, default int32
        Of the result, which saturates.
    compat : {"ibert", "ivit"}, optional
        The published operator, in int64. I-ViT's takes the maximum of the last axis.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float
        Negative for ``compat="ibert"``, as published.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.gelu([-100, 100, 1000], 0.01)
    (array([ -16,   84, 1000], dtype=int32), 0.01)
    """
    _check_compat(compat)
    s = float(scale)
    if compat is None:
        return _apply(
            "gelu", q, s, s if out_scale is None else float(out_scale), _narrow(dtype), threads
        )
    x = _codes(q)
    y = _published("gelu", compat, x, x.shape[-1] if x.ndim else 1, s, None, threads)
    t = s / 1.4142
    erf_scale = -0.2888 * (t * t) * 2.0**14
    return y, s * erf_scale / 2 if compat == "ibert" else s * 2.0**-7


@_where_it_is
def silu(
    q: ArrayLike,
    scale: float,
    *,
    out_scale: float | None = None,
    dtype: DTypeLike = np.int32,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """``x / (1 + exp(-x))``, within 6e-6 and the rounding of the result.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale.
    out_scale : float, optional
        That of the result; `scale` by default.
    dtype : dtype, default int32
        Of the result, which saturates.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.silu([-100, 100, 1000], 0.01)
    (array([ -27,   73, 1000], dtype=int32), 0.01)
    """
    s = float(scale)
    out = s if out_scale is None else float(out_scale)
    return _apply("silu", q, s, out, _narrow(dtype), threads)


@_where_it_is
def softmax(
    q: ArrayLike,
    scale: float,
    *,
    axis: SupportsIndex = -1,
    where: ArrayLike | None = None,
    dtype: DTypeLike = np.uint8,
    compat: str | None = None,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """Softmax.

    Parameters
    ----------
    q : array_like of int
        Codes. The lowest int32 stands for minus infinity.
    scale : float
        Their scale.
    axis : int, default -1
        Along which probabilities add up to 1.
    where : array_like of bool, optional
        False where a value is left out and gets 0; broadcasts to `q`.
    dtype : dtype, default uint8
        Of the result: a fraction with all its bits, at most the type's highest value (a row with
        one hot value gives 255 of 256).
    compat : {"ibert", "ivit"}, optional
        The published operator, in int64: scale ``2**-8`` or ``2**-7``.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.softmax([0, 0, -1000, 100], 0.01)
    (array([ 54,  54,   0, 147], dtype=uint8), 0.00390625)
    """
    _check_compat(compat)
    x = _codes(q)
    s = float(scale)
    if where is not None:
        if compat is not None:
            raise ValueError("the published operators have no mask")
        keep = _array(where) if _on_host(x) else _space(x).asarray(where)
        if keep.dtype != np.bool_:
            raise TypeError(f"where must hold bools, got {keep.dtype}")
        if np.broadcast_shapes(keep.shape, x.shape) != x.shape:
            raise ValueError(f"where of shape {keep.shape} does not broadcast to {x.shape}")
        x = _space(x).where(keep, x, np.int32(_INT32.min)).astype(np.int32, copy=False)
    x, ax = _last(x, axis)
    xp, cols = _space(x), x.shape[-1]
    if compat is not None:
        if compat == "ibert" and s > 0 and 1.0 / 0.35815147 / (s * s) < 1:
            raise ValueError(f"scale {s:g} is too coarse: I-BERT's exponential is 0 everywhere")
        y = _published("softmax", compat, x, cols, s, None, threads)
        return xp.moveaxis(y, -1, ax), 2.0**-8 if compat == "ibert" else 2.0**-7
    dt = _narrow(dtype)
    out = xp.empty(x.shape, dt)
    _engine(x).ops_softmax(x.ravel(), out.ravel(), cols, s, _threads.resolve(threads), None)
    return xp.moveaxis(out, -1, ax), _fraction(dt)


@_where_it_is
def layernorm(
    q: ArrayLike,
    scale: float,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    eps: float = 0.0,
    out_scale: float | None = None,
    dtype: DTypeLike = np.int8,
    compat: str | None = None,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], Any]:
    """Layer norm over the last axis. A constant row gives the bias.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale; it matters where `eps` is not 0.
    weight, bias : array_like
        One float for each value of the last axis.
    eps : float, default 0
        Added to the variance.
    out_scale : float
        Scale of the result. Not for `compat`, whose operators choose it.
    dtype : dtype, default int8
        Of the result, which saturates.
    compat : {"ibert", "ivit"}, optional
        The published operator, in int64, with a scale for each value of the last axis. Neither
        knows `eps`, and weights of 0 have no published form.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float or ndarray
    """
    _check_compat(compat)
    x = _codes(q)
    if x.ndim == 0:
        raise ValueError("layernorm needs at least one dimension")
    cols = x.shape[-1]
    w = _float_vector("weight", weight, cols)
    b = None if bias is None else _float_vector("bias", bias, cols)
    if compat is not None:
        if not (np.isfinite(w).all() and (w != 0).all()):
            raise ValueError("the published layer norms divide by the weight: 0 has no result")
        unit = math.sqrt(cols) * 2.0**-30
        shift = np.zeros(cols) if b is None else np.floor(b.astype(np.float64) / w / unit)
        if not (np.abs(shift) < 2.0**62).all():
            raise ValueError("bias over weight leaves 62 bits")
        y = _published("layernorm", compat, x, cols, scale, shift.astype(np.int64), threads)
        return y, unit * w.astype(np.float64)
    return _norm(True, x, scale, w, b, eps, out_scale, dtype, threads)


@_where_it_is
def rmsnorm(
    q: ArrayLike,
    scale: float,
    weight: ArrayLike,
    *,
    eps: float = 0.0,
    out_scale: float,
    dtype: DTypeLike = np.int8,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[Any], float]:
    """RMS norm over the last axis. A row of zeros gives zeros.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale; it matters where `eps` is not 0.
    weight : array_like
        One float for each value of the last axis.
    eps : float, default 0
        Added to the mean square.
    out_scale : float
        Scale of the result.
    dtype : dtype, default int8
        Of the result, which saturates.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray
    scale : float
    """
    x = _codes(q)
    if x.ndim == 0:
        raise ValueError("rmsnorm needs at least one dimension")
    w = _float_vector("weight", weight, x.shape[-1])
    return _norm(False, x, scale, w, None, eps, out_scale, dtype, threads)


def _norm(
    centre: bool,
    x: NDArray[Any],
    scale: float,
    w: NDArray[np.float32],
    b: NDArray[np.float32] | None,
    eps: float,
    out_scale: float | None,
    dtype: DTypeLike,
    threads: SupportsIndex | None,
) -> tuple[NDArray[Any], float]:
    if out_scale is None:
        raise TypeError("out_scale is missing: the scale of the result")
    out = float(out_scale)
    y = _space(x).empty(x.shape, _narrow(dtype))
    count = _threads.resolve(threads)
    numbers = centre, float(scale), w, b, float(eps), out, count, None
    _engine(x).ops_norm(x.ravel(), y.ravel(), *numbers)
    return y, out


@_where_it_is
def rmsnorm_quantize(
    q: ArrayLike,
    scale: float,
    weight: ArrayLike,
    *,
    eps: float = 0.0,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """RMS norm whose rows become int8 with a scale each, in one pass.

    Parameters
    ----------
    q : array_like of int
        Codes.
    scale : float
        Their scale; it matters where `eps` is not 0.
    weight : array_like
        One float for each value of the last axis.
    eps : float, default 0
        Added to the mean square.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    codes : ndarray of int8
        127 times value over the row's largest magnitude; 0 for rows of zeros.
    scales : ndarray of float64
        One for each row, with a last axis of length 1: 31 significant bits times a power of two.
    """
    x = _codes(q)
    if x.ndim == 0:
        raise ValueError("rmsnorm_quantize needs at least one dimension")
    w = _float_vector("weight", weight, x.shape[-1])
    xp = _space(x)
    y = xp.empty(x.shape, np.int8)
    pairs = xp.zeros((*x.shape[:-1], 2), np.int32)
    count = _threads.resolve(threads)
    numbers = float(scale), w, float(eps), count, None
    _engine(x).ops_norm_codes(x.ravel(), y.ravel(), pairs.ravel(), *numbers)
    return y, xp.ldexp(pairs[..., :1].astype(np.float64), -31 - pairs[..., 1:])


@_where_it_is
def sqrt(
    v: ArrayLike, *, compat: str | None = None, threads: SupportsIndex | None = None
) -> NDArray[Any]:
    """Return the floor of the square root, exact for every non-negative integer.

    Parameters
    ----------
    v : array_like of int
        Any integer type, uint64 included.
    compat : {"ivit"}, optional
        I-ViT's ten halvings from 65536: wrong below some 34,000.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray
        In the type of `v`.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.intops.sqrt(np.array([0, 99, 100, 2**64 - 1], np.uint64))
    array([         0,          9,         10, 4294967295], dtype=uint64)
    """
    if compat not in (None, "ivit"):
        raise ValueError(f"unknown compat {compat!r}: expected ivit")
    a = _array(v)
    xp = _space(a)
    if a.dtype.kind not in "iu":
        raise TypeError(f"v must hold integers, got {a.dtype}")
    if a.dtype.kind == "i" and a.size and a.min() < 0:
        raise ValueError(f"negative numbers have no integer square root, got {a.min()}")
    wide = a.dtype.itemsize == 8 or compat is not None
    # The core reads the bits as unsigned.
    bits = xp.ascontiguousarray(a, np.uint64 if wide else np.uint32)
    bits = bits.view(np.int64 if wide else np.int32).reshape(a.shape)
    y = xp.empty_like(bits)
    count = _threads.resolve(threads)
    _engine(a).ops_sqrt(bits.ravel(), y.ravel(), compat is not None, count, None)
    roots: NDArray[Any] = y.astype(a.dtype)
    return roots


def safe_chain(a: SupportsIndex, b: SupportsIndex, *, bits: SupportsIndex = 32) -> int:
    """Return how many products of two magnitudes a signed accumulator holds, whatever their signs.

    Parameters
    ----------
    a, b : int
        The largest magnitudes of both operands: 127 for symmetric int8, 128 with -128.
    bits : int, default 32
        Of the accumulator.

    Returns
    -------
    int
        ``(2**(bits - 1) - 1) // (a * b)``.

    Raises
    ------
    ValueError
        If a magnitude is below 1, or `bits` outside 2..64.

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.safe_chain(127, 127), nb.intops.safe_chain(32767, 32767)
    (133144, 2)
    """
    x, y, width = operator.index(a), operator.index(b), operator.index(bits)
    if x < 1 or y < 1:
        raise ValueError(f"magnitudes must be at least 1, got {x} and {y}")
    if not 2 <= width <= 64:
        raise ValueError(f"bits must lie in 2..64, got {width}")
    return ((1 << (width - 1)) - 1) // (x * y)


@_where_it_is
def matmul(
    a: ArrayLike,
    b: ArrayLike | QTensor,
    *,
    a_zero: SupportsIndex = 0,
    b_zero: SupportsIndex = 0,
    bias: ArrayLike | None = None,
    dtype: DTypeLike = np.int32,
    threads: SupportsIndex | None = None,
) -> NDArray[Any]:
    """Multiply integer matrices exactly: ``(a - a_zero) @ (b - b_zero) + bias``.

    Parameters
    ----------
    a : array_like
        int8 or uint8, ``(..., M, K)``.
    b : array_like or QTensor
        int8 or uint8, ``(..., K, N)``; or ``qw.T`` of weights with integer codes and one scale per
        row, which is left out (zero points of the tensor's own are subtracted).
    a_zero, b_zero : int, default 0
        Zero points, within the operands' types.
    bias : array_like of int, optional
        One value per column.
    dtype : dtype, default int32
        int32 or int64.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray

    Raises
    ------
    ValueError
        If int32 could overflow, judging by the ranges of the types and the largest bias.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> a, b = np.array([[3, 255]], np.uint8), np.array([[1], [-128]], np.int8)
    >>> nb.intops.matmul(a, b, a_zero=3, bias=[7])
    array([[-32249]], dtype=int32)
    """
    result = np.dtype(dtype)
    if result not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise TypeError(f"sums have dtype int32 or int64, got {result}")
    x = _bytes("a", a)
    za = _zero("a_zero", a_zero, x)
    if x.ndim == 0:
        raise ValueError("a needs at least one dimension")
    extra = np.zeros(1, np.int64) if bias is None else _import(bias)
    if extra.dtype.kind not in "iu":
        raise TypeError(f"bias must hold integers, got {extra.dtype}")
    quantised = isinstance(b, QTensor)
    sums: NDArray[Any]
    if isinstance(b, QTensor):
        if operator.index(b_zero) != 0:
            raise ValueError("b_zero belongs to arrays: a QTensor has zero points of its own")
        zb = 0
        shape: tuple[int, ...] = b.shape
        element = b.format.element
        high = max(abs(element.minimum), abs(element.maximum))
    else:
        y = _bytes("b", b)
        _together(a=x, b=y)
        zb, shape = _zero("b_zero", b_zero, y), y.shape
        high = _reach(y.dtype, zb)
    if len(shape) < 2 or x.shape[-1] != shape[-2]:
        raise ValueError(f"shapes {x.shape} and {shape} do not fit")
    k, n = shape[-2:]
    if extra.size and extra.shape not in ((1,), (n,)):
        raise ValueError(f"bias must have shape ({n},), got {extra.shape}")
    bound = k * _reach(x.dtype, za) * high + int(np.abs(extra.astype(object)).max(initial=0))
    if bound >= 2**31 and result == np.int32:
        raise ValueError(f"sums of {k} products may reach {bound}, past int32: use dtype=np.int64")
    if not _on_host(x):
        right = b if quantised else y
        device_sums: NDArray[Any] = _engine(x).int_product(x, za, right, zb, extra, result)
        return device_sums
    if k == 0 and len(shape) == 2:
        sums = np.zeros((*x.shape[:-1], n), result)
    elif quantised or len(shape) == 2:
        weights = b if isinstance(b, QTensor) else _tensor(y.T, zb).T
        lead = x.shape[:-1]
        left = _tensor(x.reshape(math.prod(lead), k), za)
        sums = _matmul(left, weights, dtype=result, threads=threads).reshape(*lead, n)
    else:
        # Stacks of small products: NumPy's loop for integers.
        sums = np.matmul(x.astype(result) - result.type(za), y.astype(result) - result.type(zb))
    if bias is not None:
        sums += extra.astype(result)
    return sums


def _bytes(name: str, a: Any) -> NDArray[Any]:
    x: NDArray[Any] = _array(a)
    if x.dtype not in (np.dtype(np.int8), np.dtype(np.uint8)):
        raise TypeError(f"{name} must be int8 or uint8, got {x.dtype}")
    return x


def _zero(name: str, zero: SupportsIndex, a: NDArray[Any]) -> int:
    z = operator.index(zero)
    info = np.iinfo(a.dtype)
    if not info.min <= z <= info.max:
        raise ValueError(f"{name} must lie in [{info.min}, {info.max}], got {z}")
    return z


def _reach(dtype: np.dtype[Any], zero: int) -> int:
    info = np.iinfo(dtype)
    return max(info.max - zero, zero - info.min)


def _tensor(x: NDArray[Any], zero: int) -> QTensor:
    """Return bytes as a tensor with scale 1."""
    ones = np.ones(len(x), np.float32)
    if zero == 0 and x.dtype == np.int8:
        return QTensor.from_parts("int8", x, ones)
    if x.dtype == np.int8:
        # One number up, codes and zero point alike.
        x, zero = x.view(np.uint8) ^ np.uint8(128), zero + 128
    return QTensor.from_parts("uint8", x, ones, np.full((len(x), 1), zero))


@_where_it_is
def bitlinear(
    q: ArrayLike,
    scale: float,
    norm: ArrayLike,
    weight: QTensor,
    *,
    eps: float = 0.0,
    threads: SupportsIndex | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """RMS norm, int8 codes for each row, a product with ternary weights (BitNet, MatMul-free LM).

    Parameters
    ----------
    q : array_like of int
        Codes ``(..., K)``.
    scale : float
        Their scale; it matters where `eps` is not 0.
    norm : array_like
        Weight of the norm, ``(K,)``.
    weight : QTensor
        ``(N, K)``: ternary, or other integer codes with one scale per row.
    eps : float, default 0
        Added to the mean square.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    sums : ndarray of int32
        ``(..., N)``: additions and subtractions of codes, before any scale.
    scales : ndarray of float64
        What a sum is worth, ``(..., N)``.
    """
    codes, rows = rmsnorm_quantize(q, scale, norm, eps=eps, threads=threads)
    sums = matmul(codes, weight.T, threads=threads)
    # Empty rows have no scale, and their sums are 0.
    steps = weight.scales[:, 0] if weight.shape[1] else np.ones(len(weight), np.float32)
    return sums, rows * _space(rows).asarray(steps.astype(np.float64))


_BASES = {"2": 1, "sqrt2": 2}


def _base(base: str, bits: SupportsIndex) -> tuple[int, int]:
    """Return steps per octave, and the number of codes."""
    if base not in _BASES:
        raise ValueError(f"unknown base {base!r}: expected 2 or sqrt2")
    b = operator.index(bits)
    if not 1 <= b <= 6:
        raise ValueError(f"bits must lie in 1..6, got {b}")
    return _BASES[base], 1 << b


@_where_it_is
def log2_softmax(
    q: ArrayLike,
    scale: float,
    *,
    top: float = 1.0,
    bits: SupportsIndex = 4,
    base: str = "sqrt2",
    where: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
) -> NDArray[np.uint8]:
    """Softmax coded by its logarithm (RepQ-ViT): ``round(-log_base(p / top))``.

    Parameters
    ----------
    q, scale, where
        As for :func:`softmax`.
    top : float, default 1
        The probability of code 0; larger ones have it too.
    bits : int, default 4
        Codes are below ``2**bits``; what is smaller still gets ``2**bits``: it stands for 0.
    base : {"sqrt2", "2"}
        What a step divides by.
    threads : int, optional
        At most this many threads.

    Returns
    -------
    ndarray of uint8

    Examples
    --------
    >>> import nibblas as nb
    >>> nb.intops.log2_softmax([0, -70, -140, -5000], 0.01)
    array([ 2,  4,  6, 16], dtype=uint8)
    """
    steps, count = _base(base, bits)
    if not (math.isfinite(top) and 0 < top <= 1):
        raise ValueError(f"top must lie in (0, 1], got {top}")
    p, unit = softmax(q, scale, where=where, dtype=np.int32, threads=threads)
    # A code is the number of borders above p: comparisons of integers.
    borders = [math.floor(top / unit * 2.0 ** (-(i + 0.5) / steps)) for i in range(count)]
    xp = _space(p)
    ascending = xp.asarray(np.array(borders[::-1], np.int64))
    codes: NDArray[np.uint8] = (count - xp.searchsorted(ascending, p, "left")).astype(np.uint8)
    return codes


@_where_it_is
def log2_matmul(
    codes: ArrayLike,
    v: ArrayLike,
    scale: float,
    *,
    top: float = 1.0,
    bits: SupportsIndex = 4,
    base: str = "sqrt2",
) -> tuple[NDArray[np.int64], float]:
    """Multiply coded probabilities with values: a shift and an addition for each.

    For base sqrt2 the codes of odd steps are summed apart, and their sum is multiplied by sqrt(2)
    once per output, in integers: the scale reparametrisation of RepQ-ViT.

    Parameters
    ----------
    codes : array_like of int
        ``(..., M, K)``, see :func:`log2_softmax`.
    v : array_like of int
        ``(..., K, N)``, at most 32 bits.
    scale : float
        That of `v`.
    top, bits, base
        As for :func:`log2_softmax`.

    Returns
    -------
    sums : ndarray of int64
        ``(..., M, N)``, with the fraction bits of the longest shift.
    scale : float
    """
    steps, count = _base(base, bits)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    c, narrow = _codes(codes, "codes"), _codes(v, "v")
    _together(codes=c, v=narrow)
    values = narrow.astype(np.int64)
    if c.size and not (c.min() >= 0 and c.max() <= count):
        raise ValueError(f"codes lie in [0, {count}], got [{c.min()}, {c.max()}]")
    if c.ndim < 2 or values.ndim < 2 or c.shape[-1] != values.shape[-2]:
        raise ValueError(f"shapes {c.shape} and {values.shape} do not fit")
    shift = -(-c.astype(np.int64) // steps)
    most = -(-(count - 1) // steps)
    largest = int(abs(values).max()) if values.size else 0
    if c.shape[-1] * largest << most >= 2**62:
        raise ValueError("the sums may leave 62 bits: use fewer bits, or narrower values")
    if not _on_host(c):
        shifted: NDArray[np.int64] = _engine(c).int_shifts(c, narrow, steps, count, most)
        return shifted, float(scale) * top * 2.0**-most
    # 2^(most - shift): a product with it is a shift to the left.
    one = np.where(c < count, np.int64(1) << np.minimum(most - shift, most).clip(0), np.int64(0))
    odd = (c % steps) != 0
    sums = np.matmul(np.where(odd, 0, one), values)
    if steps == 2:
        half = np.matmul(np.where(odd, one, 0), values)
        # sqrt(2) in Q30; high and low parts, so that 62 bits are enough.
        root = 1518500250
        sums = sums + (half >> 30) * root + (((half & (2**30 - 1)) * root) >> 30)
    return sums, float(scale) * top * 2.0**-most


def fold_channel_scales(
    norm_weight: ArrayLike,
    norm_bias: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike,
    scales: ArrayLike,
    zeros: ArrayLike | None = None,
) -> tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float, float
]:
    """Move scales of channels from a norm's output into the product that follows (RepQ-ViT).

    Afterwards one scale and one zero point serve all channels; the network computes the same.

    Parameters
    ----------
    norm_weight, norm_bias : array_like
        Of the norm, ``(K,)``.
    weight, bias : array_like
        Of the linear product, ``(N, K)`` and ``(N,)``.
    scales, zeros : array_like
        Quantisation of the norm's output for each channel, ``(K,)``; zeros are 0 by default. Scales
        of 0 count as the smallest positive one.

    Returns
    -------
    norm_weight, norm_bias, weight, bias : ndarray
        With the scales folded in.
    scale, zero : float
        The common ones: the means.
    """
    g, b = (np.asarray(v, np.float64) for v in (norm_weight, norm_bias))
    w, c = (np.asarray(v, np.float64) for v in (weight, bias))
    s = np.asarray(scales, np.float64)
    z = np.zeros_like(s) if zeros is None else np.asarray(zeros, np.float64)
    k = len(s) if s.ndim == 1 else -1
    if any(v.shape != (k,) for v in (g, b, z)) or w.shape[1:] != (k,) or c.shape != w.shape[:1]:
        raise ValueError(
            f"norm {g.shape}, {b.shape}, linear {w.shape}, {c.shape}, scales {s.shape} do not fit"
        )
    if not all(np.isfinite(v).all() for v in (g, b, w, c)):
        raise ValueError("norm and linear must be finite")
    if not (np.isfinite(s).all() and (s >= 0).all() and np.isfinite(z).all()) or not (s > 0).any():
        raise ValueError("scales must be finite and not negative, one of them positive")
    s = np.where(s > 0, s, s[s > 0].min())
    scale, zero = float(s.mean()), float(z.mean())
    r = s / scale
    # Where channel c stood at (q - z) s, it now stands at (q - zero) scale.
    shift = -z * s / r + zero * scale
    return g / r, b / r - shift, w * r, c + (w * r) @ shift, scale, zero
