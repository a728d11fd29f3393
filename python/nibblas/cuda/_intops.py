"""Integer operators on a device: the functions of the core that :mod:`nibblas.intops` calls.

Each takes CuPy arrays of one dimension where the core's takes NumPy's, and gives the same bits.
`threads` and `isa` are the core's.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._api import _check_inner
from ..qtensor import QTensor
from . import _fixed as fixed
from ._launch import device_properties, kernel
from ._product import _captured, _export, _import, _scratch

__all__ = [
    "device_of",
    "export_arrays",
    "import_array",
    "int_product",
    "int_shifts",
    "ops_add",
    "ops_apply",
    "ops_compat",
    "ops_norm",
    "ops_norm_codes",
    "ops_requantize",
    "ops_softmax",
    "ops_sqrt",
]

_KINDS = {np.dtype(t): i for i, t in enumerate((np.int8, np.uint8, np.int16, np.uint16, np.int32))}
_THREADS = 256
# Values of a row that wait in shared memory, past which rows are read again.
_KEPT = 1 << 14


class _Io(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("x_kind", "y_kind", "lo", "hi", "four")),
    ]


class _Factor(ctypes.Structure):
    _fields_ = [("multiplier", ctypes.c_int), ("shift", ctypes.c_int)]


class _Rescale(ctypes.Structure):
    _fields_ = [
        ("io", _Io),
        ("factors", ctypes.c_void_p),
        ("same", _Factor),
        *((name, ctypes.c_uint64) for name in ("by_inner", "by_channels", "channels")),
        ("zero", ctypes.c_int),
    ]


class _RescaleFloat(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "factors")),
        ("n", ctypes.c_int64),
        ("inner", ctypes.c_uint64),
        ("channels", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("x_kind", "y_kind", "lo", "hi", "zero")),
    ]


class _Add(ctypes.Structure):
    _fields_ = [
        ("io", _Io),
        ("b", ctypes.c_void_p),
        ("ra", fixed.Ratio),
        ("rb", fixed.Ratio),
        ("b_kind", ctypes.c_int),
        ("each", ctypes.c_int),
    ]


class _Bend(ctypes.Structure):
    _fields_ = [
        ("io", _Io),
        ("reach", fixed.Reach),
        ("place", fixed.Reach),
        ("unit", fixed.Ratio),
        ("whole", fixed.Ratio),
        ("brief", fixed.Short),
        ("pieces", fixed.Pieces),
    ]


class _Roots(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int64)]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("cols", "x_kind", "y_kind", "lo", "hi", "four")),
        ("kept", ctypes.c_int),
    ]


class _Softmax(ctypes.Structure):
    _fields_ = [("io", _Rows), ("reach", fixed.Reach), ("digits", ctypes.c_int)]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("io", _Rows),
        ("shape", fixed.Shape),
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("shift", ctypes.c_int),
    ]


class _Codes(ctypes.Structure):
    _fields_ = [
        ("io", _Rows),
        ("shape", fixed.Shape),
        ("gain", ctypes.c_void_p),
        ("shift", ctypes.c_int),
        ("scales", ctypes.c_void_p),
    ]


class _Published(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "bias", "flag")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("cols", "x_kind", "function", "family")),
        *((name, ctypes.c_int64) for name in ("q0", "qb", "qc", "n")),
    ]


def device_of(x: Any) -> Any:
    """Return the context in which the device of an array is the current one."""
    import cupy

    return cupy.cuda.Device(int(import_array(x).device.id))


def export_arrays(result: Any, like: Any) -> Any:
    """Return CuPy arrays, alone or in a tuple, as arrays of the library of `like`."""
    import cupy

    if isinstance(like, cupy.ndarray):
        return result
    if isinstance(result, tuple):
        return tuple(export_arrays(r, like) for r in result)
    return _export(result, like, cupy) if isinstance(result, cupy.ndarray) else result


def import_array(x: Any) -> Any:
    """Return somebody's array on a device as a CuPy array, without a copy."""
    import cupy

    return _import(x, cupy)


@functools.lru_cache(1024)
def _upload(device: int, stream: int, data: bytes) -> Any:
    import cupy

    return cupy.asarray(np.frombuffer(data, np.uint8))


