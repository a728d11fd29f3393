"""Activations that are quantised once, for products with any number of tensors."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from .._api import _check_inner, _float_dtype
from ..qtensor import QTensor
from ._launch import arch, has_wgmma, kernel
from ._panels import BitPlanes, Panels, panels_on
from ._plan import CHUNK
from ._product import (
    _ActArgs,
    _bias,
    _check_here,
    _export,
    _final,
    _import,
    _kind_of,
    _matrix,
    _run,
    _run_bits,
    _strides,
    is_device_array,
    quantiser,
    row_threads,
)

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Activations", "activations"]

_FORMATS = ("int8", "bipolar1", "bipolar2", "bipolar3", "bipolar4")


class _PlaneArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gain", "planes", "sums", "scales")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_col")),
        *((name, ctypes.c_int) for name in ("m", "k", "kind", "gain_kind", "bits", "rows")),
        *((name, ctypes.c_int) for name in ("bytes", "plain")),
        ("eps", ctypes.c_float),
    ]


class Activations:
    """Rows of numbers as products read them; made by :func:`activations`.

    ``a @ q.T`` is what ``nb.matmul(x, q.T, compute="int8")`` is, without quantising `x` again.

    Attributes
    ----------
    shape : tuple of int
        That of the array.
    format : str
        ``"int8"``, or ``"bipolar1"`` to ``"bipolar4"``.
    dtype : numpy.dtype
        What results are, unless a product says otherwise.
    scales : cupy.ndarray
        One float32 per row; NaN where a row has a NaN or an infinity.
    """

    __slots__ = ("_device", "_held", "_like", "dtype", "format", "scales", "shape")

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, format: str, scales: Any, held: Any, like: Any
    ) -> None:
        self.shape, self.dtype, self.format, self.scales = shape, dtype, format, scales
        self._held, self._like, self._device = held, like, int(scales.device.id)

    def __repr__(self) -> str:
        return f"Activations({self.shape}, {self.format!r}, device='cuda:{self._device}')"

    def __matmul__(self, q: object) -> Any:
        return self.matmul(q) if isinstance(q, QTensor) else NotImplemented

    def matmul(
        self, q: QTensor, /, *, out: Any = None, dtype: DTypeLike | None = None, bias: Any = None
    ) -> Any:
        """Multiply with a tensor, as ``nb.matmul(x, q, out=..., dtype=..., bias=...)`` does.

        Parameters
        ----------
        q : QTensor
            ``(K, N)``, so mostly ``w.T``. Against bit planes it is bipolar, with a scale per row.
        out, dtype, bias
            As in :func:`nibblas.matmul`; ``dtype=numpy.int32`` gives the sums of bit planes.
        """
        import cupy

        if not isinstance(q, QTensor):
            raise TypeError(f"expected a QTensor, got {type(q).__name__}")
        _check_inner(self.shape, q, True)
        raw = dtype is not None and np.dtype(dtype) == np.int32
        if raw and (self.format == "int8" or bias is not None):
            raise ValueError("sums of dtype int32 are those of bit planes, without a bias")
        result = np.dtype(np.int32) if raw else self.dtype if dtype is None else _float_dtype(dtype)
        storage = q._storage
        with cupy.cuda.Device(self._device):
            panels = panels_on(storage, self._device)
            n = panels.rows
            b = _bias(bias, n, cupy)
            shape = (*self.shape[:-1], n)
            final = _final(out, shape, result, cupy)
            y = final
            if final is None or final.dtype != result or not final.flags.c_contiguous:
                y = cupy.empty(shape, result)
            rows = _matrix(y, n)
            if y.size and self.shape[-1] == 0:
                y[...] = 0 if b is None else b
            elif y.size and self.format == "int8":
                self._integers(panels, rows, b)
            elif y.size:
                if not storage.format.element.name.startswith("bipolar") or panels.grouped_rows:
                    raise ValueError(
                        f"bit planes meet bipolar tensors with one scale per row, not "
                        f"{storage.format}"
                    )
                _run_bits(self._held, rows.shape[0], panels.bit_planes(), n, rows, b)
            if final is None:
                return _export(y, self._like, cupy)
            if final is not y:
                final[...] = y.astype(final.dtype)
            return out[0] if isinstance(out, tuple) else out

    def _integers(self, panels: Any, y: Any, bias: Any) -> None:
        fmt = panels.host.format
        if not isinstance(panels, Panels):
            raise ValueError(f"activations of int8 meet dense weights, not {fmt}")
        if "int8" not in fmt.computes:
            raise ValueError(f"compute='int8' is not available for {fmt}")
        padded = panels.grouped_rows and panels.group != panels.padded
        if padded or panels.chunks * CHUNK != self._held.shape[1]:
            raise ValueError(
                f"the groups of {fmt} do not lie side by side on CUDA: multiply the array itself"
            )
        scales = self.scales
        step = panels.row_step()
        if step != 1:
            scales = scales * step
        _run(panels, self._held, y, "int8", bias, scales, placed=True)


def _gain(norm: Any, k: int, cupy: ModuleType) -> Any:
    """Return RMSNorm's factors of the columns on the device, aligned."""
    if norm is None:
        return None
    g = _import(norm, cupy) if is_device_array(norm) else cupy.asarray(norm)
    _check_here(g, "norm", cupy)
    if g.shape != (k,):
        raise ValueError(f"norm must have shape ({k},), one factor per column, got {g.shape}")
    if _kind_of(g.dtype) not in (0, 1, 2):
        raise TypeError(f"norm of type {g.dtype} is not supported: expected 16- or 32-bit floats")
    g = cupy.ascontiguousarray(g)
    return g if g.data.ptr % 16 == 0 else g.copy()


