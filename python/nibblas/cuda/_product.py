"""Products on a device."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import sys
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from .._api import _check_inner, _float_dtype, _kind, _raise_cast
from ..qtensor import QTensor
from ._launch import Kernel, device_properties, has_wgmma, kernel, tensor_map, workspace
from ._panels import BitPlanes, Panels, Storage, panels_on, row_scales
from ._plan import BF16, CHUNK, E4M3, F16, S8, Plan, Problem, plan, plan_bits

__all__ = ["explain", "is_device_array", "product", "product_both"]

_COMPUTES = ("f32", "bf16", "int8", "int8_g32", "int8_g128", "fp8")
# Length of the activations' groups.
_LENGTHS = {"int8_g32": 32, "int8_g128": 128}
_F32 = np.dtype(np.float32)


@functools.cache
def _kind_of(dtype: np.dtype[Any]) -> int | None:
    """Return the number of an element type, as the kernels have it."""
    return {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3, "int8": 4}.get(dtype.name)


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


class _GemmArgs(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p * 3),
        *(
            (name, ctypes.c_void_p)
            for name in ("book", "scales", "outer", "zeros", "x", "row_scale", "bias", "y", "work")
        ),
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("ldx", "y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "n_padded", "k_bytes")),
        *((name, ctypes.c_int) for name in ("chunks", "groups", "chunks_per_group")),
        *((name, ctypes.c_int) for name in ("row_blocks", "y_kind", "wide")),
        *((name, ctypes.c_int) for name in ("mul", "sub")),
        ("unit", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("per", "rest", "whole")),
    ]


class _ActArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "scale", "parts_in", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_col", "y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "places", "group", "padded")),
        *((name, ctypes.c_int) for name in ("kind", "out_kind", "y_kind", "plain", "tables")),
        ("step", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "segment", "segments", "gain_kind")),
        ("gain", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    ]


class _BitArgs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("w_sums", "x_sums", "w_scales", "x_scales", "bias", "y")
        ),
        *((name, ctypes.c_int64) for name in ("y_row", "y_col")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "chunks", "w_rows", "x_rows")),
        *((name, ctypes.c_int) for name in ("p", "q", "y_kind", "wide", "x_box")),
        *((name, ctypes.c_int) for name in ("m_blocks", "n_blocks")),
    ]


def _import(x: Any, cupy: Any) -> Any:
    if isinstance(x, cupy.ndarray):
        return x
    return cupy.from_dlpack(x) if hasattr(x, "__dlpack__") else cupy.asarray(x)


def _export(y: Any, like: Any, cupy: Any) -> Any:
    if isinstance(like, cupy.ndarray):
        return y
    root = type(like).__module__.partition(".")[0]
    # Arrays of JAX are jaxlib's.
    module = sys.modules.get("jax.numpy" if root in ("jax", "jaxlib") else root)
    convert = getattr(module, "from_dlpack", None) or getattr(
        getattr(module, "dlpack", None), "from_dlpack", None
    )
    return y if convert is None else convert(y)


def _activations(x: Any, compute: str, cupy: Any) -> tuple[Any, np.dtype[Any]]:
    dt = x.dtype
    if _kind_of(dt) in (0, 1, 2, 3):
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
    there = [c for c in _COMPUTES if c in storage.format.computes or c == "fp8"]
    if compute not in there:
        raise ValueError(
            f"compute={compute!r} is not available for {storage.format} on CUDA: expected one of "
            f"{', '.join(there)}"
        )
    if compute in _LENGTHS and storage.array("row_scales") is not None:
        raise ValueError(f"compute={compute!r} is not available for {storage.format} on CUDA")
    x = _import(other, cupy)
    device = int(x.device.id)
    with cupy.cuda.Device(device):
        x, result = _activations(x, compute, cupy)
        _check_inner(x.shape, q, right)
        if dtype is not None:
            result = _float_dtype(dtype)
        panels = panels_on(storage, device)
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
        _run(panels, x2, y2, compute, b)
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
        if q.format.is_plain:
            raise ValueError(f"products of {q.format} with a tensor are not available on CUDA")
    raw = dtype is not None and np.dtype(dtype).kind in "iub"
    result = np.dtype(dtype) if raw else _F32 if dtype is None else _float_dtype(dtype)
    if raw and result not in (np.dtype(np.int32), np.dtype(np.int64)):
        raise TypeError(f"raw integer sums have dtype int32 or int64, got {result}")
    if raw and bias is not None:
        raise ValueError("raw integer sums take no bias")
    with cupy.cuda.Device(at.number):
        x, w = panels_on(left, at.number), panels_on(right, at.number)
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
            _run_bits(x.bit_planes(), x.rows, w.bit_planes(), w.rows, y, vector)
        elif raw:
            raise ValueError(
                f"raw sums of {left.format} and {right.format} are not available on CUDA: "
                f"expected two bipolar tensors"
            )
        else:
            low, high = left.format.element.minimum, left.format.element.maximum
            if left.zeros is not None or low < -128 or high > 127 or not left.format.element.linear:
                raise ValueError(f"products of {left.format} are not available on CUDA")
            codes = cupy.asarray(QTensor._wrap(left).codes().astype(np.int8))
            if w.worth(S8).kind:
                raise ValueError(f"products of {right.format} are not available on CUDA")
            scales = cupy.asarray(row_scales(left))
            _run(w, codes, y, "int8", vector, scales)
        if final is None:
            return y if y.dtype == result else y.astype(result)
        if final is not y:
            final[...] = y.astype(final.dtype)
        return out[0] if isinstance(out, tuple) else out


def _run_bits(xp: BitPlanes, m: int, wp: BitPlanes, n: int, y: Any, bias: Any) -> None:
    """Multiply planes of `m` and `n` rows; `y` of int32 takes the sums themselves."""
    import cupy

    k = wp.cols
    if k * ((1 << xp.bits) - 1) * ((1 << wp.bits) - 1) >= 1 << 31:
        raise ValueError("integer sums of this length could overflow int32")
    pl = plan_bits(m, n, wp.bits, xp.bits, xp.chunks, y.itemsize == 4 and _has_lines(y))
    args = _BitArgs(wp.sums.data.ptr, xp.sums.data.ptr, wp.scales.data.ptr, xp.scales.data.ptr)
    args.bias = None if bias is None else bias.data.ptr
    args.y = y.data.ptr
    args.y_row, args.y_col = _strides(y)
    args.m, args.n, args.k, args.chunks = m, n, k, xp.chunks
    args.w_rows, args.x_rows = wp.rows, xp.rows
    args.p, args.q = wp.bits, xp.bits
    args.y_kind = -1 if y.dtype.kind == "i" else _kind_of(y.dtype)
    args.wide = (
        args.y_col == 1
        and args.y_row % 2 == 0
        and n % 2 == 0
        and y.data.ptr % (2 * y.itemsize) == 0
    )
    args.x_box = min(pl.rows, -(-m // 8) * 8)
    args.m_blocks, args.n_blocks = -(-m // pl.rows), -(-n // pl.tokens)
    blocks = min(args.m_blocks * args.n_blocks, device_properties(wp.device)[0])
    extra = []
    if ("OUT", 1) in pl.defines:
        extra.append(tensor_map(y.data.ptr, m, 4 * n, y.strides[0], 64, 4))
    kernel(wp.device, f"{pl.nest}.cu", pl.nest, pl.defines).launch(
        (blocks, 1),
        pl.threads,
        pl.shared,
        int(cupy.cuda.get_current_stream().ptr),
        args,
        wp.boxes(pl.tokens),
        xp.boxes(args.x_box),
        *extra,
        early=m <= 64,
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
    _check_here(out, "out", cupy)
    if out.shape != shape:
        raise ValueError(f"matmul: Output operand 0 has shape {out.shape}, the result has {shape}")
    if not np.can_cast(result, out.dtype, "same_kind"):
        _raise_cast(result, np.dtype(out.dtype))
    return out


def _check_here(a: Any, name: str, cupy: Any) -> None:
    """Raise where an array is not on the current device."""
    if a.device.id != cupy.cuda.Device().id:
        raise ValueError(f"{name} is on cuda:{a.device.id}, the operand on another device")


def _bias(bias: Any, rows: int, cupy: Any) -> Any:
    if bias is None:
        return None
    b = _import(bias, cupy) if is_device_array(bias) else cupy.asarray(bias)
    _check_here(b, "bias", cupy)
    if b.dtype.kind not in "fiub" and np.dtype(b.dtype).name != "bfloat16":
        raise TypeError(f"bias of type {b.dtype} is not supported: expected real numbers")
    if b.shape != (rows,):
        raise ValueError(f"bias must have shape ({rows},), one per weight row, got {b.shape}")
    return cupy.ascontiguousarray(b.astype(_F32, copy=False))


def _strides(a: Any) -> tuple[int, int]:
    size = a.itemsize
    return a.strides[0] // size, a.strides[1] // size


def _has_lines(y: Any) -> bool:
    """Whether the copy engine can write the rows of a result."""
    row, col = y.strides
    size = y.itemsize
    return bool(col == size and row % 16 == 0 and row >= size * y.shape[1] and y.data.ptr % 16 == 0)


def _problem(p: Panels, m: int, compute: str, kind: int, y: Any = None) -> tuple[Problem, bool]:
    """Return what the plan depends on, and whether rows are split in three of bfloat16.

    Without `y` the result is a new array of the activations' type.
    """
    split = False
    length = _LENGTHS.get(compute)
    if compute == "int8" or length:
        act = S8
    elif compute == "fp8":
        if not has_wgmma(p.device) or p.zero:
            why = "it has zero points" if p.zero else "the device has no wgmma"
            raise ValueError(f"compute='fp8' is not available for {p.host.format}: {why}")
        act = E4M3
    elif compute == "bf16" or kind == 1:
        act = BF16
    elif kind == 0:
        act = F16
    else:
        act, split = BF16, True
    grouped = 0
    segments = p.segments(length)
    if p.grouped_rows or length:
        grouped = {32: 4, 64: 2}.get(segments.places, 1)
    elif act == S8 and p.zero == 2:
        grouped = 1
    processors, limit = device_properties(p.device)
    worth = p.worth(act)
    problem = Problem(
        3 * m if split else m,
        p.n_padded,
        p.chunks,
        segments.number,
        act,
        p.bits,
        grouped,
        p.zero,
        3 if act == S8 and p.inner is not None else p.scale,
        processors,
        limit,
        p.mul,
        p.zero_top,
        has_wgmma(p.device),
        worth.kind,
        worth.mantissa,
        length is not None,
        act == S8 and length is None and p.lift,
        kind < 2 and p.rows % 8 == 0
        if y is None
        else not split and y.itemsize == 2 and _has_lines(y),
    )
    return problem, split


def explain(x: Any, q: QTensor, compute: str) -> Plan:
    """Return the plan of a product; the operands are as for :func:`product`."""
    import cupy

    x = _import(x, cupy)
    kind = _kind_of(x.dtype)
    m = x.size // max(q._storage.cols, 1)
    panels = panels_on(q._storage, int(x.device.id))
    return panels.plan(m, compute, 2 if kind is None else kind)


def quantiser(device: int, m: int, k: int, lines: bool) -> tuple[Kernel, int, int]:
    """Return what makes rows int8, its blocks, and their threads.

    `lines` says that the rows are of 16 bits, and runs of 16 can be read at once.
    """
    threads = row_threads(k)
    if not lines or k > 16 * threads:
        return kernel(device, "activations.cu", "quantise"), m, threads
    blocks = device_properties(device)[0] * max(1024 // threads, 1)
    return kernel(device, "activations.cu", "quantise_rows"), min(m, blocks), threads


def row_threads(k: int) -> int:
    """Return the threads of a block that quantises a row: one for every 16 numbers."""
    return min(max(-(-k // 512) * 32, 128), 1024)


# Memory that captured graphs use: nobody else may have it.
_captured: list[Any] = []


def _scratch(shape: Any, dtype: Any, stream: int, cupy: Any) -> Any:
    """Return memory for the time of a call, or for good where a graph is captured."""
    a = cupy.empty(shape, dtype)
    if stream and cupy.cuda.runtime.streamIsCapturing(stream):
        _captured.append(a)
    return a


def _run(
    p: Panels, x: Any, y: Any, compute: str, bias: Any, given: Any = None, placed: bool = False
) -> None:
    """Compute y = x W^T for matrices; every argument is checked.

    `given` are scales of the rows of int8 codes; `placed` says that these lie as the kernels read
    them.
    """
    import cupy

    m, k = x.shape[0], p.cols if placed else x.shape[1]
    if m == 0 or p.rows == 0:
        return
    if k == 0:
        y[...] = 0 if bias is None else bias
        return
    if m > 65535 * 8:
        raise ValueError(f"products of more than {65535 * 8} rows are not supported, got {m}")
    if compute.startswith("int8") and p.longest >= 1 << 31:
        raise ValueError("integer sums of this length could overflow int32")
    stream = int(cupy.cuda.get_current_stream().ptr)
    at, to = x.data.ptr, y.data.ptr
    key = (m, x.strides, y.strides, x.dtype, y.dtype, compute, at % 16, to % 32, stream, placed)
    call = p.calls.get(key)
    if call is None:
        if len(p.calls) >= 64:
            p.calls.clear()
        call = p.calls[key] = p.call(x, y, compute, stream, placed)
    call(at, to, 0 if bias is None else bias.data.ptr, given, cupy)


class _Call:
    """Everything about a product but where the operands are."""

    blocks = 0
    """Of what prepares activations; 0: one for each row."""

    def __init__(
        self, p: Panels, x: Any, y: Any, compute: str, stream: int, placed: bool = False
    ) -> None:
        m, k = x.shape
        kind, y_kind = _kind_of(x.dtype), _kind_of(y.dtype)
        assert kind is not None
        assert y_kind is not None
        problem, self.split = _problem(p, m, compute, kind, y)
        self.plan = pl = plan(problem)
        self.panels, self.stream, self.m = p, stream, m
        self.act, self.rows = problem.act, problem.m
        worth = p.worth(problem.act)
        # float32 activations meet the whole of a table, others its entries as rounded.
        self.tables = worth.tables if self.split else worth.tables[:1]
        self.books = [p.table(t) for t in self.tables] or [0]
        places = p.chunks * CHUNK
        self.width = problem.width
        plain = (
            (not p.grouped_rows or p.group == p.padded)
            and x.strides[1] == x.itemsize
            and x.strides[0] % 16 == 0
            and x.data.ptr % 16 == 0
        )
        self.direct = placed or (
            plain and self.width == 2 and not self.split and kind == self.act and k % 8 == 0
        )
        self.x_step, self.y_step = x.strides[0], y.strides[0]
        self.places = places
        a = self.act_args = _ActArgs()
        a.x_row, a.x_col = _strides(x)
        a.y_row, a.y_col = _strides(y)
        a.m, a.n, a.k, a.places = m, p.rows, k, places
        a.group, a.padded = p.group, p.padded
        a.kind, a.y_kind = kind, y_kind
        a.out_kind = 2 if self.split else 5 if self.act == E4M3 else self.act
        a.plain = plain and kind in (0, 1, 2) and k % 16 == 0
        a.tables = len(self.books)
        # What the integer 1 is worth goes into the scale of the row.
        if self.width == 1:
            a.step = p.row_step(self.act)
        length = _LENGTHS.get(compute)
        segments = p.segments(length)
        self.scales = m * (segments.number if length else 1)
        if length:
            a.length, a.segment, a.segments = length, segments.places, segments.number
        self.row_bytes = x.strides[0] if self.direct else places * self.width
        k_bytes = self.width * k if self.direct else self.row_bytes
        g = self.args = _GemmArgs()
        for i, plane in enumerate(p.planes):
            g.planes[i] = plane.data.ptr
        two_level = problem.scale == 3
        g.scales = (p.inner if two_level else segments.scales).data.ptr
        g.outer = p.outer.data.ptr if two_level else None
        g.zeros = None if segments.zeros is None else segments.zeros.data.ptr
        g.work = workspace(
            p.device, stream, "sums", pl.grid[1] * 2 * pl.grid[0] * pl.rows * pl.tokens * 4
        )
        flags = max(pl.row_blocks, pl.grid[0] * pl.threads // 32)
        g.counters = workspace(p.device, stream, "counters", pl.grid[1] * flags * 4)
        g.ldx = self.row_bytes
        g.y_row, g.y_col = (p.rows, 1) if self.split else _strides(y)
        size = 4 if self.split else y.itemsize
        g.wide = (
            g.y_col == 1
            and g.y_row % 4 == 0
            and p.rows % 4 == 0
            and (self.split or y.data.ptr % min(4 * size, 16) == 0)
        )
        g.m, g.n, g.n_padded, g.k_bytes = self.rows, p.rows, p.n_padded, k_bytes
        g.chunks, g.groups = p.chunks, segments.number
        g.chunks_per_group = max(segments.places // CHUNK, 1) if problem.grouped else 1
        g.row_blocks, g.y_kind, g.mul, g.sub = pl.row_blocks, y_kind, p.mul, p.sub
        if self.split:
            g.y_kind = 2
        g.unit = a.step if self.width == 1 else (worth.unit if worth.kind else 1.0) * p.tensor
        g.per, g.rest = divmod(pl.units, pl.grid[0] // pl.split)
        g.whole = pl.whole
        self.lines = problem.lines and pl.nest == "hopper"
        self.box = None
        if has_wgmma(p.device):
            self.box = self.rows, k_bytes, self.row_bytes, pl.tokens, self.width
        self.kernel = kernel(p.device, f"{pl.nest}.cu", pl.nest, pl.defines)
        if self.width == 1 and not length:
            self.prepare, self.blocks, self.threads = quantiser(
                p.device, m, k, bool(a.plain) and kind < 2
            )
        elif not self.direct:
            name, self.blocks, self.threads = "quantise_groups" if length else "place", m, 256
            self.prepare = kernel(p.device, "activations.cu", name)
        if self.split:
            self.combine = kernel(p.device, "activations.cu", "combine")

    def __call__(self, x: int, y: int, bias: int, given: Any, cupy: Any) -> None:
        """Launch on operands at these addresses."""
        # Launching copies the arguments, so a copy per call is enough for threads to share this.
        args = _GemmArgs.from_buffer_copy(self.args)
        scale = given
        if not self.direct:
            held = _scratch(self.rows * self.places * self.width, np.uint8, self.stream, cupy)
            if self.width == 1:
                scale = _scratch(self.scales, np.float32, self.stream, cupy)
            self._prepare(x, held.data.ptr, scale)
            x = held.data.ptr
            if given is not None:
                scale = given
        args.x = x
        args.row_scale = None if scale is None else scale.data.ptr
        boxes = [] if self.box is None else [tensor_map(x, *self.box)]
        if self.lines:
            boxes.append(tensor_map(y, self.m, 2 * self.panels.rows, self.y_step, 32, 2))
        if not self.split:
            args.bias, args.y = bias, y
            args.book = self.books[0]
            self._launch(args, boxes)
            return
        part = self.rows * self.panels.rows
        sums = _scratch(part * len(self.books), np.float32, self.stream, cupy)
        for i, book in enumerate(self.books):
            args.y, args.book = sums.data.ptr + 4 * part * i, book
            self._launch(args, boxes)
        self._combine(sums.data.ptr, y, bias)

    def _launch(self, args: _GemmArgs, boxes: Any) -> None:
        pl = self.plan
        launch = self.kernel.launch
        launch(pl.grid, pl.threads, pl.shared, self.stream, args, *boxes, early=True)

    def _prepare(self, x: int, out: int, scale: Any) -> None:
        a = _ActArgs.from_buffer_copy(self.act_args)
        a.x, a.out = x, out
        if self.width == 1:
            a.scale = scale.data.ptr
            grid = self.blocks or self.m, 1
            self.prepare.launch(grid, self.threads, 0, self.stream, a, early=True)
            return
        blocks, row = min(-(-self.places // 256), 64), self.places * 2 * (3 if self.split else 1)
        for first in range(0, self.m, 65535):
            a.m = min(65535, self.m - first)
            a.x, a.out = x + first * self.x_step, out + first * row
            self.prepare.launch((blocks, a.m), 256, 0, self.stream, a, early=True)

    def _combine(self, sums: int, y: int, bias: int) -> None:
        a = _ActArgs.from_buffer_copy(self.act_args)
        a.bias = bias
        n = self.panels.rows
        for first in range(0, self.m, 65535):
            count = min(65535, self.m - first)
            a.parts_in, a.y = sums + first * 3 * n * 4, y + first * self.y_step
            grid = min(-(-n // 256), 64), count
            self.combine.launch(grid, 256, 0, self.stream, a, early=True)