def _held(x: Any, values: NDArray[Any] | None) -> int | None:
    """Return the address of parameters on the device of `x`, sent there once."""
    if values is None:
        return None
    stream = _stream()
    there = _upload(int(x.device.id), stream, values.tobytes())
    if stream:
        _for_good(there, stream)
    return int(there.data.ptr)


def _for_good(a: Any, stream: int) -> None:
    """Keep an array whose address a graph is about to hold."""
    import cupy

    if cupy.cuda.runtime.streamIsCapturing(stream):
        _captured.append(a)


def _stream() -> int:
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)


def _launch(x: Any, source: str, name: str, blocks: int, threads: int, args: Any) -> None:
    device = int(x.device.id)
    most = 16 * device_properties(device)[0]
    kernel(device, source, name).launch((min(blocks, most), 1), threads, 0, _stream(), args)


def _aligned(*arrays: Any) -> bool:
    return all(a.data.ptr % (4 * a.itemsize) == 0 for a in arrays)


def _limits(y: Any) -> tuple[int, int]:
    info = np.iinfo(y.dtype)
    return int(info.min), int(info.max)


def _io(x: Any, y: Any, *more: Any) -> _Io:
    four = int(_aligned(x, y, *more))
    return _Io(x.data.ptr, y.data.ptr, x.size, _KINDS[x.dtype], _KINDS[y.dtype], *_limits(y), four)


