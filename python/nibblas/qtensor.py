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
    from collections.abc import Callable, Mapping

__all__ = ["QTensor"]

_Parts: TypeAlias = tuple[str, int, int, dict[str, NDArray[Any]]]
_Key: TypeAlias = slice | EllipsisType | NDArray[Any] | list[int]

_PART_DTYPE: dict[str, type] = {
    "u8": np.uint8,
    "f16": np.float16,
    "bf16": np.uint16,
    "f32": np.float32,
}
_ORDER = _core.part_names()
# The arrays that have parameters of their own in from_parts.
_OWN = ("codes", "scales", "zeros")
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

    Once packed, those that the panels hold too may be dropped: the panels give the same bits back.
    """

    __slots__ = (
        "_arrays",
        "_columns",
        "_dropped",
        "_turned",
        "bounds",
        "cols",
        "copies",
        "device",
        "format",
        "nbytes",
        "packed",
        "rows",
    )

    def __init__(
        self,
        format: Format,
        rows: int,
        cols: int,
        arrays: Mapping[str, NDArray[Any]],
        bounds: NDArray[np.float32] | None = None,
    ) -> None:
        self.format = format
        self.rows = rows
        self.cols = cols
        self._arrays = {name: _freeze(a) for name, a in arrays.items()}
        self._dropped: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._turned: _Storage | None = None
        self.nbytes = sum(a.nbytes for a in self._arrays.values())
        self.bounds = None if bounds is None else _freeze(bounds)
        self.packed: _core.Packed | None = None
        self._columns: _core.Columns | None = None
        self.device = "cpu"
        # Panels on CUDA devices that met this tensor, by the device's number.
        self.copies: dict[int, Any] = {}

    def like(self, part: _Storage) -> _Storage:
        """Return a part of the matrix where the matrix is."""
        return part

    def array(self, name: str) -> NDArray[Any] | None:
        """Return an array of the portable layout, None where the format has none of that name."""
        kind = self._dropped.get(name)
        if kind is None:
            return self._arrays.get(name)
        assert self.packed is not None
        out = np.empty(*kind)
        self.packed.restore(name, out, _threads.get_num_threads())
        return _freeze(out)

    def _present(self, name: str) -> NDArray[Any]:
        a = self.array(name)
        assert a is not None
        return a

    @property
    def codes(self) -> NDArray[np.uint8]:
        return self._present("codes")

    @property
    def scales(self) -> NDArray[Any]:
        return self._present("scales")

    @property
    def zeros(self) -> NDArray[Any] | None:
        return self.array("zeros")

    @property
    def tensor(self) -> float:
        a = self.array("tensor_scale")
        return 1.0 if a is None else float(a[0])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the portable layout by name, in the order of the format."""
        names = self._dropped.keys() | self._arrays.keys()
        return {name: self._present(name) for name in _ORDER if name in names}

    def turned(self) -> _Storage:
        """Return the transposed matrix, of a format whose groups all have one scale."""
        if self._turned is None:
            fmt = self.format
            if fmt.element.name in ("f32", "f16", "bf16"):
                size = fmt.bits // 8
                numbers = self.codes.reshape(self.rows, self.cols, size)
                codes = numbers.swapaxes(0, 1).reshape(self.cols, self.rows * size)
            else:
                wide = np.empty((self.rows, self.cols), np.int16)
                _core.decode_codes(self.parts(), wide, _threads.get_num_threads())
                codes = np.zeros((self.cols, fmt.row_bytes(self.rows)), np.uint8)
                _core.encode(fmt, np.ascontiguousarray(wide.T), codes)
            scale = np.ones((self.cols, fmt.groups(self.rows)), self.scales.dtype)
            if self.scales.size:
                scale[:] = self.scales.flat[0]
            arrays = {"codes": codes, "scales": scale}
            self._turned = _Storage(self.format, self.cols, self.rows, arrays)
        return self._turned

    def parts(self) -> _Parts:
        return self.format, self.rows, self.cols, self.arrays()

    def drop(self) -> None:
        """Let go of the portable arrays that the panels can restore."""
        assert self.packed is not None
        for name in ("codes", "scales", "zeros", "mask"):
            a = self._arrays.pop(name, None)
            if a is not None:
                self._dropped[name] = a.shape, a.dtype

    def pack(self, threads: int) -> _core.Packed:
        packed = self.packed
        if packed is None:
            with _pack_lock:
                packed = self.packed
                if packed is None:
                    _tell_isa()
                    packed = self.packed = _core.pack(self.parts(), threads)
        return packed

    def columns(self, threads: int) -> _core.Columns:
        """Return the weight by columns."""
        columns = self._columns
        if columns is None:
            with _pack_lock:
                columns = self._columns
                if columns is None:
                    columns = self._columns = _core.Columns(self.parts(), threads)
        return columns

    def dense(self) -> _Storage:
        """Return the same matrix with all entries kept."""
        if self.format.structure is None:
            return self
        fmt = self.format.dense
        arrays = {n: a for n, a in self.arrays().items() if n != "mask"}
        codes = _core.sparse_unpack(self.parts())
        arrays["codes"] = codes.reshape(self.rows, -1) if codes.size else _no_codes(fmt, self)
        return _Storage(fmt, self.rows, self.cols, arrays, self.bounds)

    def sparse(self, fmt: Format) -> _Storage:
        """Return the same matrix with the kept entries alone."""
        codes, mask = _core.sparse_pack(self.parts(), fmt)
        shape = next(p.shape for p in fmt.parts(self.rows, self.cols) if p.name == "mask")
        arrays = {**self.arrays(), "codes": codes, "mask": mask.reshape(shape)}
        return _Storage(fmt, self.rows, self.cols, arrays, self.bounds)


