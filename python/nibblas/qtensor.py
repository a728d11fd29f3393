"""QTensor: a matrix in a low-bit format, in the portable layout."""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core, _threads
from .formats import Format

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QTensor"]

_Parts: TypeAlias = tuple[
    str, int, int, NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, float
]
_Key: TypeAlias = slice | EllipsisType | NDArray[Any] | list[int]

_SCALE_DTYPE: dict[str, type] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "e8m0": np.uint8,
    "e4m3": np.uint8,
}
_FLOAT32 = np.dtype(np.float32)

# Guards the first packing of every tensor. A child forked while it is held gets a new one; a signal
# handler that multiplies may find it held by its own thread.
_pack_lock = threading.RLock()
_isa_told = False


def _new_lock() -> None:
    global _pack_lock
    _pack_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _small_dtype(name: str) -> np.dtype[Any] | None:
    """Return a dtype of ml_dtypes, None where it is not installed."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def _powers(e: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``2**(e - 127)``, NaN for 255."""
    out: NDArray[np.float32] = np.ldexp(np.float32(1), e.astype(np.int32) - 127)
    out[e == 255] = np.nan
    return out


_E4M3 = Format("e4m3").element.values
_E4M3.setflags(write=False)


def _e4m3_bytes(s: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of the nearest numbers of e4m3, ties to even."""
    if ((s < 0) | (s >= 464)).any():
        raise ValueError("scales of type e4m3 lie in [0, 448]")
    levels = _E4M3[:127].astype(np.float64)
    middle = (levels[1:] + levels[:-1]) / 2
    low, high = np.searchsorted(middle, s, "left"), np.searchsorted(middle, s, "right")
    return np.where(low % 2 == 0, low, high).astype(np.uint8)


def _tensor_scale(s: float) -> float:
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(s))
    except (TypeError, ValueError):
        raise TypeError(f"tensor_scale must be a number, got {type(s).__name__}") from None


def _power_bytes(s: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of powers of two and NaN."""
    mantissa, exponent = np.frexp(s)
    out = (exponent + 126).astype(np.int32)
    nan = np.isnan(s)
    if not (nan | ((mantissa == 0.5) & (out >= 0) & (out < 255))).all():
        raise ValueError("scales of type e8m0 are powers of two from 2**-127 to 2**127")
    return np.where(nan, 255, out).astype(np.uint8)


def _to_bf16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16, ties to even, as bits."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _freeze(a: NDArray[Any]) -> NDArray[Any]:
    a = np.ascontiguousarray(a)
    a.setflags(write=False)
    return a


class _Storage:
    """The arrays of a matrix (N, K), shared by a tensor and its transpose; never changed.

    Once packed they may be dropped: the panels hold the same bits and give them back.
    """

    __slots__ = (
        "_arrays",
        "_shapes",
        "bounds",
        "cols",
        "copies",
        "device",
        "format",
        "nbytes",
        "packed",
        "rows",
        "tensor",
    )

    def __init__(
        self,
        format: Format,
        rows: int,
        cols: int,
        codes: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        bounds: NDArray[np.float32] | None,
        tensor: float = 1.0,
    ) -> None:
        self.format = format
        self.tensor = tensor
        self.rows = rows
        self.cols = cols
        arrays = (_freeze(codes), _freeze(scales), None if zeros is None else _freeze(zeros))
        self._arrays: tuple[NDArray[Any] | None, ...] | None = arrays
        self._shapes = tuple(None if a is None else (a.shape, a.dtype) for a in arrays)
        self.nbytes = sum(a.nbytes for a in arrays if a is not None)
        if format.element.tensor_scale:
            self.nbytes += 4
        self.bounds = None if bounds is None else _freeze(bounds)
        self.packed: _core.Packed | None = None
        self.device = "cpu"
        # Panels on CUDA devices that met this tensor, by the device's number.
        self.copies: dict[int, Any] = {}

    def like(self, part: _Storage) -> _Storage:
        """Return a part of the matrix where the matrix is."""
        return part

    def _array(self, index: int) -> NDArray[Any] | None:
        arrays, kind = self._arrays, self._shapes[index]
        if arrays is not None or kind is None:
            return None if arrays is None else arrays[index]
        assert self.packed is not None
        out = np.empty(*kind)
        self.packed.restore(("codes", "scales", "zeros")[index], out, _threads.get_num_threads())
        return _freeze(out)

    @property
    def codes(self) -> NDArray[np.uint8]:
        a = self._array(0)
        assert a is not None
        return a

    @property
    def scales(self) -> NDArray[Any]:
        a = self._array(1)
        assert a is not None
        return a

    @property
    def zeros(self) -> NDArray[Any] | None:
        return self._array(2)

    def parts(self) -> _Parts:
        arrays = self.codes, self.scales, self.zeros
        return self.format, self.rows, self.cols, *arrays, self.tensor

    def arrays(self) -> tuple[NDArray[Any] | None, ...]:
        return self.codes, self.scales, self.zeros

    def drop(self) -> None:
        """Let go of the portable arrays, which the panels can restore."""
        assert self.packed is not None
        self._arrays = None

    def pack(self, threads: int) -> _core.Packed:
        packed = self.packed
        if packed is None:
            with _pack_lock:
                packed = self.packed
                if packed is None:
                    _tell_isa()
                    packed = self.packed = _core.pack(self.parts(), threads)
        return packed


def _tell_isa() -> None:
    """Warn, once, where ``NIBBLAS_ISA`` cannot be followed."""
    global _isa_told
    if not _isa_told:
        _isa_told = True
        text = _core.isa_warning()
        if text is not None:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


class _ArrayUfunc:
    """``__array_ufunc__`` for NumPy alone.

    NumPy looks the method up on the type, CuPy on the instance, and CuPy calls ``__rmatmul__`` only
    where it finds None.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any] | None:
        return self.function if instance is None else None


class QTensor:
    """A matrix in a low-bit format.

    Made by :func:`nibblas.quantize`, :meth:`from_parts` or :func:`nibblas.load`; never changed
    afterwards. Stored as (N, K) with groups along K; ``.T`` is a flag.
    """

    __slots__ = ("__weakref__", "_storage", "_transposed")
    __hash__ = None  # type: ignore[assignment]
    __iter__ = None  # rows are not tensors: without this, iteration would silently find nothing
    _storage: _Storage
    _transposed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("make a QTensor with nb.quantize(...) or nb.QTensor.from_parts(...)")

    @classmethod
    def _wrap(cls, storage: _Storage, transposed: bool = False) -> QTensor:
        self = _new(cls)
        self._storage = storage
        self._transposed = transposed
        return self

    @classmethod
    def from_parts(
        cls,
        format: str,
        codes: ArrayLike,
        scales: ArrayLike,
        zeros: ArrayLike | None = None,
        shape: tuple[int, int] | None = None,
        *,
        tensor_scale: float = 1.0,
    ) -> QTensor:
        """Build a tensor from somebody else's codes.

        Parameters
        ----------
        format : str
            Format name.
        codes : array_like of int
            Code values, shape (N, K): ``q`` for int, ``u`` for uint, odd integers for bipolar,
            -1, 0 and 1 for ternary. What :meth:`codes` returns.
        scales : array_like
            Shape (N, groups), or (N,) where there is one group per row; rounded to the format's
            scale type.
        zeros : array_like, optional
            Zero points in the same shape, for formats that have them: integers, or floats as some
            checkpoints have. 0 by default.
        shape : tuple of int, optional
            (N, K), where ``codes`` is flat; otherwise it must agree with ``codes``.
        tensor_scale : float, default 1
            What multiplies every scale, for formats that have such a number; rounded to float32.

        Returns
        -------
        QTensor

        Raises
        ------
        ValueError
            If a shape does not fit, a code is out of range, or a scale or zero point is not finite.
        TypeError
            If codes are not integers.
        """
        fmt = Format(format)
        values = np.asarray(codes)
        if values.dtype.kind == "V" and values.dtype.name in ("int2", "int4", "uint2", "uint4"):
            values = values.astype(np.int8)
        if values.dtype.kind not in "iu":
            raise TypeError(f"codes must be integers, got {values.dtype}")
        if shape is not None:
            rows, cols = (_length(n) for n in _pair(shape))
            if values.size != rows * cols or (values.ndim == 2 and values.shape != (rows, cols)):
                raise ValueError(f"codes of shape {values.shape} do not fit shape {(rows, cols)}")
            values = values.reshape(rows, cols)
        if values.ndim != 2:
            raise ValueError(f"codes must have shape (N, K), got {values.shape}; give shape=(N, K)")
        rows, cols = values.shape
        element = fmt.element
        if values.size:
            low, high = int(values.min()), int(values.max())
            if low < element.minimum or high > element.maximum:
                raise ValueError(
                    f"codes of {fmt} lie in [{element.minimum}, {element.maximum}], "
                    f"got values in [{low}, {high}]"
                )
        groups = fmt.groups(cols)
        scale = _scales(fmt, scales, rows, groups)
        zero = _zeros(fmt, zeros, rows, groups)
        packed = np.zeros((rows, fmt.row_bytes(cols)), np.uint8)
        _core.encode(fmt, np.ascontiguousarray(values, np.int16), packed)
        tensor = _tensor_scale(tensor_scale)
        storage = _Storage(fmt, rows, cols, packed, scale, zero, None, tensor)
        _core.check(storage.parts())
        return cls._wrap(storage)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape."""
        s = self._storage
        return (s.cols, s.rows) if self._transposed else (s.rows, s.cols)

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def size(self) -> int:
        """Number of values."""
        return self._storage.rows * self._storage.cols

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """What ``np.asarray`` gives: float32. The coding is :attr:`format`."""
        return _FLOAT32

    @property
    def format(self) -> Format:
        """The coding."""
        return self._storage.format

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, scales and zero points."""
        return self._storage.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales and zero points included."""
        return 8 * self.nbytes / self.size if self.size else math.nan

    @property
    def device(self) -> str:
        """Where products are computed: ``"cpu"`` or ``"cuda:<n>"``."""
        return self._storage.device

    @property
    def T(self) -> QTensor:
        """The transpose: the same data with a flag."""
        q = _new(QTensor)
        q._storage = self._storage
        q._transposed = not self._transposed
        return q

    def _orient(self, a: NDArray[Any]) -> NDArray[Any]:
        return a.T if self._transposed else a

    @property
    def scales(self) -> NDArray[Any]:
        """Scales, shape (N, groups), read-only.

        Types that NumPy lacks (bfloat16, powers of two) need ml_dtypes to show themselves and are
        float32 without it.
        """
        s = self._storage.scales
        if self._storage.format.scale == "bf16":
            bf16 = _small_dtype("bfloat16")
            s = (s.astype(np.uint32) << 16).view(np.float32) if bf16 is None else s.view(bf16)
        elif self._storage.format.scale == "e8m0":
            e8m0 = _small_dtype("float8_e8m0fnu")
            s = _powers(s) if e8m0 is None else s.view(e8m0)
        elif self._storage.format.scale == "e4m3":
            e4m3 = _small_dtype("float8_e4m3fn")
            s = _E4M3[s] if e4m3 is None else s.view(e4m3)
        s.setflags(write=False)
        return self._orient(s)

    @property
    def zeros(self) -> NDArray[Any] | None:
        """Zero points, shape (N, groups), read-only; None where the format has none."""
        z = self._storage.zeros
        return None if z is None else self._orient(z)

    @property
    def tensor_scale(self) -> float:
        """What multiplies every scale; 1 but in formats that have such a number."""
        return self._storage.tensor

    @property
    def error_bound(self) -> NDArray[np.float32] | None:
        """Upper bound of ``|w - decoded|`` in each group, shape (N, groups).

        None where the float matrix was never seen (:meth:`from_parts`).
        """
        b = self._storage.bounds
        return None if b is None else self._orient(b)

    def codes(self) -> NDArray[Any]:
        """Return the code values.

        Returns
        -------
        ndarray
            int8 (uint8 for uint formats, int16 for bipolar8), in the shape of the tensor: what
            :meth:`from_parts` takes.
        """
        s = self._storage
        element = s.format.element
        wide = np.empty((s.rows, s.cols), np.int16)
        _core.decode_codes(s.parts(), wide, _threads.get_num_threads())
        dtype: type = np.int16
        if element.minimum >= 0 and element.maximum <= 255:
            dtype = np.uint8
        elif element.minimum >= -128 and element.maximum <= 127:
            dtype = np.int8
        return self._orient(wide.astype(dtype, copy=False))

    def dequantize(self) -> NDArray[np.float32]:
        """Return the decoded matrix as float32, in the shape of the tensor."""
        s = self._storage
        out = np.empty((s.rows, s.cols), np.float32)
        _core.dequantize(s.parts(), out, _threads.get_num_threads())
        return self._orient(out)

    def pack(self, *, keep: bool = True) -> QTensor:
        """Rearrange the codes for this machine's kernels now rather than in the first product.

        Parameters
        ----------
        keep : bool, optional
            Keep the portable arrays beside the rearranged ones. False drops them, which about
            halves the memory; whatever needs them later (saving, slicing, :meth:`codes`,
            comparing) restores them bit for bit, each time it is asked.

        Returns
        -------
        QTensor
            The tensor itself.
        """
        self._storage.pack(_threads.get_num_threads())
        if not keep:
            self._storage.drop()
        return self

    def to(self, device: str) -> QTensor:
        """Return the tensor on a device.

        Parameters
        ----------
        device : str
            ``"cpu"``, ``"cuda"`` (the current device) or ``"cuda:<n>"``. On a device, products
            take CuPy arrays; :meth:`codes`, :attr:`scales` and :meth:`dequantize` still give NumPy
            arrays, from the portable bytes that stay on the host.

        Returns
        -------
        QTensor
            The tensor itself where it is there already.

        Raises
        ------
        ImportError, RuntimeError
            For a CUDA device, where CuPy or CUDA is missing.
        ValueError
            For any other name.
        """
        s = self._storage
        if device == s.device:
            return self
        if device == "cpu":
            arrays = s.codes, s.scales, s.zeros
            host = _Storage(s.format, s.rows, s.cols, *arrays, s.bounds, s.tensor)
            return QTensor._wrap(host, self._transposed)
        if isinstance(device, str) and device.split(":")[0] == "cuda":
            from . import cuda

            return QTensor._wrap(cuda.place(s, device), self._transposed)
        raise ValueError(f"unknown device {device!r}: expected 'cpu' or 'cuda:<n>'")

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        s = self._storage
        packed = "no" if s.packed is None else s.packed.isa
        return (
            f"QTensor({s.format}, shape={self.shape}, {_size(self.nbytes)}, "
            f"device={self.device}, packed={packed})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QTensor):
            return False
        a, b = self._storage, other._storage
        if self.shape != other.shape or self._transposed != other._transposed:
            return False
        if a is b:
            return True
        return (a.format, a.tensor) == (b.format, b.tensor) and all(
            _same_bytes(p, q) for p, q in zip(a.arrays(), b.arrays(), strict=True)
        )

    def __getitem__(self, key: Any) -> QTensor:
        row, col = _split_key(key)
        if self._transposed:
            row, col = col, row
        s = self._storage
        arrays: list[NDArray[Any] | None] = [s.codes, s.scales, s.zeros, s.bounds]
        rows, cols = s.rows, s.cols
        if not _is_all(row, rows):
            index = _row_index(row, rows)
            arrays = [None if a is None else a[index] for a in arrays]
            assert arrays[0] is not None
            rows = len(arrays[0])
        if not _is_all(col, cols):
            start, stop = _group_range(s.format, col, cols)
            bits, group = s.format.bits, s.format.group or max(cols, 1)
            span = slice(start * bits // 8, (stop * bits + 7) // 8)
            groups = slice(start // group, -(-stop // group))
            arrays = [
                None if a is None else a[:, span if i == 0 else groups]
                for i, a in enumerate(arrays)
            ]
            cols = stop - start
        codes, scales, zeros, bounds = arrays
        assert codes is not None
        assert scales is not None
        part = _Storage(s.format, rows, cols, codes, scales, zeros, bounds, s.tensor)
        return QTensor._wrap(s.like(part), self._transposed)

    def __reduce__(self) -> tuple[Any, ...]:
        s = self._storage
        state = (str(s.format), s.rows, s.cols, s.codes, s.scales, s.zeros, s.bounds)
        return _rebuild, (*state, self._transposed, s.tensor)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(
                "a QTensor has no array to share: np.asarray must decode it into a new one"
            )
        a = self.dequantize()
        return a if dtype is None else a.astype(dtype, copy=False)

    def __matmul__(self, other: Any) -> Any:
        if _defers(other):
            return NotImplemented
        from ._api import matmul

        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        from ._api import matmul

        return matmul(other, self)

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> NoReturn:
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"numpy.{name} does not take a QTensor: use x @ q (or nibblas.matmul) for products, "
            f"or q.dequantize() for a dense array"
        )


_new: Callable[[type[QTensor]], QTensor] = object.__new__


def _array_ufunc(self: QTensor, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    if ufunc is np.matmul and method == "__call__":
        if not kwargs:
            x, q = inputs
            if type(q) is QTensor and q._transposed:
                packed = q._storage.packed
                if packed is not None:
                    y = _core.matmul_plain(x, packed, _threads.get_num_threads())
                    if y is not None:
                        return y
        from ._api import ufunc_matmul

        return ufunc_matmul(*inputs, **kwargs)
    return NotImplemented


# Attached late so that type checkers see neither an override nor a plain method.
QTensor.__array_ufunc__ = _ArrayUfunc(_array_ufunc)  # type: ignore[attr-defined]


def _rebuild(
    format: str,
    rows: int,
    cols: int,
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    bounds: NDArray[np.float32] | None,
    transposed: bool = False,
    tensor_scale: float = 1.0,
) -> QTensor:
    """Build a tensor from the arrays of its portable layout, checked (pickles and files)."""
    rows, cols = _length(rows), _length(cols)
    tensor = _tensor_scale(tensor_scale)
    storage = _Storage(Format(format), rows, cols, codes, scales, zeros, bounds, tensor)
    _core.check(storage.parts())
    return QTensor._wrap(storage, transposed)


def _defers(other: Any) -> bool:
    """Whether ``q @ other`` is the other operand's business."""
    if isinstance(other, (QTensor, np.ndarray, list, tuple)) or np.isscalar(other):
        return False
    kind = type(other)
    if hasattr(kind, "__array__") or hasattr(kind, "__dlpack__"):
        return False
    return hasattr(kind, "__rmatmul__")


def _same_bytes(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(a.view(np.uint8), b.view(np.uint8)) if a.size else True


def _size(n: int) -> str:
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _pair(shape: Any) -> tuple[Any, Any]:
    try:
        rows, cols = shape
    except (TypeError, ValueError):
        raise ValueError(f"shape must be (N, K), got {shape!r}") from None
    return rows, cols


def _length(n: SupportsIndex) -> int:
    try:
        value = n.__index__()
    except AttributeError:
        raise TypeError(f"a shape holds integers, got {n!r}") from None
    if not 0 <= value <= sys.maxsize:
        raise ValueError(f"a shape holds lengths from 0 to {sys.maxsize}, got {value}")
    return value


def _per_group(name: str, a: NDArray[Any], rows: int, groups: int) -> NDArray[Any]:
    if a.shape == (rows,) and groups == 1:
        a = a[:, None]
    if a.shape != (rows, groups):
        raise ValueError(f"{name} must have shape {(rows, groups)}, got {a.shape}")
    return a


def _real(name: str, a: ArrayLike) -> NDArray[Any]:
    array = np.asarray(a)
    if array.dtype.kind in "Vf" and array.dtype.name in (
        "bfloat16",
        "float8_e8m0fnu",
        "float8_e4m3fn",
    ):
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array


def _scales(fmt: Format, scales: ArrayLike, rows: int, groups: int) -> NDArray[Any]:
    given = _per_group("scales", _real("scales", scales), rows, groups)
    with np.errstate(over="ignore", under="ignore"):
        wide = np.ascontiguousarray(given, np.float32)
        legal = np.isfinite(wide) | np.isnan(wide) if fmt.element.nan else np.isfinite(wide)
        if not legal.all():
            raise ValueError("scales must be finite")
        if fmt.scale == "e8m0":
            return _power_bytes(wide)
        if fmt.scale == "e4m3":
            return _e4m3_bytes(wide)
        if fmt.scale == "bf16":
            bits = _to_bf16_bits(wide)
            if ((bits & 0x7F80) == 0x7F80).any():
                raise ValueError("scales overflow bfloat16")
            return bits
        cast: NDArray[Any] = wide.astype(_SCALE_DTYPE[fmt.scale])
    if not np.isfinite(cast).all():
        raise ValueError(f"scales overflow {cast.dtype}; name a format with _sf32 or _sbf16")
    return cast


def _zeros(fmt: Format, zeros: ArrayLike | None, rows: int, groups: int) -> NDArray[Any] | None:
    if not fmt.has_zeros:
        if zeros is not None:
            raise ValueError(f"{fmt} has no zero points; use a uint format")
        return None
    if zeros is None:
        return np.zeros((rows, groups), np.uint8)
    given = _per_group("zeros", _real("zeros", zeros), rows, groups)
    if given.dtype.kind == "f":
        with np.errstate(over="ignore", under="ignore"):
            wide = np.ascontiguousarray(given, np.float32)
        if not np.isfinite(wide).all():
            raise ValueError("zeros must be finite")
        return wide
    if given.size and (int(given.min()) < 0 or int(given.max()) > 255):
        raise ValueError(f"integer zeros lie in [0, 255], got [{given.min()}, {given.max()}]")
    return given.astype(np.uint8)


def _split_key(key: Any) -> tuple[Any, Any]:
    parts = key if isinstance(key, tuple) else (key,)
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        rest = 2 - (len(parts) - 1)
        parts = parts[:at] + (slice(None),) * max(rest, 0) + parts[at + 1 :]
    if len(parts) > 2:
        raise IndexError(f"too many indices: a QTensor has 2 dimensions, got {len(parts)}")
    parts = parts + (slice(None),) * (2 - len(parts))
    return parts[0], parts[1]


def _is_all(key: Any, length: int) -> bool:
    return isinstance(key, slice) and key.indices(length) == (0, length, 1)


def _row_index(key: Any, rows: int) -> Any:
    if isinstance(key, slice):
        return key
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        i = int(key)
        if not -rows <= i < rows:
            raise IndexError(f"row {i} is out of bounds for {rows} rows")
        raise IndexError(f"a QTensor stays a matrix: use q[{i}:{i + 1 or None}] for row {i}")
    index = np.asarray(key) if isinstance(key, (list, np.ndarray)) else None
    if index is not None and index.size == 0 and index.ndim == 1 and isinstance(key, list):
        index = index.astype(np.intp)
    if index is None or index.ndim != 1 or index.dtype.kind not in "iub":
        raise IndexError("rows are picked by a slice or by a 1-D array of integers or booleans")
    return index


def _group_range(fmt: Format, key: Any, cols: int) -> tuple[int, int]:
    if not isinstance(key, slice):
        raise IndexError("columns (the quantised axis) are picked by a slice of whole groups")
    start, stop, step = key.indices(cols)
    stop = max(start, stop)
    if step != 1:
        raise IndexError(f"columns (the quantised axis) need a step of 1, got {step}")
    group = fmt.group or max(cols, 1)
    whole_group = start % group == 0 and (stop % group == 0 or stop == cols)
    if not whole_group:
        raise ValueError(
            f"columns {start}:{stop} cut a group: {fmt} with {cols} columns has groups of {group}; "
            f"slice at multiples of it, or dequantize() first"
        )
    if start * fmt.bits % 8 or (stop * fmt.bits % 8 and stop != cols):
        raise ValueError(f"columns {start}:{stop} of {fmt} do not begin and end on whole bytes")
    return start, stop
