"""L-Mul on a device, with the bits of the core."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import numpy as np

from ..approx import _DTYPES, SmallFloat, _model
from ._intops import _launch, device_of, import_array
from ._launch import kernel
from ._product import _kind_of, is_device_array

__all__ = ["lmul", "lmul_matmul"]

_TILE = 64


class _Layout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("bytes", "exponent", "mantissa", "specials")]

    @classmethod
    def of(cls, fmt: SmallFloat, width: int) -> _Layout:
        specials = ("none", "nan", "ieee").index(fmt.specials)
        return cls(width, fmt.exponent, fmt.mantissa, specials)


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        ("model", ctypes.c_uint32 * 4),
        ("source", _Layout),
        ("to", _Layout),
        ("kind", ctypes.c_int),
        ("flag", ctypes.c_void_p),
    ]


class _Operand(NamedTuple):
    array: Any
    layout: _Layout
    dtype: Any
    name: str


_FLOAT32 = SmallFloat(8, 23, "ieee")


def _operand(x: Any, format: str | None, cupy: Any) -> _Operand:
    a = import_array(x)
    if format is None:
        name = _DTYPES.get(a.dtype.name)
        if name is None:
            known = ", ".join(_DTYPES)
            raise TypeError(f"arrays of {a.dtype} need format=; without it: {known}")
        layout = _Layout.of(SmallFloat.parse(name), a.dtype.itemsize)
        return _Operand(a, layout, a.dtype, name)
    fmt = SmallFloat.parse(format)
    if a.dtype.kind == "u":
        bits = 1 + fmt.exponent + fmt.mantissa
        if a.dtype.itemsize * 8 < bits:
            raise TypeError(f"{a.dtype} is too short for the bits of {format}")
        if a.dtype.itemsize == 8:
            raise TypeError("bit patterns are of at most 32 bits, got uint64")
        if a.dtype.itemsize * 8 > bits and a.size and int(a.max()) >> bits:
            raise ValueError(f"bit patterns of {bits} bits, got {int(a.max())}")
        return _Operand(a, _Layout.of(fmt, a.dtype.itemsize), a.dtype, format)
    kind = _kind_of(a.dtype)
    if kind is None or kind > 3:
        raise TypeError(f"expected floats, or unsigned integers as bit patterns, got {a.dtype}")
    y = cupy.empty(a.shape, np.float32)
    if a.size:
        a = cupy.ascontiguousarray(a)
        flag = cupy.zeros(1, np.int32)
        args = _Args(a.data.ptr, None, y.data.ptr, 0, a.size, 0)
        args.model = (ctypes.c_uint32 * 4)(*_model(fmt, format, None, "saturate"))
        args.to, args.kind, args.flag = _Layout.of(fmt, 4), kind, flag.data.ptr
        _launch(a, "arithmetic.cu", "round_numbers", -(-a.size // 256), 256, args)
        if fmt.specials != "ieee":
            found = int(flag[0])
            if found & 1:
                raise ValueError("the format has no infinity")
            if found & 2 and fmt.specials == "none":
                raise ValueError("the format has no NaN")
    return _Operand(y, _Layout.of(_FLOAT32, 4), np.dtype(np.float32), format)


def _pair(a: Any, b: Any, format: str | None, cupy: Any) -> tuple[_Operand, _Operand]:
    if not (is_device_array(a) and is_device_array(b)):
        raise TypeError("both operands must lie on a device: one is on the host")
    if not isinstance(format, str | None):
        raise TypeError(f"format must be a string, got {type(format).__name__}")
    x, y = _operand(a, format, cupy), _operand(b, format, cupy)
    if x.dtype != y.dtype:
        raise TypeError(f"operands differ in type: {x.dtype} and {y.dtype}")
    if x.array.device.id != y.array.device.id:
        raise ValueError("operands lie on different devices")
    return x, y


def _args(x: Any, y: Any, out: Any, operand: _Operand, offset: Any, overflow: str) -> _Args:
    numbers = _model(SmallFloat.parse(operand.name), operand.name, offset, overflow)
    args = _Args(x.data.ptr, y.data.ptr, out.data.ptr)
    args.model = (ctypes.c_uint32 * 4)(*numbers)
    args.source = args.to = operand.layout
    return args


def lmul(a: Any, b: Any, format: str | None, offset: Any, overflow: str) -> Any:
    """Multiply arrays of a device; see :func:`nibblas.approx.lmul`."""
    import cupy

    with device_of(a if is_device_array(a) else b):
        x, y = _pair(a, b, format, cupy)
        left, right = cupy.broadcast_arrays(x.array, y.array)
        left, right = cupy.ascontiguousarray(left), cupy.ascontiguousarray(right)
        shape = np.broadcast_shapes(x.array.shape, y.array.shape)
        out = cupy.empty(shape, x.dtype)
        args = _args(left, right, out, x, offset, overflow)
        args.n = out.size
        if out.size:
            _launch(out, "arithmetic.cu", "lmul", -(-out.size // 256), 256, args)
        return out


def lmul_matmul(a: Any, b: Any, format: str | None, offset: Any, overflow: str) -> Any:
    """Multiply matrices of a device; see :func:`nibblas.approx.lmul_matmul`."""
    import cupy

    with device_of(a if is_device_array(a) else b):
        x, y = _pair(a, b, format, cupy)
        if y.array.ndim != 2:
            raise ValueError(f"b must have two dimensions, got shape {y.array.shape}")
        if x.array.ndim == 0:
            raise ValueError("activations need at least one dimension")
        k, n = y.array.shape
        if x.array.shape[-1] != k:
            raise ValueError(f"shapes {x.array.shape} and {y.array.shape} do not fit")
        lead = x.array.shape[:-1]
        m = math.prod(lead)
        out = cupy.zeros((*lead, n), np.float32)
        left, right = cupy.ascontiguousarray(x.array), cupy.ascontiguousarray(y.array)
        args = _args(left, right, out, x, offset, overflow)
        args.m, args.n, args.k = m, n, k
        if out.size and k:
            device, stream = int(out.device.id), int(cupy.cuda.get_current_stream().ptr)
            if -(-m // _TILE) > 65535:
                raise ValueError(f"{m} rows are too many for a device: split them")
            grid = (-(-n // _TILE), -(-m // _TILE))
            kernel(device, "arithmetic.cu", "lmul_matmul").launch(grid, 256, 0, stream, args)
        return out
