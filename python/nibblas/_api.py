"""The functions of the package: quantize, matmul, explain."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core, _threads
from ._methods import METHODS
from .formats import Format
from .qtensor import _PART_DTYPE, QTensor, _Storage

__all__ = ["explain", "matmul", "quantize"]

_DIRECT: dict[type, np.dtype[Any]] = {t: np.dtype(t) for t in (np.float32, np.float16, np.float64)}
_FLOAT32 = np.dtype(np.float32)
_INTEGER = (np.dtype(np.int32), np.dtype(np.int64))
_SIGNATURE = "(n?,k),(k,m?)->(n?,m?)"
_LINE = 64


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """As `np.empty`; a large array begins with a line of the cache, as `matmul_plain` makes it."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _core.LARGE:
        return np.empty(shape, dtype)
    try:
        memory = np.empty(nbytes + _LINE, np.uint8)
    except (MemoryError, ValueError):
        return np.empty(shape, dtype)  # says which shape there is no room for
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % _LINE)


def quantize(
    x: Any,
    format: str,
    *,
    axis: SupportsIndex = -1,
    method: str = "rtn",
    importance: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
) -> QTensor:
    """Quantise a float matrix.

    Parameters
    ----------
    x : array_like
        A real matrix: NumPy, or anything with ``__array__`` or DLPack. NaN and Inf are refused. An
        array of a CUDA device gives a tensor there, with the same codes.
    format : str
        Format name, such as ``"int4_g128"``; see :func:`nibblas.formats.table`.
    axis : int, default -1
        The axis along which groups run: the one that products contract.
    method : str, default "rtn"
        Quantiser; see :mod:`nibblas.quantizers`.
    importance : array_like, optional
        How much the squared error of each place along the axis counts, 0 or more, where the format
        learns a table (``lut``, ``vq``): such as the mean squares of the activations, the diagonal
        of a Hessian matrix.
    threads : int, optional
        At most this many threads. The result does not depend on it.

    Returns
    -------
    QTensor
        In the shape of `x`.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> q = nb.quantize(np.eye(4, 16, dtype=np.float32), "int4_g8")
    >>> q.shape, str(q.format)
    ((4, 16), 'int4_g8')
    """
    target = Format(format)
    fmt = target.dense
    if not isinstance(method, str):
        raise TypeError(f"method must be a string, got {_kind(method)}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    count = _threads.resolve(threads)
    if _on_device(x):
        return _quantize_on_device(x, target, axis, method, count)
    w, _ = _operand(_import(x), "f32")
    if w.ndim != 2:
        raise ValueError(f"a QTensor is a matrix: expected 2 dimensions, got shape {w.shape}")
    ax = operator.index(axis)
    if not -2 <= ax < 2:
        raise np.exceptions.AxisError(ax, 2)
    transposed = ax % 2 == 0
    if transposed:
        w = w.T
    rows, cols = w.shape
    parts = fmt.parts(rows, cols)
    arrays: dict[str, NDArray[Any]] = {
        p.name: np.zeros(p.shape, _PART_DTYPE[p.types[0]]) for p in parts
    }
    bounds = np.empty((rows, fmt.groups(cols)), np.float32)
    weights = None if importance is None else _vector("importance", importance, cols, "column")
    _core.quantize(w, fmt, method, weights, arrays, bounds, count)
    storage = _Storage(fmt, rows, cols, arrays, bounds)
    if target.structure is not None:
        storage = storage.sparse(target)
    return QTensor._wrap(storage, transposed)


def _quantize_on_device(
    x: Any, fmt: Format, axis: SupportsIndex, method: str, threads: int
) -> QTensor:
    """Quantise an array of a device into a tensor there; the device does it where it can."""
    from . import cuda

    ax = operator.index(axis)
    if method == "rtn" and -2 <= ax < 2:
        q = cuda.quantize(x, fmt, ax)
        if q is not None:
            return q
    q, number = quantize(_import(x), fmt, axis=ax, method=method, threads=threads), x.device
    return q.to(f"cuda:{getattr(number, 'id', getattr(number, 'index', 0))}")


def matmul(
    a: Any,
    b: Any,
    /,
    *,
    compute: str = "f32",
    out: Any = None,
    dtype: DTypeLike | None = None,
    bias: ArrayLike | None = None,
    threads: SupportsIndex | None = None,
    skip_zeros: bool = False,
) -> Any:
    """Multiply where at least one operand is a QTensor, with the semantics of :func:`numpy.matmul`.

    Parameters
    ----------
    a, b : array_like or QTensor
        Operands; the contracted axis of a QTensor must be the one its groups run along.
    compute : str, default "f32"
        Arithmetic of the inner product. ``"f32"``: float32 products and sums. ``"bf16"``: bfloat16
        operands, float32 sums. ``"int8"``: activations quantised per row to int8, integer sums (an
        int8 array is then taken as codes, with scale 1). ``"int8_g32"``, ``"int8_g128"``: one
        activation scale per group.
    out : ndarray, optional
        Where the result goes; it may overlap an operand, and is returned.
    dtype : dtype, optional
        Type of the result: a float type, by default the activations' (float32 for integers). int32
        or int64 for two QTensors with one scale per row: the exact sums of code values, without
        scales.
    bias : array_like, optional
        One value per row of the weights (output feature), added last in float32.
    threads : int, optional
        At most this many threads. The result does not depend on it.
    skip_zeros : bool, default False
        Whether activations are expected to be mostly 0, as after a ReLU. A product of few rows then
        visits only the columns of the weights that count, where the weights have integer codes and
        one scale per row; they are kept a second time, by columns. The result is the same.

    Returns
    -------
    ndarray
        The product.

    Examples
    --------
    >>> import numpy as np, nibblas as nb
    >>> q = nb.quantize(np.eye(3, 8, dtype=np.float32), "int8")
    >>> nb.matmul(np.arange(8, dtype=np.float32), q.T)
    array([0., 1., 2.], dtype=float32)
    """
    if isinstance(b, QTensor):
        if isinstance(a, QTensor):
            return _both(a, b, compute, out, dtype, bias, threads)
        return _one(a, b, True, compute, out, dtype, bias, threads, skip_zeros)
    if isinstance(a, QTensor):
        return _one(b, a, False, compute, out, dtype, bias, threads, skip_zeros)
    raise TypeError(
        f"nibblas.matmul needs a QTensor, got {_kind(a)} and {_kind(b)}; see nibblas.quantize"
    )


def explain(
    a: Any,
    b: Any,
    /,
    *,
    compute: str = "f32",
    threads: SupportsIndex | None = None,
) -> Any:
    """Say how :func:`matmul` would compute a product, without computing it.

    Parameters
    ----------
    a, b : array_like or QTensor
        As for :func:`matmul`.
    compute : str, default "f32"
        As for :func:`matmul`.
    threads : int, optional
        As for :func:`matmul`.

    Returns
    -------
    Plan
        Prints as text; ``fields()`` gives a dict.
    """
    if isinstance(b, QTensor):
        q, other, right = b, a, True
    elif isinstance(a, QTensor):
        q, other, right = a, b, False
    else:
        raise TypeError(f"nibblas.explain needs a QTensor, got {_kind(a)} and {_kind(b)}")
    if _on_device(other):
        from . import cuda

        return cuda.explain(other, q, compute)
    x = other if isinstance(other, QTensor) else _import(other)
    shape = tuple(x.shape)
    q = _facing(q, right)
    _check_inner(shape, q, right)
    rows = 1
    for n in shape[:-1] if right else shape[:-2] + shape[-1:] if len(shape) > 1 else ():
        rows *= n
    count = _threads.resolve(threads)
    return _core.explain(rows, q._storage.pack(count), compute, count)


def ufunc_matmul(*inputs: Any, **kwargs: Any) -> Any:
    """Serve ``np.matmul`` where an operand is a QTensor, with the keywords of a ufunc."""
    out = kwargs.pop("out", None)
    dtype = kwargs.pop("dtype", None)
    axes = kwargs.pop("axes", None)
    casting = kwargs.pop("casting", "same_kind")
    # Neither changes a result that is a new C-contiguous array of the base class.
    order, subok = kwargs.pop("order", "K"), kwargs.pop("subok", True)
    if kwargs:
        raise TypeError(f"np.matmul with a QTensor does not take {', '.join(sorted(kwargs))}")
    if order not in ("K", "C", "A") or not isinstance(subok, bool):
        raise TypeError(f"np.matmul with a QTensor does not take order={order!r}, subok={subok!r}")
    if casting != "same_kind":
        raise TypeError(f"np.matmul with a QTensor does not take casting={casting!r}")
    if axes is not None and any(tuple(ax) not in ((-2, -1), (-1,)) for ax in axes):
        raise TypeError(f"np.matmul with a QTensor does not take axes={axes!r}")
    a, b = inputs
    return matmul(a, b, out=out, dtype=dtype)


def _kind(x: object) -> str:
    return type(x).__name__


def _on_device(x: object) -> bool:
    """Whether an operand lies in the memory of a CUDA device."""
    if isinstance(x, np.ndarray) or not hasattr(type(x), "__cuda_array_interface__"):
        return False
    from .cuda import is_device_array

    return is_device_array(x)


def _import(x: Any) -> NDArray[Any]:
    """Return somebody's array as a NumPy array, without a copy where possible."""
    if isinstance(x, QTensor):
        raise TypeError("expected a dense array, got a QTensor: use its dequantize()")
    if isinstance(x, np.ndarray):
        ma = sys.modules.get("numpy.ma")
        if ma is not None and isinstance(x, ma.MaskedArray):
            raise TypeError("masked arrays are not supported: use x.filled(value)")
        return x
    kind = type(x)
    if kind.__module__.partition(".")[0] == "cupy":
        return np.asarray(x.get())
    if hasattr(kind, "__dlpack__") and not hasattr(kind, "__array__"):
        return np.from_dlpack(x)
    if hasattr(kind, "__dlpack__"):
        try:
            return np.asarray(x)
        except (TypeError, RuntimeError):
            # A library whose own conversion lacks the type, such as torch with bfloat16.
            return _import_bf16(x)
    return np.asarray(x)


def _import_bf16(x: Any) -> NDArray[Any]:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise TypeError(f"cannot read an array from {_kind(x)}")
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        bits = np.from_dlpack(x.view(torch.int16)).view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(x)


def _exporter(x: Any) -> Callable[[NDArray[Any]], Any] | None:
    """Return what turns a result into an array of `x`'s own namespace, None for NumPy's."""
    if isinstance(x, np.ndarray):
        return None
    namespace = getattr(x, "__array_namespace__", None)
    if namespace is None or type(x).__module__.partition(".")[0] == "numpy":
        return None
    xp = namespace()
    return getattr(xp, "from_dlpack", None) or getattr(xp, "asarray", None)


def _astype(x: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Convert; an axis repeated with stride 0 is converted once and repeated again."""
    if 0 in x.strides and x.size:
        once = x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.strides)]
        return np.broadcast_to(once.astype(dtype), x.shape)
    return x.astype(dtype)


_SMALL = ("float8", "float6", "float4", "int1", "int2", "int4", "uint1", "uint2", "uint4")


def _operand(x: Any, compute: str) -> tuple[NDArray[Any], np.dtype[Any]]:
    """Return an array whose type the core reads, and the type of its product.

    bfloat16 goes as its bits, viewed as uint16.
    """
    array = _import(x)
    dt = array.dtype
    if not dt.isnative:
        dt = dt.newbyteorder("=")
        array = _astype(array, dt)
    same = _DIRECT.get(dt.type)
    if same is not None:
        return array, same
    if dt.kind in "iub":
        if compute == "int8" and dt == np.int8:
            return array, _FLOAT32
        return _astype(array, np.float32), _FLOAT32
    if dt.kind in "Vf" and dt.names is None:
        if dt.name == "bfloat16":
            return array.view(np.uint16), dt
        if dt.name.startswith(_SMALL):
            return _astype(array, np.float32), _FLOAT32
    raise TypeError(
        f"operands of type {dt} are not supported: expected real numbers of at most 64 bits"
    )


def _facing(q: QTensor, right: bool) -> QTensor:
    """Return `q` stored along the axis that a product contracts, where its format allows both."""
    free = q.format.element.shared and q.format.structure is None
    if q._transposed != right and free and q._storage.device == "cpu":
        return QTensor._wrap(q._storage.turned(), not q._transposed)
    return q


def _check_inner(shape: tuple[int, ...], q: QTensor, right: bool) -> None:
    """Check that a product with `q` is defined, and contracts the axis it is quantised along."""
    if not shape:
        raise ValueError(
            f"matmul: Input operand {int(not right)} does not have enough dimensions (has 0, "
            f"gufunc core with signature {_SIGNATURE} requires 1)"
        )
    k = shape[-1] if right or len(shape) == 1 else shape[-2]
    inner, outer = q.shape if right else q.shape[::-1]
    if k != inner:
        left_shape, right_shape = (shape, q.shape) if right else (q.shape, shape)
        sizes = (inner, k) if right else (k, inner)
        hint = (
            f"; its transpose fits: use {'x @ q.T' if right else 'q.T @ x'}" if k == outer else ""
        )
        raise ValueError(
            f"matmul: Input operand 1 has a mismatch in its core dimension 0, with gufunc "
            f"signature {_SIGNATURE} (size {sizes[0]} is different from {sizes[1]}): "
            f"shapes {left_shape} and {right_shape}{hint}"
        )
    if q._transposed != right:
        axis = 0 if right else 1
        raise ValueError(
            f"a product with {q!r} contracts axis {axis}, but its groups run along axis "
            f"{1 - axis}: use its transpose, or quantise with axis={axis}"
        )


def _float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    dt = np.dtype(dtype).newbyteorder("=")
    if dt.type in _DIRECT or dt.name == "bfloat16":
        return dt
    hint = " (raw integer sums need two QTensors)" if dt.kind in "iu" else ""
    raise TypeError(
        f"dtype={dt} is not a result type: expected float16, bfloat16, float32 or float64{hint}"
    )


def _bias(bias: ArrayLike | None, rows: int) -> NDArray[np.float32] | None:
    return None if bias is None else _vector("bias", bias, rows, "weight row")


def _vector(name: str, values: ArrayLike, count: int, each: str) -> NDArray[np.float32]:
    """Return one float32 for each row or column."""
    v, _ = _operand(values, "f32")
    if v.dtype == np.uint16:
        v = (v.astype(np.uint32) << 16).view(np.float32)
    if v.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one per {each}, got {v.shape}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(v, np.float32)


def _is_distinct(a: NDArray[Any]) -> bool:
    """Whether no two elements of an array share memory."""
    if a.flags.c_contiguous or a.flags.f_contiguous:
        return True
    reach = a.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += stride * (n - 1)
    return True


def _raw(a: NDArray[Any]) -> NDArray[Any]:
    return a.view(np.uint16) if a.dtype.kind == "V" else a


class _Result:
    """Where a product goes: a new array, the caller's `out`, or a temporary copied into it."""

    __slots__ = ("_final", "array")

    def __init__(
        self,
        out: Any,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        core: int,
        inputs: tuple[Any, ...],
    ) -> None:
        self._final: NDArray[Any] | None = None
        if isinstance(out, tuple):
            if len(out) != 1:
                raise ValueError("The 'out' tuple must have exactly one entry per ufunc output")
            out = out[0]
        if out is None:
            self.array = _empty(shape, dtype)
            return
        if not isinstance(out, np.ndarray):
            raise TypeError(f"return arrays must be of ArrayType, got {_kind(out)}")
        self._check_shape(out, shape, core)
        if not np.can_cast(dtype, out.dtype, "same_kind"):
            _raise_cast(dtype, out.dtype)
        if not out.flags.writeable:
            raise ValueError("output array is read-only")
        # 16-bit results are rounded to their type before a wider `out` takes them.
        narrow = dtype.itemsize == 2 and out.dtype != dtype
        direct = (
            out.shape == shape
            and out.dtype.isnative
            and (out.dtype == dtype or (dtype.kind == "f" and out.dtype.type in _DIRECT))
            and not narrow
            and _is_distinct(out)
            and not any(i is not None and np.may_share_memory(out, i) for i in inputs)
        )
        self._final = out
        self.array = out if direct else _empty(shape, dtype)

    @staticmethod
    def _check_shape(out: NDArray[Any], shape: tuple[int, ...], core: int) -> None:
        if out.shape == shape:
            return
        stack, want = out.shape[: out.ndim - core], shape[: len(shape) - core]
        if out.ndim >= core and out.shape[out.ndim - core :] == shape[len(shape) - core :]:
            try:
                if np.broadcast_shapes(stack, want) == stack:
                    return
            except ValueError:
                pass
        raise ValueError(f"matmul: Output operand 0 has shape {out.shape}, the result has {shape}")

    def finish(self) -> NDArray[Any]:
        if self._final is None:
            return self.array
        if self._final is not self.array:
            with np.errstate(over="ignore"):
                np.copyto(self._final, self.array, casting="same_kind")
        return self._final


def _raise_cast(source: np.dtype[Any], target: np.dtype[Any]) -> NoReturn:
    # NumPy's own exception for the same mistake.
    np.matmul(np.zeros((1, 1), source), np.zeros((1, 1), source), out=np.zeros((1, 1), target))
    raise TypeError(f"cannot cast the result from {source} to {target} with rule 'same_kind'")


def _one(
    other: Any,
    q: QTensor,
    right: bool,
    compute: str,
    out: Any,
    dtype: DTypeLike | None,
    bias: ArrayLike | None,
    threads: SupportsIndex | None,
    skip_zeros: bool,
) -> Any:
    """Multiply a dense operand with a QTensor, which stands on the right or on the left."""
    if not isinstance(compute, str):
        raise TypeError(f"compute must be a string, got {_kind(compute)}")
    if q._storage.device != "cpu" or _on_device(other):
        from . import cuda

        return cuda.product(other, q, right, compute, out, dtype, bias, threads)
    x, result = _operand(other, compute)
    q = _facing(q, right)
    _check_inner(x.shape, q, right)
    if dtype is not None:
        result = _float_dtype(dtype)
    storage = q._storage
    n = storage.rows
    count = _threads.resolve(threads)
    b = _bias(bias, n)
    vector = x.ndim == 1
    if right or vector:
        shape, core = (*x.shape[:-1], n), 1 if vector else 2
    else:
        shape, core = (*x.shape[:-2], n, x.shape[-1]), 2
    _core.check_compute(compute, storage.format)
    place = _Result(out, shape, result, core, (x, b))
    y = _raw(place.array)
    if vector:
        x, y = x[None], y[None]
    elif right and x.ndim > 2 and y.flags.c_contiguous and 0 not in x.strides:
        # One product with many rows beats many with few, even where the stack has to be copied.
        rows = math.prod(x.shape[:-1])
        x, y = x.reshape(rows, x.shape[-1]), y.reshape(rows, n)
    elif not right:
        # y = q x per matrix of the stack is y^T = x^T q^T: swapped strides, nothing copied.
        x, y = x.swapaxes(-1, -2), y.swapaxes(-1, -2)
    done = skip_zeros and _skipping(x, storage, y, compute, b, count)
    if not done:
        _core.matmul(x, storage.pack(count), y, compute, b, count, None)
    result_array = place.finish()
    export = None if out is not None else _exporter(other)
    return result_array if export is None else export(result_array)


# Rows of activations that products by columns take.
_FEW = 4


def _skipping(
    x: NDArray[Any],
    s: _Storage,
    y: NDArray[Any],
    compute: str,
    bias: NDArray[np.float32] | None,
    threads: int,
) -> bool:
    """Multiply by columns where that can pay; returns whether it did."""
    fmt = s.format
    if x.ndim != 2 or len(x) > _FEW or compute not in ("f32", "int8") or fmt.groups(s.cols) > 1:
        return False
    if not fmt.element.linear or fmt.bits > 8 or "int8" not in fmt.computes:
        return False
    zeros = s.zeros
    if zeros is not None and zeros.dtype.kind == "f":
        return False
    return s.columns(threads).matmul(x, y, compute, bias, threads, None)


def _both(
    a: QTensor,
    b: QTensor,
    compute: str,
    out: Any,
    dtype: DTypeLike | None,
    bias: ArrayLike | None,
    threads: SupportsIndex | None,
) -> Any:
    """Multiply two QTensors as integers."""
    if not isinstance(compute, str):
        raise TypeError(f"compute must be a string, got {_kind(compute)}")
    a, b = _facing(a, False), _facing(b, True)
    _check_inner(a.shape, b, True)
    _check_inner(b.shape, a, False)
    raw = dtype is not None and np.dtype(dtype).kind in "iub"
    left, right = a._storage, b._storage
    if left.device != "cpu" or right.device != "cpu":
        from . import cuda

        return cuda.product_both(a, b, compute, out, dtype, bias)
    _core.check_compute(compute, right.format)
    if raw:
        result = np.dtype(dtype).newbyteorder("=")
        if result not in _INTEGER:
            raise TypeError(f"raw integer sums have dtype int32 or int64, got {result}")
        for q in (a, b):
            if q.format.group is not None:
                raise ValueError(
                    f"raw integer sums need one scale per row, but {q.format} is grouped"
                )
        if bias is not None:
            raise ValueError("raw integer sums take no bias")
    else:
        result = _FLOAT32 if dtype is None else _float_dtype(dtype)
    count = _threads.resolve(threads)
    vector = _bias(bias, right.rows)
    shape = (left.rows, right.rows)
    inputs = (*left.arrays().values(), *right.arrays().values(), vector)
    place = _Result(out, shape, result, 2, inputs)
    packed = right.pack(count)
    if raw:
        y = place.array
        if y.dtype != result or not y.flags.c_contiguous:
            place.array = y = np.empty(shape, result)
        _core.matmul_raw(left.parts(), packed, y, count, None)
    else:
        y = _raw(place.array)
        if not _core.matmul_q(left.parts(), packed, y, vector, count, None):
            # Zero points that are floats, or groups that do not nest: the left side is decoded.
            x = a.dequantize()
            _core.matmul(x, packed, y, "f32", vector, count, None)
    return place.finish()
