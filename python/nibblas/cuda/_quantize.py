"""Quantising arrays of a device there, with the bits of the CPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formats import Element, Format
from ..qtensor import QTensor, _Storage
from ._launch import arch, kernel
from ._panels import Storage, is_dense
from ._product import _import, _kind_of
from ._worth import line

__all__ = ["quantize"]

_MODES = ("floor", "rceil", "ceil", "even")
_STORED = {"f32": (0, np.float32), "f16": (1, np.float16), "bf16": (2, np.uint16)}
_STORED["e8m0"] = 3, np.uint8


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "packed", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("bounds", "flag", "cuts", "order", "sorted")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_col")),
        *((name, ctypes.c_int) for name in ("kind", "n", "k", "group", "groups")),
        *((name, ctypes.c_int) for name in ("bits", "row_bytes", "fit", "code", "stored")),
        *((name, ctypes.c_int) for name in ("mode", "mantissa", "count", "lowest", "highest")),
        *((name, ctypes.c_int) for name in ("zero", "nan")),
        *((name, ctypes.c_float) for name in ("divisor", "top", "unit")),
    ]


class _Book(NamedTuple):
    """Where numbers belong among the values of a table."""

    cuts: NDArray[np.int32]
    order: NDArray[np.uint8]
    sorted: NDArray[np.float32]


def _key(v: NDArray[np.float32]) -> NDArray[np.int64]:
    """Order floats as integers, -0 below 0."""
    b = v.view(np.int32).astype(np.int64)
    return np.where(b < 0, b ^ 0x7FFFFFFF, b)


def _number(k: int) -> float:
    bits = k ^ 0x7FFFFFFF if k < 0 else k
    return float(np.array([bits], np.int64).astype(np.int32).view(np.float32)[0])


@functools.cache
def _book(name: str) -> _Book:
    values = Format(name).element.values
    finite = np.flatnonzero(np.isfinite(values))
    keys = _key(values)
    ordered = sorted(finite.tolist(), key=lambda u: (keys[u], u))
    order = [u for i, u in enumerate(ordered) if i == 0 or keys[u] != keys[ordered[i - 1]]]
    down = name in ("nf4", "nf3", "af4", "dyn8", "udyn8")
    cuts = []
    for a, b in itertools.pairwise(order):
        low, high = float(values[a]), float(values[b])
        if low == high:
            cuts.append(-1)
            continue
        middle = (low + high) / 2
        k = int(_key(np.array([middle], np.float32))[0])
        if _number(k) > middle:
            k -= 1
        if _number(k) == middle:
            up = not down and (abs(high) < abs(low) if name == "fp4_bnb" else b % 2 == 0)
            # Half-way is both zeros where it is 0.
            k = {(False, True): 0, (True, True): -2}.get((up, middle == 0), k - 1 if up else k)
        cuts.append(k)
    return _Book(
        np.array(cuts, np.int32), np.array(order, np.uint8), values[order].astype(np.float32)
    )


def _rule(fmt: Format, element: Element) -> dict[str, Any] | None:
    """Return how a format is quantised, None where the CPU has to."""
    name, values = element.name, element.values
    if fmt.scale not in _STORED or not is_dense(fmt):
        return None
    if name in ("ternary", "bipolar1"):
        return None  # a mean in double precision, in an order of its own
    if element.shared:
        return None  # one scale for the whole tensor
    top = float(np.abs(values[np.isfinite(values)]).max())
    rule: dict[str, Any] = {"unit": 1.0, "top": top, "divisor": 1.0, "fit": 0}
    rule |= {"highest": element.levels - 1, "lowest": 0, "zero": 0, "nan": element.nan}
    if element.linear:
        mul, sub, unit = line(element)
        rule |= {"code": mul - 1, "unit": unit, "zero": sub, "top": abs(float(values[-1]))}
        if not element.zeros and mul == 1:
            rule["lowest"] = 1
        rule["divisor"] = rule["top"] / unit
        if element.zeros:
            rule |= {"fit": 1, "zero": 0}
    else:
        rule["code"] = 2
        zero = np.flatnonzero(_key(values) == 0)  # +0
        rule["zero"] = int(zero[0]) if len(zero) else 0
        codebook = name in ("nf4", "nf3", "af4", "fp4_bnb", "dyn8", "udyn8")
        rule["divisor"] = 1.0 if codebook else top
    if fmt.scale == "e8m0":
        mode = str(fmt).rpartition("_")[2]
        rule |= {"fit": 2, "mode": _MODES.index(mode) if mode in _MODES else 0}
        mantissas = {"mxfp4": 1, "mxfp6_e3m2": 2, "mxfp6_e2m3": 3, "mxfp8_e4m3": 3}
        rule["mantissa"] = {**mantissas, "mxfp8_e5m2": 2, "mxint8": 6}.get(name, 0)
    return rule


def quantize(x: Any, fmt: Format, axis: int) -> QTensor | None:
    """Quantise a matrix of a device by the ``rtn`` rule, into a tensor there.

    None where the CPU has to: rules that are not closed forms, arrays that are not floats, and
    values it would refuse, which it names.
    """
    import cupy

    rule = _rule(fmt, fmt.element)
    x = _import(x, cupy)
    kind = _kind_of(x.dtype)
    if rule is None or kind is None or kind > 3 or x.ndim != 2 or 0 in x.shape:
        return None
    device = int(x.device.id)
    arch(device)
    transposed = axis % 2 == 0
    if transposed:
        x = x.T
    n, k = x.shape
    groups, row_bytes = fmt.groups(k), fmt.row_bytes(k)
    stored, dtype = _STORED[fmt.scale]
    with cupy.cuda.Device(device):
        stream = int(cupy.cuda.get_current_stream().ptr)
        codes = cupy.empty((n, k), np.uint8)
        packed = cupy.empty((n, row_bytes), np.uint8)
        scales = cupy.empty((n, groups), dtype)
        zeros = cupy.empty((n, groups), np.uint8) if fmt.has_zeros else None
        bounds = cupy.empty((n, groups), np.float32)
        flag = cupy.zeros(1, np.int32)
        a = _Args(
            x.data.ptr, codes.data.ptr, packed.data.ptr, scales.data.ptr,
            None if zeros is None else zeros.data.ptr, bounds.data.ptr, flag.data.ptr,
        )  # fmt: skip
        a.x_row, a.x_col = (s // x.itemsize for s in x.strides)
        a.kind, a.n, a.k, a.groups, a.bits, a.row_bytes = kind, n, k, groups, fmt.bits, row_bytes
        a.group = min(fmt.group or k, k)
        a.stored = stored
        for name, value in rule.items():
            setattr(a, name, value)
        held = []
        if rule["code"] == 2:
            book = _book(fmt.element.name)
            held = [cupy.asarray(part) for part in book]
            a.cuts, a.order, a.sorted = (part.data.ptr for part in held)
            a.count = len(book.cuts)
        warps = -(-n * groups // 8)
        kernel(device, "quantize.cu", "quantize").launch((warps, 1), 256, 0, stream, a)
        pack = kernel(device, "quantize.cu", "pack_codes")
        pack.launch((-(-n * row_bytes // 256), 1), 256, 0, stream, a)
        if int(flag[0]):
            return None
        arrays = {"codes": packed.get(), "scales": scales.get()}
        if zeros is not None:
            arrays["zeros"] = zeros.get()
        host = _Storage(fmt, n, k, arrays, bounds.get())
        return QTensor._wrap(Storage(host, device), transposed)
