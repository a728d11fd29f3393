"""Pruning, and linear layers whose input changes little."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core, _threads
from ._api import _bias, _import, _operand, _raw
from .formats import Format
from .qtensor import QTensor

__all__ = ["DeltaLinear", "prune"]

_PATTERN = re.compile(
    r"unstructured|2:4|group([1-9][0-9]{0,8})|block([1-9][0-9]{0,8})x([1-9][0-9]{0,8})"
)


def prune(
    w: ArrayLike,
    pattern: str,
    density: float | None = None,
    score: str | ArrayLike = "magnitude",
    *,
    x: ArrayLike | None = None,
) -> NDArray[Any]:
    """Set the least important entries of a matrix to 0.

    Parameters
    ----------
    w : array_like
        Weights, shape (N, K).
    pattern : str
        ``"unstructured"``: single entries; ``"2:4"``: two of every four along K; ``"group<g>"``:
        runs of g along K; ``"block<r>x<c>"``: blocks of r rows and c columns. Units at the end of
        a row or column may be shorter.
    density : float
        The fraction of units that is kept, in (0, 1], at least one unit. Units compete within
        their row, so that rows keep equally many; blocks within the matrix. Of 2:4 it is 0.5 and
        may be left out; a last group of fewer than four keeps two.
    score : {"magnitude", "wanda"} or array_like, default "magnitude"
        What an entry is worth: its square; its square times that of its input's norm (Wanda); or
        an array in the shape of `w`, such as :func:`nibblas.quantizers.obs_scores` returns. A
        unit is worth the mean of its entries.
    x : array_like, optional
        Activations, shape (samples, K), for ``"wanda"``.

    Returns
    -------
    ndarray
        A copy of `w`, in its float type, with zeros.

    Raises
    ------
    ValueError
        If the density lies outside (0, 1], a number is not finite, or shapes do not fit.

    Notes
    -----
    Of units that are worth the same, those that come first are kept.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> nb.prune(np.array([[1.0, -4.0, 3.0, 2.0]]), "2:4")
    array([[ 0., -4.,  3.,  0.]])
    """
    a = _import(w)
    if a.dtype.kind in "iub":
        a = a.astype(np.float32)
    if a.dtype.kind not in "Vf" or (a.dtype.kind == "V" and a.dtype.name != "bfloat16"):
        raise TypeError(f"prune takes real numbers, got {a.dtype}")
    if a.ndim != 2:
        raise ValueError(f"prune takes a matrix: expected 2 dimensions, got shape {a.shape}")
    match = _PATTERN.fullmatch(pattern) if isinstance(pattern, str) else None
    if match is None:
        raise ValueError(
            f"unknown pattern {pattern!r}: expected unstructured, 2:4, group<g> or block<r>x<c>"
        )
    if density is None and pattern == "2:4":
        density = 0.5
    if density is None or not 0 < density <= 1:
        raise ValueError(f"density is the fraction kept, in (0, 1], got {density}")
    if pattern == "2:4" and density != 0.5:
        raise ValueError(f"2:4 keeps half of the entries: density is 0.5, got {density}")
    worth = _worth(a, score, x)
    n, k = a.shape
    if not a.size:
        return a.copy()
    if pattern == "2:4":
        padded = np.full((n, -(-k // 4) * 4), -1.0)
        padded[:, :k] = worth
        keep = _largest(padded.reshape(-1, 4), 2).reshape(n, -1)[:, :k]
    elif pattern == "unstructured":
        keep = _largest(worth, _count(density, k))
    else:
        r, c = (1, int(match[1])) if match[1] else (int(match[2]), int(match[3]))
        r, c = min(r, n), min(c, k)
        units = _means(worth, r, c)
        if match[1]:
            kept = _largest(units, _count(density, units.shape[1]))
        else:
            kept = _largest(units.reshape(1, -1), _count(density, units.size)).reshape(units.shape)
        keep = kept.repeat(r, 0)[:n].repeat(c, 1)[:, :k]
    out: NDArray[Any] = np.where(keep, a, a.dtype.type(0))
    return out


def pattern_of(fmt: Format) -> str:
    """Return the pattern whose zeros a sparse format stores."""
    structure = fmt.structure
    if structure is None:
        raise ValueError(f"{fmt} keeps every entry")
    names = {"bitmap": "unstructured", "2of4": "2:4"}
    return names.get(structure, structure.replace("bsr", "group"))


def _worth(w: NDArray[Any], score: str | ArrayLike, x: ArrayLike | None) -> NDArray[np.float64]:
    """Return what each entry is worth; checks that numbers are finite."""
    wide = w.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("the weights hold values that are not finite")
    if not isinstance(score, str):
        given = np.asarray(score, np.float64)
        if given.shape != w.shape:
            raise ValueError(f"score has shape {given.shape}, the weights {w.shape}")
        if not np.isfinite(given).all():
            raise ValueError("the scores hold values that are not finite")
        return given - min(float(given.min(initial=0)), 0.0)
    if score == "magnitude":
        return wide * wide
    if score != "wanda":
        raise ValueError(f"unknown score {score!r}: expected magnitude, wanda or an array")
    if x is None:
        raise ValueError("the score wanda needs activations: x=")
    acts = np.asarray(x, np.float64)
    if acts.ndim != 2 or acts.shape[1] != w.shape[1]:
        raise ValueError(f"x must have shape (samples, {w.shape[1]}), got {acts.shape}")
    if not np.isfinite(acts).all():
        raise ValueError("x holds values that are not finite")
    out: NDArray[np.float64] = wide * wide * (acts * acts).sum(0)
    return out


def _count(density: float, units: int) -> int:
    return max(1, math.floor(density * units + 0.5))


def _largest(worth: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Mark the `count` largest of each row; of equal ones the first."""
    if count >= worth.shape[1]:
        return np.ones(worth.shape, np.bool_)
    limit = np.partition(worth, -count, axis=1)[:, -count, None]
    above = worth > limit
    equal = worth == limit
    room = count - above.sum(1, keepdims=True)
    out: NDArray[np.bool_] = above | (equal & (equal.cumsum(1) <= room))
    return out