def _each(x: Any, name: str, args: Any) -> None:
    if x.size:
        _launch(x, "intops.cu", name, -(-x.size // (4 * _THREADS)), _THREADS, args)


def _rows(x: Any, y: Any, cols: int) -> _Rows:
    if cols >= 2**31:
        raise ValueError(f"rows of {cols} values are too long for a device")
    four = int(cols % 4 == 0 and _aligned(x, y))
    return _Rows(
        x.data.ptr, y.data.ptr, x.size // max(cols, 1), cols,
        _KINDS[x.dtype], _KINDS[y.dtype], *_limits(y), four,
    )  # fmt: skip


def _each_row(x: Any, name: str, args: Any) -> None:
    if x.size == 0:
        return
    cols = args.io.cols
    args.io.kept = int(cols <= _KEPT)
    room = -(-cols // 4) * 16 if args.io.kept else 0
    threads = min(_THREADS, -(-cols // 128) * 32)
    grid = (min(args.io.rows, 2**31 - 1), 1)
    function = kernel(int(x.device.id), "intops_rows.cu", name)
    function.launch(grid, threads, room, _stream(), args)


def _magic(divisor: int) -> int:
    return -(-(2**64) // divisor) if divisor > 1 else 0


def ops_requantize(
    x: Any,
    y: Any,
    multipliers: list[int],
    shifts: list[int],
    inner: int,
    zero: int,
    rounding: str,
    threads: int,
    isa: str | None,
) -> None:
    for s in shifts:
        if not -31 <= s <= 31:
            raise ValueError(f"shift must lie in -31..=31, got {s}")
    channels = len(multipliers)
    if x.size == 0:
        return
    if x.size * max(inner, channels) >= 2**64:
        raise ValueError("acc is too large to count its channels")
    if rounding == "float":
        factors = np.ldexp(np.array(multipliers, np.float64), -31 - np.array(shifts)).astype(
            np.float32
        )
        lo, hi = _limits(y)
        f = _RescaleFloat(
            x.data.ptr, y.data.ptr, _held(x, factors), x.size, inner, channels,
            _KINDS[x.dtype], _KINDS[y.dtype], lo, hi, zero,
        )  # fmt: skip
        _launch(x, "intops_float.cu", "requantize_float", -(-x.size // _THREADS), _THREADS, f)
        return
    a = _Rescale(_io(x, y))
    a.zero, a.channels = zero, channels
    if channels == 1:
        a.same = _Factor(multipliers[0], shifts[0])
    else:
        a.factors = _held(x, np.array([multipliers, shifts], np.int32).T)
        a.by_inner, a.by_channels = _magic(inner), _magic(channels)
    _each(x, f"requantize_{rounding}", a)


def ops_add(
    a: Any,
    a_scale: float,
    b: Any,
    b_scale: float,
    out_scale: float,
    each: bool,
    y: Any,
    threads: int,
    isa: str | None,
) -> None:
    out = fixed.positive("out_scale", out_scale)
    ra, rb = (
        fixed.ratio(name, fixed.positive(name, s) / out, 16)
        for name, s in (("a_scale", a_scale), ("b_scale", b_scale))
    )
    _each(a, "add", _Add(_io(a, y, b), b.data.ptr, ra, rb, _KINDS[b.dtype], int(each)))


def ops_apply(
    function: str,
    x: Any,
    scale: float,
    out_scale: float,
    y: Any,
    threads: int,
    isa: str | None,
) -> None:
    s, out = fixed.positive("scale", scale), fixed.positive("out_scale", out_scale)
    name = f"apply_{function}"
    a = _Bend(_io(x, y))
    a.unit = fixed.ratio("1 / out_scale", 1.0 / out * 2.0**-30, 16)
    a.reach = fixed.reach(s / fixed.LN_2, fixed.EXPONENT)
    if function == "silu":
        a.place = fixed.reach(s, 23)
        a.whole = fixed.ratio("scale / out_scale", s / out, 16)
    if function == "gelu":
        digits = 8 * y.itemsize - (y.dtype.kind == "i")
        brief = fixed.short(s, out, digits)
        if brief is not None:
            name, a.brief = "apply_gelu_short", brief
        else:
            a.pieces = fixed.pieces(s, out)
            if s == out:
                name = "apply_gelu_direct"
            else:
                a.whole = fixed.ratio("scale / out_scale", s / out, 16)
    _each(x, name, a)


def ops_softmax(x: Any, y: Any, cols: int, scale: float, threads: int, isa: str | None) -> None:
    reach = fixed.reach(fixed.positive("scale", scale) / fixed.LN_2, fixed.EXPONENT)
    a = _Softmax(_rows(x, y, cols), reach, 8 * y.itemsize - (y.dtype.kind == "i"))
    _each_row(x, "softmax", a)


@functools.lru_cache(1024)
def _affine(
    weight: bytes, bias: bytes | None, out: float, fraction: int
) -> tuple[NDArray[np.int32], NDArray[np.int64] | None, int]:
    w, b = np.frombuffer(weight, np.float32), None
    if bias is not None:
        b = np.frombuffer(bias, np.float32)
    gain, added, shift = fixed.affine(w, b, out, fraction)
    # Whole runs of four, and the half step that rounds.
    gain = np.pad(gain, (0, -len(gain) % 4))
    if added is not None:
        added = np.pad(added + (1 << (shift - 1)), (0, -len(added) % 4))
    return gain, added, shift


def ops_norm(
    x: Any,
    y: Any,
    centre: bool,
    scale: float,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    eps: float,
    out_scale: float,
    threads: int,
    isa: str | None,
) -> None:
    shape = fixed.shape(weight.size, centre, scale, eps)
    out = fixed.positive("out_scale", out_scale)
    late = None if bias is None else bias.tobytes()
    gain, added, shift = _affine(weight.tobytes(), late, out, shape.fraction)
    a = _Norm(_rows(x, y, weight.size), shape, _held(x, gain), _held(x, added), shift)
    _each_row(x, "norm_rows", a)


def ops_norm_codes(
    x: Any,
    y: Any,
    scales: Any,
    scale: float,
    weight: NDArray[np.float32],
    eps: float,
    threads: int,
    isa: str | None,
) -> None:
    shape = fixed.shape(weight.size, False, scale, eps)
    gain, _, shift = _affine(weight.tobytes(), None, 1.0, 0)
    a = _Codes(_rows(x, y, weight.size), shape, _held(x, gain), shift, scales.data.ptr)
    _each_row(x, "norm_codes", a)


def ops_sqrt(x: Any, y: Any, ivit: bool, threads: int, isa: str | None) -> None:
    if x.size == 0:
        return
    blocks = -(-x.size // _THREADS)
    if ivit:
        a = _Published(x.data.ptr, y.data.ptr, None, None, x.size)
        a.function = 4
        _launch(x, "intops_published.cu", "published_each", blocks, _THREADS, a)
        return
    name = "sqrt64" if x.itemsize == 8 else "sqrt32"
    _launch(x, "intops.cu", name, blocks, _THREADS, _Roots(x.data.ptr, y.data.ptr, x.size))


def ops_compat(
    function: str,
    family: str,
    x: Any,
    cols: int,
    scale: float,
    bias: NDArray[np.int64] | None,
    y: Any,
    threads: int,
) -> None:
    import cupy

    numbers = fixed.published(function, family, scale)
    if x.size == 0:
        return
    a = _Published(x.data.ptr, y.data.ptr, _held(x, bias))
    a.function = ("exp", "softmax", "gelu", "layernorm").index(function)
    a.family, a.cols, a.x_kind = int(family == "ivit"), cols, _KINDS[x.dtype]
    a.q0, a.qb, a.qc, a.n = numbers
    if function == "exp" or (function == "gelu" and family == "ibert"):
        a.count = x.size
        blocks = -(-x.size // _THREADS)
        _launch(x, "intops_published.cu", "published_each", blocks, _THREADS, a)
        return
    a.count = x.size // cols
    flag = cupy.zeros(1, np.int32)
    a.flag = flag.data.ptr
    _launch(x, "intops_published.cu", "published_rows", a.count, _THREADS, a)
    if function == "layernorm" and family == "ivit" and int(flag[0]):
        raise ValueError("the sum of squares leaves 64 bits")


class _Bytes(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("zero", ctypes.c_int64),
        ("flip", ctypes.c_uint32),
        ("rows", ctypes.c_int),
        ("sums", ctypes.c_void_p),
        ("sums_batch", ctypes.c_int64),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        ("a", _Bytes),
        ("b", _Bytes),
        *((name, ctypes.c_void_p) for name in ("y", "bias", "zeros")),
        *((name, ctypes.c_int64) for name in ("k", "from_k", "to_k")),
        ("by_tiles", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("four", ctypes.c_int),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [
        ("p", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("flip", ctypes.c_uint32),
    ]


class _Shifts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "v", "y")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "codes_batch", "v_batch")),
        *((name, ctypes.c_uint64) for name in ("by_tiles", "tiles")),
        *((name, ctypes.c_int) for name in ("codes_kind", "v_kind", "two", "count", "most")),
    ]


# Rows and columns of a block's sums, and what its four stages of both operands take.
_TILE, _STAGES = 128, 4 * 2 * 128 * 64
# Products of bytes that int32 sums whatever they are, in whole steps of K.
_SPAN = 1 << 16


def _grid(tiles: int, batch: int, down: int) -> tuple[int, int]:
    if tiles * batch >= 2**31 or down > 65535:
        raise ValueError("the product is too large for one launch: split its rows")
    return tiles * batch, down


def _weights(q: QTensor, device: int) -> tuple[Any, NDArray[np.int64] | None]:
    """Return a tensor's codes on a device, a byte each, sent there once, and its zero points."""
    import cupy

    storage = q._storage
    if storage.format.group is not None:
        raise ValueError(
            f"raw integer sums need one scale per row, but {storage.format} is grouped"
        )
    # Beside the panels, whose keys are the numbers of devices.
    held: tuple[Any, NDArray[np.int64] | None] | None = storage.copies.get(~device)
    if held is None:
        plain = QTensor._wrap(storage, False)
        codes = plain.codes()
        if codes.dtype not in (np.int8, np.uint8):
            raise ValueError(f"a device multiplies codes of at most 8 bits, not {storage.format}")
        zeros = None if plain.zeros is None else np.asarray(plain.zeros)[:, 0]
        if zeros is not None and (zeros != np.rint(zeros)).any():
            raise ValueError("raw integer sums need integer zero points")
        points = None if zeros is None else zeros.astype(np.int64)
        held = storage.copies[~device] = cupy.asarray(codes), points
    return held


def _operand(a: Any, rows: int, batch: int, zero: int) -> _Bytes:
    lost = 128 if a.dtype == np.uint8 else 0
    step = rows * a.shape[-1] if batch > 1 else 0
    flip = 0x80808080 if lost else 0
    return _Bytes(a.data.ptr, step, zero - lost, flip, rows, None, rows if batch > 1 else 0)


def _row_sums(a: Any, m: _Bytes, rows: int) -> Any:
    import cupy

    sums = _scratch(rows, np.int64, _stream(), cupy)
    args = _Sums(a.data.ptr, sums.data.ptr, rows, a.shape[-1], m.flip)
    _launch(a, "intops_matmul.cu", "row_sums", -(-rows // 8), 256, args)
    m.sums = sums.data.ptr
    return sums


def int_product(
    x: Any,
    x_zero: int,
    b: Any,
    b_zero: int,
    bias: NDArray[Any],
    dtype: np.dtype[Any],
) -> Any:
    """Multiply bytes exactly; see :func:`nibblas.intops.matmul`, which has checked them."""
    import cupy

    points = None
    if isinstance(b, QTensor):
        _check_inner(x.shape, b, True)
        right, points = _weights(b, int(x.device.id))
    else:
        right = cupy.ascontiguousarray(b.swapaxes(-1, -2))
    n, k = right.shape[-2:]
    lead: tuple[int, ...]
    if right.ndim == 2:
        lead, stack = x.shape[:-1], ()
        left = cupy.ascontiguousarray(x).reshape(math.prod(lead), k)
    else:
        rows = x if x.ndim > 1 else x.reshape(1, k)
        stack = np.broadcast_shapes(rows.shape[:-2], right.shape[:-2])
        lead = (*stack, *x.shape[-2:-1])
        left = cupy.ascontiguousarray(cupy.broadcast_to(rows, (*stack, *rows.shape[-2:])))
        right = cupy.ascontiguousarray(cupy.broadcast_to(right, (*stack, n, k)))
    y = cupy.zeros((*lead, n), dtype)
    if y.size == 0 or k == 0:
        if bias.any():
            y += cupy.asarray(bias.astype(dtype))
        return y
    m, batch = left.shape[-2], math.prod(stack)
    tiles = -(-n // _TILE)
    grid = _grid(tiles, batch, -(-m // _TILE))
    p = _Product(_operand(left, m, batch, x_zero), _operand(right, n, batch, b_zero), y.data.ptr)
    extra = np.broadcast_to(bias, (n,)).astype(np.int64) if bias.any() else None
    p.bias, p.zeros = _held(x, extra), _held(x, points)
    p.k, p.tiles, p.by_tiles = k, tiles, _magic(tiles)
    p.four = int(k % 16 == 0 and left.data.ptr % 16 == 0 and right.data.ptr % 16 == 0)
    # Sums live until the product is launched: the pool reuses memory in the stream's order.
    held = []
    if p.b.zero or points is not None:
        held.append(_row_sums(left, p.a, m * batch))
    if p.a.zero:
        held.append(_row_sums(right, p.b, n * batch))
    name = "product32" if dtype == np.int32 else "product64"
    function = kernel(int(x.device.id), "intops_matmul.cu", name)
    span = k if dtype == np.int32 else _SPAN
    for first in range(0, k, span):
        p.from_k, p.to_k = first, min(first + span, k)
        function.launch(grid, 256, _STAGES, _stream(), p)
    return y


def int_shifts(codes: Any, v: Any, steps: int, count: int, most: int) -> Any:
    """Sum shifted values; see :func:`nibblas.intops.log2_matmul`, which has checked them."""
    import cupy

    (m, k), n = codes.shape[-2:], v.shape[-1]
    stack = np.broadcast_shapes(codes.shape[:-2], v.shape[:-2])
    c = cupy.ascontiguousarray(cupy.broadcast_to(codes, (*stack, m, k)))
    w = cupy.ascontiguousarray(cupy.broadcast_to(v, (*stack, k, n)))
    y = cupy.zeros((*stack, m, n), np.int64)
    if y.size == 0 or k == 0:
        return y
    tiles = -(-n // 128)
    a = _Shifts(c.data.ptr, w.data.ptr, y.data.ptr, m, n, k, m * k, k * n, _magic(tiles), tiles)
    a.codes_kind, a.v_kind, a.two = _KINDS[c.dtype], _KINDS[w.dtype], int(steps == 2)
    a.count, a.most = count, most
    grid = _grid(tiles, math.prod(stack), min(m, 65535))
    kernel(int(y.device.id), "intops_matmul.cu", "shift_sums").launch(grid, 128, 0, _stream(), a)
    return y
