"""Hadamard transforms: rotations that spread outliers over all channels."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["hadamard"]


def hadamard(x: ArrayLike, axis: SupportsIndex = -1, *, inverse: bool = False) -> NDArray[Any]:
    """Multiply an axis by an orthonormal Hadamard matrix, all of whose entries are +-1/sqrt(n).

    Parameters
    ----------
    x : array_like
        Real numbers. The length of the axis is ``2**p * r``, with r 1 or a length for which a
        matrix is known by the constructions of Paley and Williamson: every multiple of 4 below 188,
        and more.
    axis : int, default -1
        The axis.
    inverse : bool, default False
        Multiply by the inverse (the transpose). Powers of two have a symmetric matrix, whose
        transform is its own inverse.

    Returns
    -------
    ndarray
        In the shape and float type of `x`; integers give float32. Sums are made in float32, in
        float64 for float64.

    Raises
    ------
    ValueError
        If no matrix of that length is known.

    Notes
    -----
    ``nb.hadamard(x) @ nb.hadamard(w).T`` is ``x @ w.T`` but for rounding: activations and weights
    may both be rotated before they are quantised.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.hadamard(np.array([1.0, 0, 0, 0]))
    array([0.5, 0.5, 0.5, 0.5])
    """
    a = np.asarray(x)
    small = a.dtype.kind == "V" and a.dtype.name == "bfloat16"
    if a.dtype.kind not in "fiub" and not small:
        raise TypeError(f"hadamard takes real numbers, got {a.dtype}")
    if a.ndim == 0:
        raise ValueError("hadamard needs at least one dimension")
    ax = operator.index(axis)
    if not -a.ndim <= ax < a.ndim:
        raise np.exceptions.AxisError(ax, a.ndim)
    result = a.dtype if small or a.dtype.kind == "f" else np.dtype(np.float32)
    wide: Any = np.float64 if a.dtype == np.float64 else np.float32
    y: NDArray[Any] = np.moveaxis(a, ax, -1).astype(wide)
    shape, n = y.shape, y.shape[-1]
    if n == 0:
        raise ValueError("hadamard of an axis of length 0")
    r = _base(n)
    # H_r (x) H_2^p: sums and differences for the last factor, a product for the first.
    h = 1
    while h < n // r:
        pairs = y.reshape(-1, 2, h)
        y = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
        h *= 2
    if r > 1:
        m = _matrix(r).astype(wide)
        y = np.matmul(m.T if inverse else m, y.reshape(-1, r, n // r))
    y = y.reshape(shape) * wide(1 / math.sqrt(n))
    with np.errstate(over="ignore"):
        out: NDArray[Any] = np.ascontiguousarray(np.moveaxis(y.astype(result), -1, ax))
    return out


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _is_prime_power(q: int) -> bool:
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    while q % p == 0 and q > p:
        q //= p
    return q == p and _is_prime(p)


#: Quadruples of symmetric circulant matrices of +-1 whose squares add up to 4m times one, by m:
#: bit ``j - 1`` is set where the entries ``j`` and ``m - j`` of a first row are +1, as its entry 0
#: is. Found by a search over sums of two and two.
_WILLIAMSON = {
    23: (0x0AC, 0x2CE, 0x1F2, 0x46F),
    29: (0x02B3, 0x0AE3, 0x19F4, 0x2E5B),
    39: (0x0325A, 0x5206E, 0x0CE1A, 0x223D1),
    43: (0x00B273, 0x182A4E, 0x19521B, 0x1E35D9),
}


def _paley(r: int) -> tuple[int, bool] | None:
    """Return the order of the field, and whether it is that of the first construction."""
    for test in (_is_prime, _is_prime_power):
        if r % 4 == 0 and test(r - 1):
            return r - 1, True
        if r % 8 == 4 and test(r // 2 - 1):
            return r // 2 - 1, False
    return None


def _known(r: int) -> bool:
    return r == 1 or _paley(r) is not None or (r % 4 == 0 and r // 4 in _WILLIAMSON)


def _base(n: int) -> int:
    """Return the least r with a known matrix for which n/r is a power of two."""
    r = n // (n & -n)
    while not _known(r):
        r *= 2
        if n % r:
            raise ValueError(f"no Hadamard matrix of length {n} is known here")
    return r


def _differences(q: int) -> NDArray[np.int8]:
    """Return for all pairs from a field of `q` whether they differ by a square: 1, 0 or -1.

    Elements are polynomials over the integers modulo a prime, their coefficients the digits of a
    number.
    """
    p = next(d for d in range(2, q + 1) if q % d == 0)
    k = round(math.log(q, p))
    place = p ** np.arange(k)
    # Powers of x modulo a polynomial of which x makes all elements: the even ones are squares.
    for tail in itertools.product(range(p), repeat=k):
        kind = np.zeros(q, np.int8)
        power, at = [1] + [0] * (k - 1), 1
        for i in range(q - 1):
            if kind[at]:
                break
            kind[at] = 1 - 2 * (i % 2)
            power = [(low + power[-1] * t) % p for low, t in zip([0, *power], tail, strict=False)]
            at = int(np.dot(power, place))
        if kind[0] == 0 and np.count_nonzero(kind) == q - 1:
            break
    digits = np.arange(q)[:, None] // place % p
    apart = sum((np.subtract.outer(d, d) % p) * f for d, f in zip(digits.T, place, strict=True))
    square: NDArray[np.int8] = kind[apart]
    return square


@functools.cache
def _matrix(r: int) -> NDArray[np.int8]:
    """Return a matrix of +-1 with orthogonal rows (Paley, 1933; Williamson, 1944)."""
    found = _paley(r)
    if found is None:
        return _williamson(r // 4)
    q, first = found
    core = np.zeros((q + 1, q + 1), np.int8)
    core[1:, 1:] = _differences(q)
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1
    unit = np.eye(q + 1, dtype=np.int8)
    if first:
        return core + unit
    plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return (np.kron(core, plus) + np.kron(unit, minus)).astype(np.int8)


def _williamson(m: int) -> NDArray[np.int8]:
    """Return a matrix of 4m rows, of four circulant ones."""
    j = np.arange(m)
    bit = np.minimum(j, m - j) - 1
    rows = [np.where((j == 0) | (word >> bit & 1 == 1), 1, -1) for word in _WILLIAMSON[m]]
    a, b, c, d = (row[(j - j[:, None]) % m].astype(np.int8) for row in rows)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
