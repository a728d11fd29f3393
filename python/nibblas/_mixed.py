"""Weights whose blocks of channels have formats of their own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._api import matmul, quantize
from ._ksort import ChannelOrder
from .formats import Format
from .qtensor import QTensor

__all__ = ["MixedLinear"]

FORMATS = {"int8": "int8_g128", "int4": "int4_g128"}


class MixedLinear:
    """A linear layer whose input channels have the bits that they deserve.

    The columns of the weights are put in the order that :func:`cluster` found, cut where the tags
    of its blocks change, and each run of blocks is quantised in the format of its tag. Called as
    ``layer(x)`` with `x` in the order that it always had. With ``compute="int8"`` the activations
    of each run have scales of their own, so that outliers spoil only one another; a codebook of
    vectors is learned from the columns of its run alone.

    Parameters
    ----------
    w : array_like
        The weights, (N, K).
    order : ChannelOrder
        An order of the K channels, with a tag for each block.
    formats : mapping of str to str, optional
        The format of each tag. By default ``"int8"`` is ``int8_g128`` and ``"int4"`` is
        ``int4_g128``.
    method : str, default "rtn"
        How the weights are quantised, see :func:`nibblas.quantize`.
    importance : array_like, optional
        How much each of the K channels counts, for the formats that learn a table.
    bias : array_like, optional
        One value per row of the weights, added last.

    Raises
    ------
    ValueError
        If the order is of another number of channels, or a tag has no format.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> x = np.ones((4, 256), np.float32)
    >>> x[:, 7] = 100
    >>> order = nb.quantizers.cluster(x, block=64)
    >>> layer = nb.quantizers.MixedLinear(np.eye(256), order)
    >>> [str(part.format) for part in layer.parts]
    ['int8_g128', 'int4_g128']
    >>> float(layer(x)[0, 7])
    100.0
    """

    __slots__ = ("_bias", "_ends", "_order", "_parts", "_shape")

    def __init__(
        self,
        w: ArrayLike,
        order: ChannelOrder,
        formats: Mapping[str, str] = FORMATS,
        *,
        method: str = "rtn",
        importance: ArrayLike | None = None,
        bias: ArrayLike | None = None,
    ) -> None:
        a = np.asarray(w)
        if a.ndim != 2 or a.shape[1] != len(order.index):
            raise ValueError(f"an order of {len(order.index)} channels, but weights of {a.shape}")
        if -(-len(order.index) // order.block) != len(order.tags):
            raise ValueError(f"{len(order.tags)} tags for blocks of {order.block} channels")
        if missing := sorted(set(order.tags) - set(formats)):
            raise ValueError(f"no format for the tag {missing[0]!r}: there are {sorted(formats)}")
        runs = [(tag, len(list(run))) for tag, run in groupby(order.tags)]
        ends = np.cumsum([n * order.block for _, n in runs])
        self._shape: tuple[int, ...] = a.shape
        self._order = order
        self._ends = [min(int(e), a.shape[1]) for e in ends[:-1]]
        h = None if importance is None else np.asarray(importance)
        if h is not None and h.shape != a.shape[1:]:
            raise ValueError(f"importance of shape {h.shape}, expected {a.shape[1:]}")
        parts = []
        for (tag, _), index in zip(runs, np.split(order.index, self._ends), strict=False):
            own = h[index] if h is not None and _learns(formats[tag]) else None
            parts.append(quantize(a[:, index], formats[tag], method=method, importance=own))
        self._parts = tuple(parts)
        self._bias = None if bias is None else np.array(bias, np.float32)
        if self._bias is not None and self._bias.shape != a.shape[:1]:
            raise ValueError(f"bias of shape {self._bias.shape}, expected {a.shape[:1]}")

    @property
    def order(self) -> ChannelOrder:
        """The order of the channels."""
        return self._order

    @property
    def parts(self) -> tuple[QTensor, ...]:
        """The runs of blocks with one tag, in the order of the channels."""
        return self._parts

    @property
    def nbytes(self) -> int:
        """Bytes of the parts, and two for the place of each channel."""
        return sum(p.nbytes for p in self._parts) + 2 * len(self._order.index)

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights (N, K), channels in the order that they had."""
        if not self._parts:
            return np.zeros(self._shape, np.float32)
        whole: NDArray[np.float32] = np.concatenate([p.dequantize() for p in self._parts], 1)
        return self._order.undo(whole)

    def __repr__(self) -> str:
        formats = ", ".join(f"{p.format} ({p.shape[1]})" for p in self._parts)
        return f"MixedLinear({self._shape}, {formats})"

    def __call__(
        self, x: ArrayLike, *, compute: str = "f32", dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """Return ``x @ w.T``, plus the bias.

        Parameters
        ----------
        x : array_like
            Shape (..., K), channels in the order of the weights that the layer was made of.
        compute : str, default "f32"
            Arithmetic of the products, which every format of the layer must have.
        dtype : dtype, optional
            Type of the result; by default that of `x`, float32 for integers.

        Returns
        -------
        ndarray
            Shape (..., N). Runs are added in float32, in their order.
        """
        a = np.asarray(x)
        if a.ndim == 0 or a.shape[-1] != self._shape[1]:
            raise ValueError(f"expected an input of shape (..., {self._shape[1]}), got {a.shape}")
        kind = dtype
        if kind is None:
            kind = np.float32 if a.dtype.kind in "biu" else a.dtype
        y = np.zeros((*a.shape[:-1], self._shape[0]), np.float32)
        if self._parts:
            inputs = np.split(self._order.apply(a), self._ends, -1)
            for part, own in zip(self._parts, inputs, strict=True):
                y += matmul(own, part.T, compute=compute, dtype=np.float32)
        if self._bias is not None:
            y += self._bias
        return y.astype(kind, copy=False)


def _learns(name: str) -> bool:
    """Whether matrices of a format bring a table."""
    return any(p.name == "table" for p in Format(name).parts(1, 1))
