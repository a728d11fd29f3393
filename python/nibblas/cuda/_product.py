"""Tensors on a device and their products."""

from __future__ import annotations

import ctypes
import math
import operator
import sys
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .._api import _check_inner, _float_dtype, _kind, _raise_cast
from ..formats import Format
from ..qtensor import QTensor, _powers, _Storage
from ._launch import arch, device_properties, has_wgmma, kernel, tensor_map, workspace
from ._plan import BF16, CHUNK, F16, S8, Plan, Problem, padded_group, plan, plan_bits

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "Panels",
    "Storage",
    "explain",
    "is_device_array",
    "place",
    "product",
    "product_both",
    "require",
]

_KINDS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3, "int8": 4}
_COMPUTES = ("f32", "bf16", "int8")
_F32 = np.dtype(np.float32)


def require(device: str) -> tuple[ModuleType, int]:
    """Return CuPy and the number of a device.

    Raises
    ------
    ImportError
        Without CuPy.
    RuntimeError
        Without a usable device.
    ValueError
        If the name is not ``cuda`` or ``cuda:<n>``.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise ValueError(f"unknown device {device!r}: expected 'cpu' or 'cuda:<n>'")
    try:
        import cupy
    except ImportError as e:
        raise ImportError(
            f"device {device!r} needs CuPy: pip install cupy-cuda13x (or cupy-cuda12x) ({e})"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        raise RuntimeError(f"device {device!r}: CuPy finds no usable CUDA device ({e})") from None
    index = int(number) if number else cupy.cuda.Device().id
    if index >= count:
        raise RuntimeError(f"device {device!r}: CuPy finds {count} CUDA device(s)")
    arch(index)
    return cupy, index


def is_device_array(x: object) -> bool:
    """Whether an operand lies in the memory of a CUDA device."""
    if isinstance(x, (np.ndarray, QTensor)):
        return False
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return True
    try:
        return hasattr(x, "__cuda_array_interface__")
    except Exception:
        return False


class _PackArgs(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("n", "k", "bits", "plane_bits", "below")),
        *((name, ctypes.c_int) for name in ("group", "padded", "chunks")),
    ]


class _GemmArgs(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p * 3),
        *(
            (name, ctypes.c_void_p)
            for name in ("scales", "zeros", "x", "row_scale", "bias", "y", "work", "counters")
        ),
        *((name, ctypes.c_int64) for name in ("ldx", "y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "n_padded", "k_bytes")),
        *((name, ctypes.c_int) for name in ("chunks", "groups", "chunks_per_group")),
        *((name, ctypes.c_int) for name in ("row_blocks", "y_kind", "mul", "sub")),
        *((name, ctypes.c_int) for name in ("per", "rest", "whole")),
    ]


class _ActArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "scale", "parts_in", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_col", "y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "places", "group", "padded")),
        *((name, ctypes.c_int) for name in ("kind", "out_kind", "y_kind", "plain")),
    ]


class _BitArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("w_sums", "x_sums", "w_scales", "x_scales", "bias", "y")
        ),
        *((name, ctypes.c_int64) for name in ("y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "chunks", "w_rows", "x_rows")),
        *((name, ctypes.c_int) for name in ("p", "q", "y_kind", "m_blocks", "n_blocks")),
    ]


class BitPlanes:
    """The bits of the codes, plane after plane, with the sums of the codes of each row."""

    def __init__(self, host: _Storage, device: int) -> None:
        import cupy

        self.bits = host.format.bits
        self.chunks = max(-(-host.cols // 1024), 1)
        self.rows = -(-max(host.rows, 1) // 256) * 256
        with cupy.cuda.Device(device):
            codes = cupy.asarray(host.codes)
            size = self.bits * self.rows * self.chunks * 128
            self.planes = cupy.empty(size, cupy.uint8)
            self.sums = cupy.empty(self.rows, cupy.int32)
            self.scales = cupy.asarray(_wide_scales(host)[:, 0].astype(np.float32))
            stream = int(cupy.cuda.get_current_stream().ptr)
            args = _PackArgs(codes.data.ptr, self.planes.data.ptr, size, host.codes.shape[1])
            args.n, args.k, args.bits = host.rows, host.cols, self.bits
            args.padded, args.chunks = self.rows, self.chunks
            kernel(device, "pack.cu", "planes").launch((-(-size // 256), 1), 256, 0, stream, args)
            args.codes, args.out = self.planes.data.ptr, self.sums.data.ptr
            kernel(device, "pack.cu", "code_sums").launch((self.rows, 1), 128, 0, stream, args)
            cupy.cuda.get_current_stream().synchronize()

    def boxes(self, box_rows: int) -> Any:
        """Return the tensor map of the planes."""
        stride = self.chunks * 128
        return tensor_map(self.planes.data.ptr, self.bits * self.rows, stride, stride, box_rows, 1)


def _plane_bits(bits: int) -> list[int]:
    return [b for b in (8, 4, 2, 1) if bits & b]


class Panels:
    """The codes of a matrix on a device, in the order of the tensor cores' registers."""

    def __init__(self, host: _Storage, device: int) -> None:
        import cupy

        fmt = host.format
        _linear(fmt)
        self.device = device
        self.host = host
        self.held_planes: BitPlanes | None = None
        self.rows, self.cols = host.rows, host.cols
        self.n_padded = -(-max(self.rows, 1) // 64) * 64
        self.padded = padded_group(fmt.group, self.cols)
        self.group = min(fmt.group or max(self.cols, 1), max(self.cols, 1))
        self.grouped_rows = fmt.group is not None and fmt.group < self.cols
        groups = max(fmt.groups(self.cols), 1)
        self.groups = groups
        self.chunks = max(-(-groups * self.padded // CHUNK), 1)
        if self.chunks * max(CHUNK * 8, self.n_padded // 16) >= 1 << 31:
            raise ValueError(f"a matrix of shape {(self.rows, self.cols)} is too large for CUDA")
        element = fmt.element
        self.bits = element.bits
        self.mul, self.sub = _linear(fmt)
        zeros = host.zeros
        self.zero = 0 if zeros is None else 2 if zeros.dtype.kind == "f" else 1
        whole = zeros is not None and self.zero == 1 and zeros.size > 0
        self.zero_top = int(zeros.max()) if zeros is not None and whole else 0
        span = 255 if zeros is not None else max(-element.minimum, element.maximum)
        self.longest = span * 127 * (self.padded if self.grouped_rows else self.chunks * CHUNK)
        self.sc16 = fmt.scale == "f16"
        with cupy.cuda.Device(device):
            self.scales = self._per_group(cupy, _wide_scales(host), groups)
            self.zeros = None if zeros is None else self._per_group(cupy, zeros, groups)
            self.planes: list[Any] = []
            codes = cupy.asarray(host.codes)
            below = 0
            tiles = self.n_padded // 16
            for pb in _plane_bits(self.bits):
                words = tiles * self.chunks * 32 * 2 * pb
                out = cupy.empty(words, cupy.uint32)
                if self.rows and self.cols:
                    args = _PackArgs(
                        codes.data.ptr,
                        out.data.ptr,
                        words,
                        host.codes.shape[1],
                        self.rows,
                        self.cols,
                        self.bits,
                        pb,
                        below,
                        self.group,
                        self.padded,
                        self.chunks,
                    )
                    stream = cupy.cuda.get_current_stream()
                    k = kernel(device, "pack.cu", "pack")
                    k.launch((-(-words // 256), 1), 256, 0, stream.ptr, args)
                self.planes.append(out)
                below += pb
            # Other streams may use the panels as soon as they are here.
            cupy.cuda.get_current_stream().synchronize()

    def _per_group(self, cupy: Any, a: NDArray[Any], groups: int) -> Any:
        wide = np.zeros((groups, self.n_padded), a.dtype)
        if a.size:
            wide[:, : self.rows] = a.T
        return cupy.asarray(wide)

    def bit_planes(self) -> BitPlanes:
        """Return the bit planes, made on first use."""
        if self.held_planes is None:
            self.held_planes = BitPlanes(self.host, self.device)
        return self.held_planes

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = [*self.planes, self.scales, *([] if self.zeros is None else [self.zeros])]
        return sum(int(a.nbytes) for a in parts)


def _linear(fmt: Format) -> tuple[int, int]:
    """Return mul and sub of a format whose code u stands for mul*u - sub."""
    if fmt.structure is not None or fmt.is_plain:
        raise ValueError(f"{fmt} is not available on CUDA")
    values = fmt.element.values.astype(np.float64)
    mul = values[1] - values[0] if len(values) > 1 else 0.0
    if (
        not fmt.element.linear
        or mul not in (1.0, 2.0)
        or (values != mul * np.arange(len(values)) + values[0]).any()
        or values[0] != int(values[0])
    ):
        raise ValueError(f"{fmt} is not available on CUDA: its values are not evenly spaced")
    if fmt.scale not in ("f32", "f16", "bf16", "e8m0") or fmt.element.tensor_scale:
        raise ValueError(f"{fmt} is not available on CUDA: scales of type {fmt.scale}")
    return int(mul), -int(values[0])


def _wide_scales(host: _Storage) -> NDArray[Any]:
    if host.format.scale == "bf16":
        return (host.scales.astype(np.uint32) << 16).view(np.float32)
    if host.format.scale == "e8m0":
        return _powers(host.scales)
    return host.scales


class Storage(_Storage):
    """A matrix on a device; the portable bytes stay on the host beside it."""

    __slots__ = ("number", "panels")

    def __init__(self, host: _Storage, number: int) -> None:
        super().__init__(host.format, host.rows, host.cols, host.arrays(), host.bounds)
        self.number = number
        self.device = f"cuda:{number}"
        self.panels = Panels(host, number)

    def pack(self, threads: int) -> Any:
        raise TypeError(
            f"the tensor is on {self.device}, the operand is not: use a CuPy array (cupy.asarray) "
            f"or q.to('cpu')"
        )

    def like(self, part: _Storage) -> _Storage:
        return Storage(part, self.number)


def place(host: _Storage, device: str) -> Storage:
    """Return a matrix on a device."""
    _, number = require(device)
    if isinstance(host, Storage) and host.number == number:
        return host
    return Storage(host, number)


def _panels(storage: _Storage, device: int) -> Panels:
    if isinstance(storage, Storage):
        if storage.number != device:
            raise ValueError(
                f"operands on different devices: the array on cuda:{device}, "
                f"the tensor on {storage.device}"
            )
        return storage.panels
    # A tensor of the host that meets an array of the device is copied once.
    held = storage.copies.get(device)
    if held is None:
        held = storage.copies[device] = Panels(storage, device)
    return held


def _import(x: Any, cupy: Any) -> Any:
    if isinstance(x, cupy.ndarray):
        return x
    return cupy.from_dlpack(x) if hasattr(x, "__dlpack__") else cupy.asarray(x)


def _export(y: Any, like: Any, cupy: Any) -> Any:
    if isinstance(like, cupy.ndarray):
        return y
    root = type(like).__module__.partition(".")[0]
    module = sys.modules.get(root)
    convert = getattr(module, "from_dlpack", None) or getattr(
        getattr(module, "dlpack", None), "from_dlpack", None
    )
    return y if convert is None else convert(y)


def _activations(x: Any, compute: str, cupy: Any) -> tuple[Any, np.dtype[Any]]:
    dt = np.dtype(x.dtype)
    if dt.name in ("float16", "bfloat16", "float32", "float64"):
        return x, dt
    if dt.kind in "iub":
        return (x, _F32) if compute == "int8" and dt == np.int8 else (x.astype(_F32), _F32)
    raise TypeError(
        f"operands of type {dt} are not supported: expected real numbers of at most 64 bits"
    )


def product(
    other: Any,
    q: QTensor,
    right: bool,
    compute: str,
    out: Any,
    dtype: DTypeLike | None,
    bias: Any,
    threads: SupportsIndex | None,
) -> Any:
    """Multiply an array on a device with a QTensor; see :func:`nibblas.matmul`."""
    import cupy

    if threads is not None:
        operator.index(threads)
    storage = q._storage
    if not is_device_array(other):
        storage.pack(0)  # raises: the operands are in different places
    if compute not in _COMPUTES or compute not in storage.format.computes:
        raise ValueError(
            f"compute={compute!r} is not available for {storage.format} on CUDA: expected one of "
            f"{', '.join(c for c in _COMPUTES if c in storage.format.computes)}"
        )
    x = _import(other, cupy)
    device = int(x.device.id)
    with cupy.cuda.Device(device):
        x, result = _activations(x, compute, cupy)
        _check_inner(x.shape, q, right)
        if dtype is not None:
            result = _float_dtype(dtype)
        panels = _panels(storage, device)
        b = _bias(bias, panels.rows, cupy)
        vector = x.ndim == 1
        n = panels.rows
        if right or vector:
            shape = (*x.shape[:-1], n)
        else:
            shape = (*x.shape[:-2], n, x.shape[-1])
            x = x.swapaxes(-1, -2)
        final = _final(out, shape, result, cupy)
        swapped = not (right or vector)
        y = final
        if final is None or final.dtype != result or final.shape != shape or _overlap(x, final):
            y = cupy.empty(shape, result)
        y2 = _matrix(y.swapaxes(-1, -2) if swapped else y, n)
        temporary = None
        if y2 is None:
            temporary = y2 = cupy.empty((math.prod(x.shape[:-1]), n), result)
        x2 = _matrix(x, x.shape[-1])
        if x2 is None:
            x2 = cupy.ascontiguousarray(x).reshape(-1, x.shape[-1])
        _run(panels, x2, y2, compute, b, cupy)
        if temporary is not None:
            view = y.swapaxes(-1, -2) if swapped else y
            view[...] = temporary.reshape(view.shape)
        if final is None:
            return _export(y, other, cupy)
        if final is not y:
            final[...] = y.astype(final.dtype)
        return out[0] if isinstance(out, tuple) else out


def product_both(
    a: QTensor,
    b: QTensor,
    compute: str,
    out: Any,
    dtype: DTypeLike | None,
    bias: Any,
) -> Any:
    """Multiply two QTensors of a device as integers; the shapes are checked."""
    import cupy

    left, right = a._storage, b._storage
    at = left if isinstance(left, Storage) else right
    assert isinstance(at, Storage)
    for q in (a, b):
        if q.format.group is not None and q.format.group < q._storage.cols:
            raise ValueError(
                f"products of two tensors on CUDA need one scale per row, but {q.format} is grouped"
            )
    raw = dtype is not None and np.dtype(dtype).kind in "iub"
    result = np.dtype(dtype) if raw else _F32 if dtype is None else _float_dtype(dtype)
    if raw and result not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise TypeError(f"raw integer sums have dtype int32 or int64, got {result}")
    if raw and bias is not None:
        raise ValueError("raw integer sums take no bias")
    with cupy.cuda.Device(at.number):
        x, w = _panels(left, at.number), _panels(right, at.number)
        shape = (x.rows, w.rows)
        final = _final(out, shape, result, cupy)
        y = final
        if final is None or final.dtype != result or (raw and result != np.dtype(np.int32)):
            y = cupy.empty(shape, np.int32 if raw else result)
        vector = _bias(bias, w.rows, cupy)
        planes = (
            left.format.element.name.startswith("bipolar")
            and right.format.element.name.startswith("bipolar")
            and has_wgmma(at.number)
        )
        if 0 in shape or x.cols == 0:
            y[...] = 0 if vector is None else vector
        elif planes and (raw or x.bits * w.bits < 8):
            _run_bits(x, w, y, vector, cupy)
        elif raw:
            raise ValueError(
                f"raw sums of {left.format} and {right.format} are not available on CUDA: "
                f"expected two bipolar tensors"
            )
        else:
            low, high = left.format.element.minimum, left.format.element.maximum
            if left.zeros is not None or low < -128 or high > 127:
                raise ValueError(f"products of {left.format} are not available on CUDA")
            codes = cupy.asarray(QTensor._wrap(left).codes().astype(np.int8))
            scales = cupy.asarray(_wide_scales(left)[:, 0].astype(np.float32))
            _run(w, codes, y, "int8", vector, cupy, scales)
        if final is None:
            return y if y.dtype == result else y.astype(result)
        if final is not y:
            final[...] = y.astype(final.dtype)
        return out[0] if isinstance(out, tuple) else out


def _run_bits(x: Panels, w: Panels, y: Any, bias: Any, cupy: Any) -> None:
    top_x, top_w = (1 << x.bits) - 1, (1 << w.bits) - 1
    if x.cols * top_x * top_w >= 1 << 31:
        raise ValueError("integer sums of this length could overflow int32")
    xp, wp = x.bit_planes(), w.bit_planes()
    pl = plan_bits(x.rows, w.rows)
    args = _BitArgs(wp.sums.data.ptr, xp.sums.data.ptr, wp.scales.data.ptr, xp.scales.data.ptr)
    args.bias = None if bias is None else bias.data.ptr
    args.y = y.data.ptr
    args.y_row, args.y_col = _strides(y)
    args.m, args.n, args.k, args.chunks = x.rows, w.rows, x.cols, xp.chunks
    args.w_rows, args.x_rows = wp.rows, xp.rows
    args.p, args.q = w.bits, x.bits
    args.y_kind = -1 if y.dtype.kind == "i" else _KINDS[np.dtype(y.dtype).name]
    args.m_blocks, args.n_blocks = -(-x.rows // pl.tokens), -(-w.rows // pl.rows)
    blocks = min(args.m_blocks * args.n_blocks, device_properties(w.device)[0] * pl.grid[0])
    kernel(w.device, "bits.cu", "bits", pl.defines).launch(
        (blocks, 1),
        pl.threads,
        pl.shared,
        int(cupy.cuda.get_current_stream().ptr),
        args,
        wp.boxes(pl.rows),
        xp.boxes(pl.tokens),
    )


def _matrix(a: Any, cols: int) -> Any:
    """Return an array as a matrix without copying it, or None."""
    if a.ndim == 2:
        return a
    if a.ndim == 1:
        return a[None]
    if a.size == 0:
        return a.reshape(-1, cols) if cols else a.reshape(math.prod(a.shape[:-1]), cols)
    stride = None
    for length, step in zip(a.shape[-2::-1], a.strides[-2::-1], strict=True):
        if length == 1:
            continue
        if stride is None:
            stride, reach = step, step * length
        elif step != reach:
            return None
        else:
            reach *= length
    if stride is None:
        stride = a.strides[-1] * cols
    from cupy.lib.stride_tricks import as_strided

    return as_strided(a, (math.prod(a.shape[:-1]), cols), (stride, a.strides[-1]))


def _overlap(a: Any, b: Any) -> bool:
    import cupy

    return bool(cupy.may_share_memory(a, b))


def _final(out: Any, shape: tuple[int, ...], result: np.dtype[Any], cupy: Any) -> Any:
    if isinstance(out, tuple):
        if len(out) != 1:
            raise ValueError("The 'out' tuple must have exactly one entry per ufunc output")
        out = out[0]
    if out is None:
        return None
    if not isinstance(out, cupy.ndarray):
        if not is_device_array(out):
            raise TypeError(f"return arrays must be arrays of the device, got {_kind(out)}")
        out = _import(out, cupy)
    if out.device.id != cupy.cuda.Device().id:
        raise ValueError(f"out is on cuda:{out.device.id}, the operand on another device")
    if out.shape != shape:
        raise ValueError(f"matmul: Output operand 0 has shape {out.shape}, the result has {shape}")
    if not np.can_cast(result, out.dtype, "same_kind"):
        _raise_cast(result, np.dtype(out.dtype))
    return out


def _bias(bias: Any, rows: int, cupy: Any) -> Any:
    if bias is None:
        return None
    b = _import(bias, cupy) if is_device_array(bias) else cupy.asarray(bias)
    if b.dtype.kind not in "fiub" and np.dtype(b.dtype).name != "bfloat16":
        raise TypeError(f"bias of type {b.dtype} is not supported: expected real numbers")
    if b.shape != (rows,):
        raise ValueError(f"bias must have shape ({rows},), one per weight row, got {b.shape}")
    return cupy.ascontiguousarray(b.astype(_F32, copy=False))


def _strides(a: Any) -> tuple[int, int]:
    size = a.itemsize
    return a.strides[0] // size, a.strides[1] // size


def _problem(p: Panels, m: int, compute: str, kind: int) -> tuple[Problem, bool]:
    """Return what the plan depends on, and whether rows are split in three of bfloat16."""
    split = False
    if compute == "int8":
        act = S8
    elif compute == "bf16" or kind == 1:
        act = BF16
    elif kind == 0:
        act = F16
    else:
        act, split = BF16, True
    grouped = 0
    if p.grouped_rows:
        grouped = {32: 4, 64: 2}.get(p.padded, 1)
    elif act == S8 and p.zero == 2:
        grouped = 1
    processors, limit = device_properties(p.device)
    problem = Problem(
        3 * m if split else m,
        p.n_padded,
        p.chunks,
        p.groups,
        act,
        p.bits,
        grouped,
        p.zero,
        p.sc16,
        processors,
        limit,
        p.mul,
        p.zero_top,
        has_wgmma(p.device),
    )
    return problem, split


def explain(x: Any, q: QTensor, compute: str) -> Plan:
    """Return the plan of a product; the operands are as for :func:`product`."""
    import cupy

    x = _import(x, cupy)
    kind = _KINDS.get(np.dtype(x.dtype).name, 2)
    m = x.size // max(q._storage.cols, 1)
    return plan(_problem(_panels(q._storage, int(x.device.id)), m, compute, kind)[0])


def _run(p: Panels, x: Any, y: Any, compute: str, bias: Any, cupy: Any, given: Any = None) -> None:
    """Compute y = x W^T for matrices; every argument is checked."""
    m, k = x.shape
    if m == 0 or p.rows == 0:
        return
    if k == 0:
        y[...] = 0 if bias is None else bias
        return
    if m > 65535 * 8:
        raise ValueError(f"products of more than {65535 * 8} rows are not supported, got {m}")
    stream = int(cupy.cuda.get_current_stream().ptr)
    kind = _KINDS[np.dtype(x.dtype).name]
    places = p.chunks * CHUNK
    scale = None
    if compute == "int8" and p.longest >= 1 << 31:
        raise ValueError("integer sums of this length could overflow int32")
    problem, split = _problem(p, m, compute, kind)
    pl, act, rows = plan(problem), problem.act, problem.m
    direct = (
        act != S8
        and not split
        and kind == act
        and (not p.grouped_rows or p.group == p.padded)
        and k % 8 == 0
        and x.strides[1] == 2
        and x.strides[0] % 16 == 0
        and x.data.ptr % 16 == 0
    )
    if direct:
        xs, ldx, k_bytes = x, x.strides[0], 2 * k
    else:
        width = 1 if act == S8 else 2
        xs = cupy.empty((rows, places * width), cupy.uint8)
        args = _ActArgs(x=x.data.ptr, out=xs.data.ptr)
        args.x_row, args.x_col = _strides(x)
        args.m, args.k, args.places = m, k, places
        args.group, args.padded = p.group, p.padded
        args.kind = kind
        args.out_kind = 2 if split else act
        if act == S8:
            args.plain = (
                kind in (0, 1, 2)
                and (not p.grouped_rows or p.group == p.padded)
                and k % 16 == 0
                and x.strides[1] == x.itemsize
                and x.strides[0] % 16 == 0
                and x.data.ptr % 16 == 0
            )
            scale = cupy.empty(m, _F32)
            args.scale = scale.data.ptr
            kernel(p.device, "activations.cu", "quantise").launch(
                (m, 1), 256 if k > 1024 else 128, 0, stream, args
            )
            if given is not None:
                scale = given
        else:
            at = kernel(p.device, "activations.cu", "place")
            for first in range(0, m, 65535):
                args.m = min(65535, m - first)
                args.x = x.data.ptr + first * x.strides[0]
                args.out = xs.data.ptr + first * (3 if split else 1) * places * 2
                at.launch((min(-(-places // 256), 64), args.m), 256, 0, stream, args)
        ldx = k_bytes = places * width
    target, y_kind = y, _KINDS[np.dtype(y.dtype).name]
    if split:
        target, y_kind = cupy.empty((rows, p.rows), _F32), _KINDS["float32"]
    g = _GemmArgs()
    for i, plane in enumerate(p.planes):
        g.planes[i] = plane.data.ptr
    g.scales = p.scales.data.ptr
    g.zeros = None if p.zeros is None else p.zeros.data.ptr
    g.x = xs.data.ptr
    g.row_scale = None if scale is None else scale.data.ptr
    g.bias = None if bias is None or split else bias.data.ptr
    g.y = target.data.ptr
    g.work = workspace(
        p.device, stream, "sums", pl.grid[1] * 2 * pl.grid[0] * pl.rows * pl.tokens * 4
    )
    g.counters = workspace(p.device, stream, "counters", pl.grid[1] * pl.row_blocks * 4)
    g.ldx = ldx
    g.y_row, g.y_col = _strides(target)
    g.m, g.n, g.n_padded, g.k_bytes = rows, p.rows, p.n_padded, k_bytes
    g.chunks, g.groups = p.chunks, p.groups
    g.chunks_per_group = max(p.padded // CHUNK, 1) if problem.grouped else 1
    g.row_blocks, g.y_kind, g.mul, g.sub = pl.row_blocks, y_kind, p.mul, p.sub
    boxes = []
    if pl.nest == "hopper":
        item = 1 if act == S8 else 2
        boxes.append(tensor_map(xs.data.ptr, rows, k_bytes, ldx, pl.tokens, item))
    g.per, g.rest = divmod(pl.units, pl.grid[0])
    g.whole = pl.whole
    kernel(p.device, f"{pl.nest}.cu", pl.nest, pl.defines).launch(
        pl.grid, pl.threads, pl.shared, stream, g, *boxes
    )
    if split:
        args = _ActArgs(y=y.data.ptr)
        args.y_row, args.y_col = _strides(y)
        args.n = p.rows
        args.y_kind = _KINDS[np.dtype(y.dtype).name]
        args.bias = None if bias is None else bias.data.ptr
        at = kernel(p.device, "activations.cu", "combine")
        for first in range(0, m, 65535):
            count = min(65535, m - first)
            args.parts_in = target.data.ptr + first * 3 * p.rows * 4
            args.y = y.data.ptr + first * y.strides[0]
            at.launch((min(-(-p.rows // 256), 64), count), 256, 0, stream, args)