def _means(worth: NDArray[np.float64], r: int, c: int) -> NDArray[np.float64]:
    """Return the mean of each block; those at the ends may be smaller."""
    n, k = worth.shape
    starts = np.arange(0, n, r), np.arange(0, k, c)
    sums = np.add.reduceat(np.add.reduceat(worth, starts[0], axis=0), starts[1], axis=1)
    rows = np.diff(np.append(starts[0], n))
    cols = np.diff(np.append(starts[1], k))
    out: NDArray[np.float64] = sums / np.outer(rows, cols)
    return out


class DeltaLinear:
    """A linear layer that remembers its last input, and computes what changed.

    Called as ``layer(x)`` with `x` of shape (K,) or (M, K), always the same; gives float32.
    Activations are int8 codes: with ``threshold=0`` the result is that of ``nb.matmul(x, qw.T,
    compute="int8")`` bit for bit, and the time goes with the number of codes that changed.

    Parameters
    ----------
    qw : QTensor
        Weights (N, K) with integer codes of at most 8 bits and one scale per row.
    threshold : float, default 0
        A change of an input by at most this much (as codes times the scale) is ignored until it is
        larger. Compared with the last input that was not ignored, so ignored changes never add up:
        each output is within ``threshold * sum(abs(w))`` of its row of the exact one, and what the
        rounding of float32 adds.
    scale : float, optional
        The scale of the activations, fixed; int8 codes are ``rint(x / scale)``, at most 127 in
        magnitude. By default each input row has its own, as in :func:`nibblas.matmul`; when that
        changes, everything is computed anew.
    bias : array_like, optional
        One value per row of the weights, added last.

    Raises
    ------
    ValueError
        If the weights are grouped or have no integer codes; on a call, if the shape of `x` differs
        from that of the call before (see :meth:`reset`).

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> q = nb.quantize(np.eye(4, dtype=np.float32), "int8")
    >>> layer = nb.DeltaLinear(q, scale=0.5)
    >>> layer(np.array([1, 0, 2, 0], np.float32))
    array([1., 0., 2., 0.], dtype=float32)
    """

    __slots__ = ("_bias", "_state", "_weight", "changed", "scale", "threshold")

    def __init__(
        self,
        qw: QTensor,
        *,
        threshold: float = 0.0,
        scale: float | None = None,
        bias: ArrayLike | None = None,
    ) -> None:
        if not isinstance(qw, QTensor):
            raise TypeError(f"DeltaLinear takes a QTensor, got {type(qw).__name__}")
        if qw._transposed:
            raise ValueError("DeltaLinear takes the weights (N, K) themselves, not their transpose")
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold must be at least 0 and finite, got {threshold}")
        if scale is not None and not (math.isfinite(scale) and np.float32(scale) > 0):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if qw.format.groups(qw.shape[1]) > 1:
            raise ValueError(f"DeltaLinear needs one scale per row, but {qw.format} is grouped")
        self._weight = qw
        self.threshold = float(threshold)
        self.scale = None if scale is None else float(np.float32(scale))
        self._bias = _bias(bias, qw.shape[0])
        self._state: tuple[tuple[int, ...], _core.Delta] | None = None
        self.changed = 0
        """Columns of the weights that the last call visited."""
        qw._storage.columns(_threads.get_num_threads())

    @property
    def weight(self) -> QTensor:
        """The weights."""
        return self._weight

    def reset(self) -> None:
        """Forget the last input: the next one is computed in full, and may have another shape."""
        self._state = None

    def __repr__(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale}"
        return f"DeltaLinear({self._weight!r}, threshold={self.threshold}{scale})"

    def __call__(self, x: ArrayLike) -> NDArray[np.float32]:
        """Return ``x @ weight.T``, plus the bias.

        Parameters
        ----------
        x : array_like
            Shape (K,) or (M, K); an int8 array is taken as codes, whose scale is `scale` or 1.

        Returns
        -------
        ndarray
            float32, shape (N,) or (M, N).
        """
        a, _ = _operand(x, "int8")
        n, k = self._weight.shape
        if a.ndim not in (1, 2) or a.shape[-1] != k:
            raise ValueError(f"expected an input of shape ({k},) or (M, {k}), got {a.shape}")
        threads = _threads.get_num_threads()
        if self._state is None:
            rows = 1 if a.ndim == 1 else len(a)
            columns = self._weight._storage.columns(threads)
            self._state = a.shape, _core.Delta(columns, rows)
        shape, state = self._state
        if a.shape != shape:
            raise ValueError(
                f"the last input had shape {shape}, this one {a.shape}: call reset() in between"
            )
        y = np.empty((*a.shape[:-1], n), np.float32)
        args = _raw(a).reshape(-1, k), y.reshape(-1, n)
        self.changed = state.step(*args, self.scale, self.threshold, self._bias, threads)
        return y