def activations(
    x: Any, format: str = "int8", *, norm: Any = None, eps: float = 1e-6
) -> Activations:
    """Quantise rows in one pass, for products with one tensor or several.

    Parameters
    ----------
    x : array of the device
        ``(..., K)``, of float16, bfloat16, float32 or float64.
    format : str, default "int8"
        ``"int8"``: ``s = absmax/127``, as every product with ``compute="int8"``. ``"bipolar1"`` to
        ``"bipolar4"``: bit planes, as ``nb.quantize(x, "bipolar<b>")`` has them (the mean of one
        bit is a sum in another order), for bipolar tensors with one scale per row.
    norm : array, optional
        ``(K,)`` factors of RMSNorm, which goes first: ``x / sqrt(mean(x**2) + eps) * norm``. Its
        factor of the row ends in the scale alone.
    eps : float, default 1e-6
        Of RMSNorm.

    Returns
    -------
    Activations

    Examples
    --------
    >>> a = nb.cuda.activations(x, norm=gain)  # doctest: +SKIP
    >>> q, k, v = a @ wq.T, a @ wk.T, a @ wv.T  # doctest: +SKIP
    """
    if format not in _FORMATS:
        raise ValueError(
            f"unknown format {format!r} of activations: expected {', '.join(_FORMATS)}"
        )
    if not is_device_array(x):
        raise TypeError(f"expected an array of a CUDA device, got {type(x).__name__}")
    eps = float(eps)
    if not eps >= 0 or math.isinf(eps):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    import cupy

    c = _import(x, cupy)
    kind = _kind_of(c.dtype)
    if kind is None or kind > 3:
        raise TypeError(f"activations of type {c.dtype} are not supported: expected floats")
    if c.ndim == 0:
        raise ValueError("activations must have at least one dimension")
    device, k = int(c.device.id), c.shape[-1]
    arch(device)
    if format != "int8" and not has_wgmma(device):
        raise RuntimeError(
            f"bit planes need a device of compute capability 9.0, cuda:{device} is not"
        )
    with cupy.cuda.Device(device):
        gain = _gain(norm, k, cupy)
        rows = _matrix(c, k)
        if rows is None:
            rows = cupy.ascontiguousarray(c).reshape(-1, k)
        m = rows.shape[0]
        stream = int(cupy.cuda.get_current_stream().ptr)
        plain = (
            rows.strides[1] == rows.itemsize
            and rows.strides[0] % 16 == 0
            and rows.data.ptr % 16 == 0
            and k % 16 == 0
            and kind != 3
        )
        args: _ActArgs | _PlaneArgs
        if format == "int8":
            places = max(-(-k // CHUNK), 1) * CHUNK
            held = cupy.empty((m, places), np.int8)
            scales = cupy.empty(m, np.float32)
            args = _ActArgs(rows.data.ptr, held.data.ptr, scales.data.ptr)
            args.places = args.group = args.padded = places
            args.step = 1
            function, blocks, threads = quantiser(device, m, k, plain and kind < 2)
        else:
            bits = int(format[7:])
            held = BitPlanes(bits, -(-max(m, 1) // 8) * 8, k, device)
            scales = held.scales[:m]
            args = _PlaneArgs(rows.data.ptr, None, held.planes.data.ptr, held.sums.data.ptr)
            args.scales, args.bits, args.rows = held.scales.data.ptr, bits, held.rows
            args.bytes, blocks, threads = held.chunks * 128, held.rows, row_threads(k)
            function = kernel(device, "activation_planes.cu", "planes")
        args.x_row, args.x_col = _strides(rows)
        args.m, args.k, args.kind, args.plain, args.eps = m, k, kind, plain, eps
        if gain is not None:
            args.gain, args.gain_kind = gain.data.ptr, _kind_of(gain.dtype)
        if m and k:
            function.launch((blocks, 1), threads, 0, stream, args, early=True)
        return Activations(c.shape, c.dtype, format, scales, held, x)
