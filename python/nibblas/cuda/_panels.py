"""Tensors on a device: where they are, and the order of their codes there."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formats import Format
from ..qtensor import _E4M3, _powers, _Storage
from ._launch import arch, kernel, tensor_map
from ._plan import CHUNK, S8, Plan, padded_group, plan
from ._worth import Worth, integers, is_paired, known, line, worth

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "BitPlanes",
    "Panels",
    "Storage",
    "is_dense",
    "panels_on",
    "place",
    "require",
    "row_scales",
]


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


class _PackArgs(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("n", "k", "bits", "plane_bits", "below")),
        *((name, ctypes.c_int) for name in ("group", "padded", "chunks", "paired", "fill")),
    ]


class BitPlanes:
    """The bits of bipolar codes, plane after plane, with the sums of the codes of each row."""

    def __init__(self, bits: int, rows: int, cols: int, device: int) -> None:
        import cupy

        self.bits, self.rows, self.cols, self.device = bits, rows, cols, device
        self.chunks = max(-(-cols // 1024), 1)
        self.planes = cupy.empty(bits * rows * self.chunks * 128, cupy.uint8)
        self.sums = cupy.empty(rows, cupy.int32)
        self.scales = cupy.empty(rows, cupy.float32)

    @classmethod
    def of(cls, host: _Storage, device: int) -> BitPlanes:
        """Make those of a matrix; its rows are padded, so that every tile is there."""
        import cupy

        with cupy.cuda.Device(device):
            rows = -(-max(host.rows, 1) // 256) * 256
            made = cls(host.format.bits, rows, host.cols, device)
            codes = cupy.asarray(host.codes)
            size = made.planes.size
            made.scales.set(np.resize(row_scales(host), rows))
            stream = int(cupy.cuda.get_current_stream().ptr)
            args = _PackArgs(codes.data.ptr, made.planes.data.ptr, size, host.codes.shape[1])
            args.n, args.k, args.bits = host.rows, host.cols, made.bits
            args.padded, args.chunks = rows, made.chunks
            kernel(device, "pack.cu", "planes").launch((-(-size // 256), 1), 256, 0, stream, args)
            args.codes, args.out = made.planes.data.ptr, made.sums.data.ptr
            kernel(device, "pack.cu", "code_sums").launch((rows, 1), 128, 0, stream, args)
            cupy.cuda.get_current_stream().synchronize()
        return made

    def boxes(self, box_rows: int) -> Any:
        """Return the tensor map of the planes."""
        stride = self.chunks * 128
        return tensor_map(self.planes.data.ptr, self.bits * self.rows, stride, stride, box_rows, 1)


def _plane_bits(bits: int) -> list[int]:
    return [b for b in (8, 4, 2, 1) if bits & b]


class Segments(NamedTuple):
    """Stretches of K whose sums are scaled at once."""

    places: int
    number: int
    scales: Any
    """[number][rows, padded]."""
    zeros: Any


class Panels:
    """The codes of a matrix on a device, in the order of the tensor cores' registers."""

    def __init__(self, host: _Storage, device: int) -> None:
        import cupy

        fmt, element = host.format, host.format.element
        if not is_dense(fmt):
            raise ValueError(f"{fmt} is not available on CUDA")
        self.device = device
        self.host = host
        self.element = element
        self.held_planes: BitPlanes | None = None
        self.held_segments: dict[int, Segments] = {}
        self.books: dict[bytes, Any] = {}
        # Products as they were last prepared, by everything that they depend on.
        self.calls: dict[Any, Any] = {}
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
        # A pair of codes of up to four bits is a byte where a table says what they are worth.
        self.paired = is_paired(element)
        self.bits = 4 if self.paired else element.bits
        self.tensor = float(np.float32(host.tensor))
        unit = 1.0
        if element.linear:
            self.mul, self.sub, unit = line(element)
            most = max(-element.minimum, element.maximum)
        else:
            self.mul, self.sub = 1, 0
            most = int(np.abs(integers(element)[0].astype(np.int32)).max())
        # Codes whose offset is the top bit of their field; scales that a power of two divides.
        tops = element.linear and (self.mul, self.sub) == (1, 1 << (element.bits - 1))
        self.lift = tops and element.bits in (2, 4) and host.zeros is None
        self.lift &= "row_scales" not in host.arrays()
        zeros = host.zeros
        self.zero = 0 if zeros is None else 2 if zeros.dtype.kind == "f" else 1
        whole = zeros is not None and self.zero == 1 and zeros.size > 0
        self.zero_top = int(zeros.max()) if zeros is not None and whole else 0
        span = 255 if zeros is not None else most
        self.longest = span * 127 * (self.padded if self.grouped_rows else self.chunks * CHUNK)
        scales, self.scale = _device_scales(host, unit)
        if self.scale == 0 and scales.size:
            sizes = np.abs(scales)
            self.lift &= not bool(((sizes > 0) & (sizes < 2.0**-110)).any())
        self.lift &= 128 * 127 * self.chunks * CHUNK < 1 << 31
        with cupy.cuda.Device(device):
            self.scales = self._per_group(cupy, scales, groups)
            # Of two levels, for products in int8: bytes of groups, scales of rows.
            self.inner: Any = None
            self.outer: Any = None
            outer = host.array("row_scales")
            if outer is not None:
                self.inner = self._per_group(cupy, host.scales, groups)
                self.outer = cupy.zeros(self.n_padded, np.float32)
                self.outer[: self.rows] = cupy.asarray(outer)
                self.longest = 127 * 127 * self.chunks * CHUNK
            self.zeros = None if zeros is None else self._per_group(cupy, zeros, groups)
            self.planes: list[Any] = []
            codes = cupy.asarray(host.codes)
            self.finite = bool(np.isfinite(element.values).all()) or not _has_specials(
                cupy, codes, element.values
            )
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
                        element.bits,
                        pb,
                        below,
                        self.group,
                        self.padded,
                        self.chunks,
                        self.paired,
                        outer is not None,
                    )
                    stream = cupy.cuda.get_current_stream()
                    k = kernel(device, "pack.cu", "pack")
                    k.launch((-(-words // 256), 1), 256, 0, stream.ptr, args)
                self.planes.append(out)
                below += pb
            # Other streams may use the panels as soon as they are here.
            cupy.cuda.get_current_stream().synchronize()

    def table(self, values: NDArray[Any]) -> int:
        """Return the address of a table on the device."""
        import cupy

        key = values.tobytes()
        if key not in self.books:
            self.books[key] = cupy.asarray(values)
            cupy.cuda.get_current_stream().synchronize()
        return int(self.books[key].data.ptr)

    def worth(self, act: int) -> Worth:
        """Return how products in a class of arithmetic decode the codes."""
        return worth(self.element, act, self.finite)

    def row_step(self, act: int = S8) -> np.float32:
        """Return what 1 of a weight is worth beside its scales, in products of bytes."""
        worth = self.worth(act)
        return np.float32(worth.unit if worth.kind else 1.0) * np.float32(self.tensor)

    def segments(self, length: int | None) -> Segments:
        """Return the stretches of K with one scale of the weights, and one of the activations.

        `length` is that of the activations' groups, None for one scale per row.
        """
        if length is None:
            return Segments(self.padded, self.groups, self.scales, self.zeros)
        held = self.held_segments.get(length)
        if held is None:
            import cupy

            whole = self.padded if self.grouped_rows else self.chunks * CHUNK
            places = min(length, whole)
            times = whole // places
            zeros = self.zeros
            held = Segments(
                places,
                self.groups * times,
                cupy.repeat(self.scales, times, axis=0),
                None if zeros is None else cupy.repeat(zeros, times, axis=0),
            )
            cupy.cuda.get_current_stream().synchronize()
            self.held_segments[length] = held
        return held

    def _per_group(self, cupy: Any, a: NDArray[Any], groups: int) -> Any:
        wide = np.zeros((groups, self.n_padded), a.dtype)
        if a.size:
            wide[:, : self.rows] = a.T
        return cupy.asarray(wide)

    def bit_planes(self) -> BitPlanes:
        """Return the bit planes, made on first use."""
        if self.held_planes is None:
            self.held_planes = BitPlanes.of(self.host, self.device)
        return self.held_planes

    def plan(self, m: int, compute: str, kind: int) -> Plan:
        """Return the plan of a product with `m` rows of activations."""
        from ._product import _problem

        return plan(_problem(self, m, compute, kind)[0])

    def call(self, x: Any, y: Any, compute: str, stream: int, placed: bool = False) -> Any:
        """Prepare a product for operands like these."""
        from ._product import _Call

        return _Call(self, x, y, compute, stream, placed)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = [*self.planes, self.scales, *([] if self.zeros is None else [self.zeros])]
        return sum(int(a.nbytes) for a in parts)


def make_panels(host: _Storage, device: int) -> Panels:
    """Return the panels of a matrix on a device."""
    if host.format.structure is None:
        return Panels(host, device)
    from ._sparse import panels_of

    return panels_of(host, device)


def is_dense(fmt: Format) -> bool:
    """Whether a matrix is codes that kernels know with a scale per group, and nothing else."""
    parts = {p.name: p.along for p in fmt.parts(1, 1)}
    arrays = {"codes", "scales", "zeros", "row_scales", "tensor_scale"}
    if not parts.keys() <= arrays or parts.get("scales") != "groups" or fmt.is_plain:
        return False
    return known(fmt.element)


def _has_specials(cupy: Any, codes: Any, values: NDArray[np.float32]) -> bool:
    """Whether a code of eight bits stands for NaN or an infinity."""
    special = cupy.asarray(~np.isfinite(values))
    return bool(special[codes].any())


def _device_scales(host: _Storage, unit: float) -> tuple[NDArray[Any], int]:
    """Return scales times `unit` as the kernels read them, and which way that is."""
    scales, kind = host.scales, host.format.scale
    if kind == "e8m0":
        powers = scales.astype(np.int32) + int(np.log2(unit))
        if powers.size == 0 or (powers.min() > 0 and scales.max() < 255):
            return powers.astype(np.uint8), 2
        with np.errstate(over="ignore"):  # NaN is made of an infinity
            return _powers(scales) * np.float32(unit), 0
    if kind == "i8":
        rows = host.array("row_scales")
        assert rows is not None
        return scales * rows[:, None], 0
    if kind == "e4m3":
        return _E4M3[scales].astype(np.float16), 1
    if kind == "bf16":
        return (scales.astype(np.uint32) << 16).view(np.float32), 0
    return scales, int(kind == "f16")


class Storage(_Storage):
    """A matrix on a device; the portable bytes stay on the host beside it."""

    __slots__ = ("number", "panels")

    def __init__(self, host: _Storage, number: int) -> None:
        super().__init__(host.format, host.rows, host.cols, host.arrays(), host.bounds)
        self.number = number
        self.device = f"cuda:{number}"
        self.panels = make_panels(host, number)

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


def row_scales(host: _Storage) -> NDArray[np.float32]:
    """Return the scales of a matrix with one per row."""
    scales, kind = _device_scales(host, line(host.format.element)[2])
    wide = np.ldexp(np.float32(1), scales.astype(np.int32) - 127) if kind == 2 else scales
    return wide[:, 0].astype(np.float32)


def panels_on(storage: _Storage, device: int) -> Panels:
    """Return the panels of a matrix on a device, made where they are not there."""
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
        held = storage.copies[device] = make_panels(storage, device)
    return held
