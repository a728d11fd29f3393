"""Hadamard transforms: rotations that spread outliers over all channels."""

from __future__ import annotations

import functools
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
        Real numbers. The length of the axis is ``2**p * r``, with r a length for which a matrix is
        known by Paley's constructions, such as 1, 12, 20, 28, 36, 44, 60.
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


def _known(r: int) -> bool:
    return r == 1 or (_is_prime(r - 1) and r % 4 == 0) or (_is_prime(r // 2 - 1) and r % 8 == 4)


def _base(n: int) -> int:
    """Return the least r with a known matrix for which n/r is a power of two."""
    r = n // (n & -n)
    while not _known(r):
        r *= 2
        if n % r:
            raise ValueError(f"no Hadamard matrix of length {n} is known here")
    return r


@functools.cache
def _matrix(r: int) -> NDArray[np.int8]:
    """Return a matrix of +-1 with orthogonal rows (Paley, 1933)."""
    first = r % 4 == 0 and _is_prime(r - 1)
    q = r - 1 if first else r // 2 - 1
    residue = np.full(q, -1, np.int8)
    residue[np.arange(1, q) ** 2 % q] = 1
    residue[0] = 0
    core = np.zeros((q + 1, q + 1), np.int8)
    core[1:, 1:] = residue[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1
    unit = np.eye(q + 1, dtype=np.int8)
    if first:
        return core + unit
    plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return (np.kron(core, plus) + np.kron(unit, minus)).astype(np.int8)
