"""Orders of channels that put large ones together, so that few blocks hold them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ChannelOrder", "HeadOrder", "cluster", "ksort"]


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """A permutation of channels, and which blocks of it deserve more bits."""

    index: NDArray[np.intp]
    """Channel that stands at each place."""
    tags: tuple[str, ...]
    """Per block of places, ``"int8"`` or ``"int4"``."""
    block: int
    """Channels of a block."""

    def apply(self, a: ArrayLike, axis: SupportsIndex = -1) -> NDArray[Any]:
        """Return `a` with its channels in the new order."""
        return np.take(np.asarray(a), self.index, operator.index(axis))

    def undo(self, a: ArrayLike, axis: SupportsIndex = -1) -> NDArray[Any]:
        """Return `a`, which is in the new order, in the old one."""
        return np.take(np.asarray(a), np.argsort(self.index), operator.index(axis))


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """A permutation of the channels of each key head, and what goes with it."""

    index: NDArray[np.intp]
    """Channel of the head that stands at each place, shape (key heads, channels of a head)."""
    rope: str | None
    """How rotary embedding pairs channels."""

    def keys(self, a: ArrayLike, axis: SupportsIndex = 0) -> NDArray[Any]:
        """Permute the rows of a key projection, its bias, keys, or weights of a norm of keys."""
        return self._apply(a, axis, 1)

    def queries(self, a: ArrayLike, axis: SupportsIndex = 0) -> NDArray[Any]:
        """Permute the rows of a query projection: its heads share key heads evenly."""
        x = np.asarray(a)
        heads, width = self.index.shape
        n = x.shape[operator.index(axis)]
        if n % (heads * width):
            raise ValueError(f"{n} query channels are not a multiple of {heads} heads of {width}")
        return self._apply(x, axis, n // (heads * width))

    def angles(self, a: ArrayLike) -> NDArray[Any]:
        """Permute a table of rotary angles, cosines or sines.

        Parameters
        ----------
        a : array_like
            One entry per pair on the last axis.

        Returns
        -------
        ndarray
            Shape (key heads, ...): each head has its own order.
        """
        half = self.index.shape[1] // 2
        if self.rope is None:
            raise ValueError(
                "these heads were sorted without rotary embedding: give rope= to ksort"
            )
        pairs = self.index[:, :half] if self.rope == "half" else self.index[:, ::2] // 2
        x = np.asarray(a)
        if x.shape[-1:] != (half,):
            raise ValueError(
                f"a table of angles has {half} entries on its last axis, got {x.shape}"
            )
        return np.stack([x[..., p] for p in pairs])

    def _apply(self, a: ArrayLike, axis: SupportsIndex, share: int) -> NDArray[Any]:
        heads, width = self.index.shape
        start = np.arange(heads * share)[:, None] * width
        order = (start + np.repeat(self.index, share, 0)).ravel()
        x, ax = np.asarray(a), operator.index(axis)
        if x.shape[ax] != order.size:
            raise ValueError(f"{x.shape[ax]} channels do not fit {heads * share} heads of {width}")
        out: NDArray[Any] = np.take(x, order, ax)
        return out


def ksort(
    w: ArrayLike, *, heads: SupportsIndex = 1, block: SupportsIndex = 32, rope: str | None = None
) -> HeadOrder:
    """Sort the channels of each key head by size, so that blocks hold channels that are alike.

    Outlier channels of keys are always the same ones. Where a block of channels shares an exponent,
    one of them spoils its neighbours; sorted by size they spoil one another.

    Parameters
    ----------
    w : array_like
        The key projection, (key heads * channels, K); or keys, transposed.
    heads : int, default 1
        Key heads.
    block : int, default 32
        Channels that share an exponent. Where the order does not lower the sum of the largest
        squares of the blocks, a head keeps the order that it has.
    rope : {None, "half", "interleaved"}, default None
        Rotary embedding turns pairs of channels: ``i`` and ``i + d/2``, or ``2i`` and ``2i + 1``.
        Pairs then stay pairs, and the angles are permuted with them (:meth:`HeadOrder.angles`).

    Returns
    -------
    HeadOrder
        Permute keys and queries with it: their products stay what they are.

    Raises
    ------
    ValueError
        If rows are not heads of equal, even size, or not finite.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> w = np.diag([1.0, 9.0, 2.0, 8.0])
    >>> nb.quantizers.ksort(w, block=2).index
    array([[1, 3, 2, 0]])
    """
    x = np.asarray(w, np.float64)
    count, size = operator.index(heads), operator.index(block)
    if x.ndim != 2 or count < 1 or x.shape[0] % count or size < 1:
        raise ValueError(f"ksort takes (heads * channels, K), got {x.shape} for {count} heads")
    if rope not in (None, "half", "interleaved"):
        raise ValueError(f"rope must be None, 'half' or 'interleaved', got {rope!r}")
    width = x.shape[0] // count
    if rope is not None and width % 2:
        raise ValueError(f"rotary embedding pairs channels: heads of {width} are odd")
    if not np.isfinite(x).all():
        raise ValueError("ksort takes finite numbers")
    norms = np.square(x).sum(1).reshape(count, width)
    plain = np.arange(width)
    index = np.empty((count, width), np.intp)
    for head, norm in enumerate(norms):
        order = _sorted(norm, rope)
        index[head] = order if _peaks(norm[order], size) < _peaks(norm, size) else plain
    return HeadOrder(index, rope)


def _sorted(norm: NDArray[np.float64], rope: str | None) -> NDArray[np.intp]:
    """Return places in order of falling size, pairs by the size of both."""
    if rope is None:
        return np.argsort(-norm, kind="stable")
    half = len(norm) // 2
    ends = np.arange(half) if rope == "half" else 2 * np.arange(half)
    other = ends + (half if rope == "half" else 1)
    pairs = np.argsort(-(norm[ends] + norm[other]), kind="stable")
    if rope == "half":
        return np.concatenate([ends[pairs], other[pairs]])
    return np.stack([ends[pairs], other[pairs]], 1).ravel()


def _peaks(norm: NDArray[np.float64], block: int) -> float:
    """Return the sum over blocks of the largest square: what a shared exponent costs."""
    return float(
        sum(
            norm[i : i + block].max() * len(norm[i : i + block]) for i in range(0, len(norm), block)
        )
    )


def cluster(
    x: ArrayLike, *, block: SupportsIndex = 128, ratio: float = 8.0, limit: float = 0.2
) -> ChannelOrder:
    """Gather the outlier channels of activations in as few blocks of channels as hold them.

    Those blocks deserve eight bits, the others do with four.

    Parameters
    ----------
    x : array_like
        Activations that are typical, (..., K).
    block : int, default 128
        Channels of a block.
    ratio : float, default 8
        A channel whose largest magnitude exceeds that of the median channel so many times is an
        outlier.
    limit : float, default 0.2
        At most this part of the blocks gets eight bits (at least one, where there are outliers):
        the largest outliers come first.

    Returns
    -------
    ChannelOrder
        Apply it to activations and to the columns of the weights: products stay what they are.

    Raises
    ------
    ValueError
        If there is no channel, or a number is not finite.
    """
    a = np.asarray(x, np.float64)
    size = operator.index(block)
    if a.ndim == 0 or a.size == 0 or size < 1:
        raise ValueError(f"cluster takes activations (..., K), got shape {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError("cluster takes finite numbers")
    top = np.abs(a).reshape(-1, a.shape[-1]).max(0)
    outliers = int((top > ratio * np.median(top)).sum())
    blocks = -(-len(top) // size)
    wide = min(-(-outliers // size), max(int(limit * blocks), 1)) if outliers else 0
    # Outliers by size, then everything else as it stood.
    order = np.argsort(-top, kind="stable")
    first = order[: wide * size]
    rest = np.setdiff1d(np.arange(len(top)), first)
    tags = ("int8",) * wide + ("int4",) * (blocks - wide)
    return ChannelOrder(np.concatenate([first, rest]), tags, size)