def _numbers(s: _Storage) -> NDArray[Any]:
    """Return numbers that are not quantised; bfloat16 as float32 without ml_dtypes."""
    name = s.format.element.name
    if name != "bf16":
        return _freeze(s.codes.view({"f32": "<f4", "f16": "<f2"}[name]))
    bits = s.codes.view("<u2")
    bf16 = _small_dtype("bfloat16")
    if bf16 is not None:
        return _freeze(bits.view(bf16))
    return _freeze((bits.astype(np.uint32) << 16).view(np.float32))


def _plain(
    fmt: Format,
    values: NDArray[Any],
    scales: ArrayLike,
    zeros: ArrayLike | None,
    shape: tuple[int, int] | None,
    further: dict[str, Any],
) -> QTensor:
    """Build a tensor of numbers that are not quantised."""
    from ._api import quantize

    if zeros is not None or further:
        raise ValueError(f"{fmt} has neither zero points nor further arrays")
    if not (np.asarray(scales) == 1).all():
        raise ValueError(f"the scales of {fmt} are 1")
    return quantize(values if shape is None else values.reshape(_pair(shape)), fmt)


def _no_codes(fmt: Format, s: _Storage) -> NDArray[np.uint8]:
    return np.zeros((s.rows, fmt.row_bytes(s.cols)), np.uint8)


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
        **further: ArrayLike,
    ) -> QTensor:
        """Build a tensor from somebody else's codes.

        Parameters
        ----------
        format : str
            Format name.
        codes : array_like of int
            Code values, shape (N, K): ``q`` for int, ``u`` for uint, odd integers for bipolar,
            -1, 0 and 1 for ternary. What :meth:`codes` returns. Of sparse formats those of all
            entries; of formats that are not quantised (``f32``) the numbers.
        scales : array_like
            Shape (N, groups), or (N,) where there is one group per row; rounded to the format's
            scale type.
        zeros : array_like, optional
            Zero points in the same shape, for formats that have them: integers, or floats as some
            checkpoints have. 0 by default.
        shape : tuple of int, optional
            (N, K), where ``codes`` is flat; otherwise it must agree with ``codes``.
        **further : array_like
            The format's further arrays by name, see :attr:`parts`: ``tensor_scale``, what
            multiplies every scale, or ``row_scales``, what multiplies those of each row (ones by
            default).

        Returns
        -------
        QTensor

        Raises
        ------
        ValueError
            If a shape does not fit, a code is out of range, a scale or zero point is not finite, or
            the format has no such array.
        TypeError
            If codes are not integers, or no format has an array of such a name.
        """
        target = Format(format)
        fmt = target.dense
        values = np.asarray(codes)
        if fmt.is_plain:
            return _plain(target, values, scales, zeros, shape, further)
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
        arrays = {
            "codes": np.zeros((rows, fmt.row_bytes(cols)), np.uint8),
            "scales": _scales(fmt, scales, rows, groups),
        }
        _core.encode(fmt, np.ascontiguousarray(values, np.int16), arrays["codes"])
        zero = _zeros(fmt, zeros, rows, groups)
        if zero is not None:
            arrays["zeros"] = zero
        storage = _Storage(fmt, rows, cols, arrays | _further(fmt, rows, cols, further))
        _core.check(storage.parts())
        if target.structure is not None:
            storage = storage.sparse(target)
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
    def row_scales(self) -> NDArray[np.float32] | None:
        """What multiplies the scales of each row, shape (N,); None but in two-level formats."""
        return self._storage.array("row_scales")

    @property
    def parts(self) -> dict[str, NDArray[Any]]:
        """The arrays of the portable layout by name, read-only, for (N, K) whatever ``.T`` says.

        Codes as packed bytes, scales in their stored type; the rest, and each shape, are what
        ``format.parts(N, K)`` lists. This is what files hold.
        """
        return self._storage.arrays()

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
            :meth:`from_parts` takes. Entries that a sparse format dropped have the code of 0.
        """
        s = self._storage
        element = s.format.element
        if s.format.is_plain:
            return self._orient(_numbers(s.dense()))
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
            host = _Storage(s.format, s.rows, s.cols, s.arrays(), s.bounds)
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
        if a.format != b.format:
            return False
        mine, theirs = a.arrays(), b.arrays()
        return all(_same_bytes(p, theirs[name]) for name, p in mine.items())

    def __getitem__(self, key: Any) -> QTensor:
        row, col = _split_key(key)
        if self._transposed:
            row, col = col, row
        s = self._storage
        if s.format.structure is not None:
            part = QTensor._wrap(s.dense(), self._transposed)[key]._storage
            return QTensor._wrap(s.like(part.sparse(s.format)), self._transposed)
        along = {p.name: p.along for p in s.format.parts(s.rows, s.cols)}
        arrays, bounds = s.arrays(), s.bounds
        rows, cols = s.rows, s.cols
        if not _is_all(row, rows):
            index = _row_index(row, rows)
            arrays = {n: a if along[n] == "whole" else a[index] for n, a in arrays.items()}
            bounds = None if bounds is None else bounds[index]
            rows = len(arrays["codes"])
        if not _is_all(col, cols):
            start, stop = _group_range(s.format, col, cols)
            bits, group = s.format.bits, s.format.group or max(cols, 1)
            span = slice(start * bits // 8, (stop * bits + 7) // 8)
            groups = slice(start // group, -(-stop // group))
            cut = {"codes": span, "groups": groups}
            arrays = {n: a[:, cut[along[n]]] if along[n] in cut else a for n, a in arrays.items()}
            bounds = None if bounds is None else bounds[:, groups]
            cols = stop - start
        part = _Storage(s.format, rows, cols, arrays, bounds)
        return QTensor._wrap(s.like(part), self._transposed)

    def __reduce__(self) -> tuple[Any, ...]:
        s = self._storage
        state = (str(s.format), s.rows, s.cols, s.arrays(), s.bounds, self._transposed)
        return _rebuild, state

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
    arrays: dict[str, NDArray[Any]],
    bounds: NDArray[np.float32] | None,
    transposed: bool = False,
) -> QTensor:
    """Build a tensor from the arrays of its portable layout, checked (pickles and files)."""
    rows, cols = _length(rows), _length(cols)
    fmt = Format(format)
    parts = {p.name: p for p in fmt.parts(rows, cols)}
    if parts.keys() != arrays.keys():
        raise ValueError(f"{fmt} has the arrays {', '.join(parts)}, got {', '.join(arrays)}")
    for name, part in parts.items():
        a = np.asarray(arrays[name])
        if not part.fits(a.shape) or a.dtype not in [_PART_DTYPE[t] for t in part.types]:
            raise ValueError(
                f"{name} of a {fmt} matrix must be {' or '.join(part.types)} of shape "
                f"{part.shape}, got {a.dtype} of shape {a.shape}"
            )
    storage = _Storage(fmt, rows, cols, arrays, bounds)
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


def _same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
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
        if fmt.scale == "i8":
            if not ((wide >= 1) & (wide <= 127) & (wide == np.rint(wide))).all():
                raise ValueError(f"scales of {fmt} are integers from 1 to 127")
            return wide.astype(np.uint8)
        if fmt.scale == "bf16":
            bits = _to_bf16_bits(wide)
            if ((bits & 0x7F80) == 0x7F80).any():
                raise ValueError("scales overflow bfloat16")
            return bits
        cast: NDArray[Any] = wide.astype(_PART_DTYPE[fmt.scale])
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


def _further(fmt: Format, rows: int, cols: int, given: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a format beyond codes, scales and zeros, ones where none is given."""
    out: dict[str, NDArray[Any]] = {}
    for part in fmt.parts(rows, cols):
        if part.name in _OWN:
            continue
        value = given.pop(part.name, None)
        dtype = _PART_DTYPE[part.types[0]]
        if value is None:
            out[part.name] = np.ones(part.shape, dtype)
            continue
        a = _real(part.name, value)
        if a.size != math.prod(part.shape):
            raise ValueError(f"{part.name} must have shape {part.shape}, got {a.shape}")
        with np.errstate(over="ignore", under="ignore"):
            out[part.name] = a.reshape(part.shape).astype(dtype)
    for name in given:
        if name in _core.part_names():
            raise ValueError(f"{fmt} has no {name}")
        raise TypeError(f"from_parts() got an unexpected keyword argument {name!r}")
    return out


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
