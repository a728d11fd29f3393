"""Sparse weights on a device: stored as kept entries, multiplied as dense; see sparse.cuh."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..qtensor import _Storage
from ._launch import device_properties, has_wgmma, kernel, tensor_map, workspace
from ._panels import Panels
from ._plan import BF16, F16, S8, Plan
from ._product import _ActArgs, _Call, _GemmArgs, _kind_of, _scratch, _strides, quantiser

__all__ = [
    "Records",
    "SparseCall",
    "SparseCut",
    "SparsePanels",
    "SparseProblem",
    "build_sparse",
    "most_rows",
    "panels_of",
    "plan_sparse",
]

# Which structure a record has; see sparse.cuh.
ENTRIES, PAIRS, FOURS, GROUPS, TILES = 1, 2, 3, 4, 5
ROWS, PLACES = 32, 128
# Places of a record along K.
_RECORD = {ENTRIES: 256, PAIRS: 256, FOURS: 128, GROUPS: 128, TILES: 128}
# int8 among the element types of activations.
_INT8 = 4
_FOURS_BYTES = {2: 4608, 1: 2560}
# Below this fraction of kept entries a pair at a time is quicker: fewer reads of shared memory for
# more bytes. By the bytes of a number.
_PAIRS_BELOW = {2: 0.15, 1: 0.25}
# Tiles that a product takes at once are kept whole where that is not much more than the entries.
_TILES_BELOW = 1.2


# What a record costs beside its bytes, as so many bytes more.
_STEADY = {ENTRIES: 16384, PAIRS: 8192, FOURS: 512, GROUPS: 2048, TILES: 5120}
# Of a grid along the rows of weights.
_MOST_BLOCKS = 288

_MOST_ROWS = {
    ("int8", PAIRS): 64,
    ("int8", FOURS): 64,
    ("int8", TILES): 64,
    ("int4", GROUPS): 16,
}


def most_rows(element: str, structure: int, kept: float) -> int | None:
    """Return the rows of activations above which dense panels are quicker than records.

    Then arithmetic decides, and a product makes such panels beside. None for numbers, which have
    none.

    Parameters
    ----------
    element : str
        Name of the entries.
    structure : int
        Of the records.
    kept : float
        Fraction of the entries.
    """
    if element == "int8" and structure == ENTRIES:
        return 32 if kept < 0.52 else 16 if kept < 0.7 else 0
    return _MOST_ROWS.get((element, structure))


class _SparseArgs(_GemmArgs):
    _fields_ = [  # noqa: RUF012
        ("offsets", ctypes.c_void_p),
        ("slot", ctypes.c_int),
        ("records", ctypes.c_int),
        ("starts", ctypes.c_int * (_MOST_BLOCKS + 1)),
    ]


class _PackArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "offsets", "records")),
        *((name, ctypes.c_int) for name in ("n", "k", "chunks", "tiles", "structure", "bytes")),
    ]


class _GroupArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "offsets", "records")),
        ("row_bytes", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("n", "k", "chunks", "tiles")),
        *((name, ctypes.c_int) for name in ("groups", "chunks_per_group")),
    ]


class SparseProblem(NamedTuple):
    """What a launch of ``sparse.cu`` depends on."""

    m: int
    """Rows of activations."""
    tiles: int
    """Runs of 32 rows of weights."""
    chunks: int
    """Records along K."""
    act: int
    """0 float16, 1 bfloat16, 2 int8."""
    structure: int
    """1 bitmap of entries, 2 of pairs, 3 two of four, 4 groups, 5 tiles."""
    longest: tuple[int, int, int]
    """Bytes of the longest record, and of the longest two and four that follow each other."""
    mean: int
    """Bytes of a record, on average."""
    multiprocessors: int
    shared_limit: int
    natural: bool = False
    """Whether int8 activations are in the order of K, with scale 1."""


class SparseCut(NamedTuple):
    """How a launch is cut."""

    wr: int
    """Warps along the rows of weights, of 32 each."""
    wk: int
    """Warps along K."""
    resident: int = 1
    """Blocks of a multiprocessor."""
    span: int = 1
    """Records that are copied together."""
    stages: int = 6
    """Such runs in flight, at most."""
    drain: int = 1
    """Warps that bring sums away."""
    turns: bool = False
    """Whether warps along K add up in one place, in turn; so with many rows."""
    together: int = 3
    """Columns of sums that such a warp reads at once, at most."""


def _tokens(p: SparseProblem) -> int:
    """Return the rows of activations of a block."""
    most = 16 if p.structure == GROUPS else 64
    if p.act == S8 and p.structure in (ENTRIES, PAIRS):
        most = 32
    return min(next((t for t in (8, 16, 32) if p.m <= t), 64), most)


def _turns(tokens: int, cut: SparseCut) -> bool:
    return cut.turns or tokens >= 32


def _beside_rings(p: SparseProblem, cut: SparseCut, stages: int) -> int:
    """Return the bytes of shared memory that are not rings of records."""
    tokens = _tokens(p)
    x = tokens * _RECORD[p.structure] * cut.span * (1 if p.act == S8 else 2)
    planes = 1 if _turns(tokens, cut) else cut.wk
    return 1024 + cut.wk * stages * x + planes * tokens * (ROWS * cut.wr + 4) * 4


def build_sparse(p: SparseProblem, cut: SparseCut) -> Plan:
    """Return the launch of a cut."""
    wr, wk = cut.wr, cut.wk
    tokens, rows, warps = _tokens(p), ROWS * wr, wr * wk
    # The barriers take some, too. Few numbers of stages make few kernels.
    limit = (p.shared_limit + 1024) // cut.resident - 3072
    longest, mean = p.longest[cut.span // 2], p.mean * cut.span
    for stages in (n for n in (6, 4, 3, 2) if n <= cut.stages):
        beside = _beside_rings(p, cut, stages)
        ring = min((limit - beside) // warps // 128 * 128, stages * longest)
        if ring >= max(longest, stages * mean):
            break
    ring = max(ring, longest)
    shared = beside + warps * ring
    resident = max(1, min(cut.resident, (p.shared_limit + 1024) // (shared + 3072)))
    m_blocks = -(-p.m // tokens)
    row_blocks = -(-p.tiles // wr)
    units = row_blocks * -(-p.chunks // cut.span)
    # A span of fewer chunks than warps would leave warps without work.
    blocks = min(units // wk, p.multiprocessors * resident // m_blocks, _MOST_BLOCKS)
    blocks = max(1, blocks)
    defines = (
        ("STRUCTURE", p.structure),
        ("ACT", p.act),
        ("NT", tokens // 8),
        ("WR", wr),
        ("WK", wk),
        ("SPAN", cut.span),
        ("STAGES", stages),
        ("RESIDENT", resident),
        ("DRAIN", cut.drain),
        ("TURNS", int(_turns(tokens, cut))),
        ("TOGETHER", cut.together),
        ("NATURAL", int(p.natural)),
        ("SETS", 2 if p.structure == GROUPS and p.act == F16 and tokens == 8 else 1),
    )
    size = (blocks, m_blocks)
    threads = 32 * (cut.drain + warps + wk)
    return Plan("sparse", defines, size, threads, shared, row_blocks, rows, tokens, units, False)


def ring_of(p: SparseProblem, pl: Plan) -> int:
    """Return the bytes of the ring of a warp."""
    d = dict(pl.defines)
    cut = SparseCut(d["WR"], d["WK"], span=d["SPAN"], turns=bool(d["TURNS"]))
    return (pl.shared - _beside_rings(p, cut, d["STAGES"])) // (cut.wr * cut.wk)


def spans(sizes: NDArray[np.integer[Any]], steady: int, pl: Plan) -> NDArray[np.int64]:
    """Return where the spans of the blocks of a plan begin, and where the last one ends.

    `sizes` are the bytes of the records, an array (tiles, records of a row). Spans have equally
    many units, but where that is far from equal work.
    """
    d = dict(pl.defines)
    wr, span, blocks = d["WR"], d["SPAN"], pl.grid[0]
    even = pl.units * np.arange(blocks + 1) // blocks
    tiles, records = sizes.shape
    work = np.zeros((pl.row_blocks * wr, pl.units // pl.row_blocks * span), np.int64)
    work[:tiles, :records] = sizes
    work[:tiles, :records] += steady
    ends = work.reshape(pl.row_blocks, wr, -1, span).sum(axis=(1, 3)).cumsum()
    ends = np.concatenate([[0], ends])
    if np.diff(ends[even]).max() * blocks <= 1.05 * ends[-1]:
        # What a span has of its last row of records is more than a little, or nothing: a block
        # would multiply that before it has brought away the sums of the row ahead of it.
        rest = even % (pl.units // pl.row_blocks)
        return np.asarray(even - np.where(20 * rest <= pl.units // blocks, rest, 0))
    equal: NDArray[np.int64] = np.searchsorted(ends, ends[-1] * np.arange(blocks + 1) / blocks)
    equal[0], equal[-1] = 0, pl.units
    # No span is empty.
    first = np.arange(blocks + 1)
    equal = first + np.maximum.accumulate(equal - first)
    return np.asarray(np.minimum(equal, pl.units - blocks + first))


# As measured, by eights of rows of activations. Warps of a multiprocessor come in fours, so those
# that drain are what is left.
_WIDE, _DEEP, _LEAN = SparseCut(4, 3, drain=5), SparseCut(4, 2, drain=6), SparseCut(4, 2, drain=2)
_FULL, _TALL = SparseCut(4, 4, drain=4), SparseCut(8, 1, drain=3, together=8)
_CUTS = {
    ENTRIES: {1: _WIDE, 2: _LEAN._replace(together=8), 4: _DEEP, 8: _TALL},
    PAIRS: {1: _WIDE, 2: _DEEP, 4: _DEEP, 8: _TALL},
    FOURS: {1: _WIDE, 2: _DEEP, 4: _DEEP._replace(together=6), 8: _DEEP._replace(together=2)},
    GROUPS: {
        1: SparseCut(4, 3, span=2, stages=3, drain=1, together=8),
        2: SparseCut(4, 2, span=2, drain=6),
    },
    TILES: {1: _LEAN, 2: _LEAN, 4: _LEAN, 8: _LEAN},
}
_CUTS_OF_INT8 = {
    ENTRIES: {1: _LEAN, 2: _LEAN, 4: _LEAN._replace(together=2)},
    FOURS: {1: _FULL, 2: _WIDE, 4: _WIDE._replace(together=4), 8: _DEEP._replace(together=4)},
}


def plan_sparse(p: SparseProblem) -> Plan:
    """Return the launch for a problem."""
    eights = _tokens(p) // 8
    cuts = _CUTS_OF_INT8.get(p.structure) if p.act == S8 else None
    first = (cuts or _CUTS[p.structure])[eights]
    small = (SparseCut(wr, 1, drain=3) for wr in (4, 2, 1))
    plans = [build_sparse(p, c) for c in (first, _DEEP, *small)]
    plans = [q for q in plans if q.shared <= p.shared_limit - 2048]
    # Long records: rather fewer warps than rings that hold two and no more.
    deep = (q for q in plans[:2] if ring_of(p, q) >= 2.5 * p.mean * dict(q.defines)["SPAN"])
    return next(deep, plans[0])


class Records:
    """The kept entries of a matrix, in the order of the kernel."""

    def __init__(self, shape: tuple[int, int], structure: int, device: int) -> None:
        self.shape, self.structure, self.device = shape, structure, device
        self.tiles = -(-max(shape[0], 1) // ROWS)
        self.chunks = -(-max(shape[1], 1) // _RECORD[structure])
        self.longest, self.mean = (0, 0, 0), 0
        self.pieces = np.zeros((self.tiles, self.chunks), np.uint32)
        self.records: Any = None
        self.offsets: Any = None

    @classmethod
    def of_numbers(cls, numbers: Any, structure: int, device: int) -> Records:
        """Pack bits of 16-bit numbers, or codes of int8, an array (N, K) of the device."""
        import cupy

        self = cls(numbers.shape, structure, device)
        a = _PackArgs(numbers.data.ptr)
        a.n, a.k, a.chunks, a.tiles = *self.shape, self.chunks, self.tiles
        a.structure, a.bytes = structure, numbers.itemsize
        if structure == FOURS:
            size = _FOURS_BYTES[numbers.itemsize]
            self._place(cupy.full(self.tiles * self.chunks, size // 16, np.uint32))
            self._run("write_fours" if numbers.itemsize == 2 else "write_fours8", a)
        else:
            self._place(self._count("count_units", a))
            self._run("write_units", a)
        return self

    @classmethod
    def of_groups(cls, host: _Storage, device: int) -> Records:
        """Pack a matrix of four-bit codes whose groups are whole chunks."""
        import cupy

        self = cls((host.rows, host.cols), GROUPS, device)
        codes, scales = cupy.asarray(host.codes), cupy.asarray(host.scales)
        a = _GroupArgs(codes.data.ptr, scales.data.ptr)
        a.row_bytes = host.codes.shape[1]
        a.n, a.k, a.chunks, a.tiles = *self.shape, self.chunks, self.tiles
        a.groups = scales.shape[1]
        a.chunks_per_group = min(host.format.group or PLACES, PLACES * self.chunks) // PLACES
        self._place(self._count("count_groups", a))
        self._run("write_groups", a)
        return self

    def _run(self, name: str, a: Any) -> None:
        import cupy

        a.offsets, a.records = self.offsets.data.ptr, self.records.data.ptr
        grid = (-(-self.tiles * self.chunks // 8), 1)
        stream = cupy.cuda.get_current_stream()
        kernel(self.device, "sparse_pack.cu", name).launch(grid, 256, 0, int(stream.ptr), a)
        # What is packed may go as soon as this returns, and products read what came of it without
        # waiting for kernels ahead of them.
        stream.synchronize()

    def _count(self, name: str, a: Any) -> Any:
        """Return the 16-byte pieces of each record."""
        import cupy

        self.offsets = cupy.empty(self.tiles * self.chunks, np.uint32)
        self.records = self.offsets
        self._run(name, a)
        return self.offsets

    def _place(self, pieces: Any) -> None:
        import cupy

        ends = cupy.zeros(pieces.size + 1, np.uint64)
        ends[1:] = cupy.cumsum(pieces, dtype=np.uint64)
        size = 16 * int(ends[-1])
        if size >= 1 << 36 or pieces.size >= 1 << 30:
            raise ValueError(f"a matrix of shape {self.shape} is too large for CUDA")
        one, two, four = (
            16 * int((ends[n:] - ends[:-n]).max()) for n in (min(n, pieces.size) for n in (1, 2, 4))
        )
        self.longest, self.mean = (one, two, four), size // pieces.size
        self.pieces = pieces.get().reshape(self.tiles, self.chunks)
        self.offsets, self.records = ends.astype(np.uint32), cupy.empty(size, np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.records.nbytes + self.offsets.nbytes)


def _bf16_parts(numbers: NDArray[Any]) -> list[NDArray[np.uint16]]:
    """Return bits of numbers of bfloat16 that add up to those of float16 or float32."""
    rest = numbers.astype(np.float32)
    parts = []
    while rest.any():
        bits = rest.view(np.uint32) & 0xFFFF0000
        parts.append((bits >> 16).astype(np.uint16))
        rest = rest - bits.view(np.float32)
    return parts or [np.zeros(numbers.shape, np.uint16)]


def _tile_entries(numbers: Any, zero: int) -> int:
    """Return how many entries the tiles have that are not all zeros."""
    import cupy

    high, wide = 16, 32 // numbers.itemsize
    n, k = numbers.shape
    total = 0
    # A band at a time: what is compared is as large as the matrix.
    for first in range(0, n, 4096):
        band = numbers[first : first + 4096] != zero
        rows, cols = -(-band.shape[0] // high), -(-k // wide)
        padded = cupy.zeros((rows * high, cols * wide), bool)
        padded[: band.shape[0], :k] = band
        kept = padded.reshape(rows, high, cols, wide).any(axis=(1, 3))
        total += high * wide * int(kept.sum())
    return total


class SparsePanels(Panels):
    """Sparse weights on a device."""

    def __init__(self, host: _Storage, device: int, numbers: Any = None) -> None:
        """Take a matrix of the host, or its numbers or codes (N, K) on the device."""
        import cupy

        self.device, self.host = device, host
        self.element, self.finite = host.format.element, True
        self.rows, self.cols = host.rows, host.cols
        self.chunks = -(-max(self.cols, 1) // PLACES)
        self.tensor, self.grouped_rows = 1.0, False
        self.calls: dict[Any, Any] = {}
        self.longest = 128 * 127 * self.cols
        self.spread: Panels | None = None
        self.scales: Any = None
        self.held: dict[int, list[Records]] = {}
        self.kept = 1.0
        name = self.element.name
        # The class of arithmetic that takes the entries as they are.
        self.own = {"f16": F16, "int8": S8}.get(name, BF16)
        with cupy.cuda.Device(device):
            # Before the records: they wait for all that came before.
            if name == "int8":
                self.scales = cupy.ascontiguousarray(cupy.asarray(host.scales)[:, 0])
            if numbers is not None:
                self.held[self.own] = [self._records(numbers)]
            elif name == "int8":
                codes = cupy.asarray(host.dense().codes)
                self.held[S8] = [self._records(codes)]
            elif name == "int4":
                groups = [Records.of_groups(host.dense(), device)]
                self.held = {F16: groups, BF16: groups}
            else:
                self.parts(self.own)
        self.most = most_rows(name, self.held[self.own][0].structure, self.kept)

    def _records(self, numbers: Any) -> Records:
        """Pack numbers or codes of the device in the structure that is quicker."""
        import cupy

        if self.host.format.structure == "2of4":
            return Records.of_numbers(numbers, FOURS, self.device)
        size = numbers.itemsize
        zero = 128 if size == 1 else 0
        kept = int(cupy.count_nonzero(numbers != zero))
        self.kept = kept / max(numbers.size, 1)
        structure = PAIRS if kept < _PAIRS_BELOW[size] * numbers.size else ENTRIES
        if _tile_entries(numbers, zero) <= _TILES_BELOW * kept:
            structure = TILES
        return Records.of_numbers(numbers, structure, self.device)

    def parts(self, act: int) -> list[Records]:
        """Return matrices that add up to the weights, in a class of arithmetic."""
        held = self.held.get(act)
        if held is None:
            import cupy

            codes = self.host.dense().codes
            shape = self.rows, self.cols
            if act == self.own and self.element.bits == 16:
                numbers = [codes.view(np.uint16).reshape(shape)]
            else:
                floats = codes.view({"f16": "<f2", "f32": "<f4"}[self.element.name])
                numbers = _bf16_parts(floats.reshape(shape))
            held = self.held[act] = [self._records(cupy.asarray(part)) for part in numbers]
        return held

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        unique = {id(r): r for parts in self.held.values() for r in parts}
        more = [self.scales, self.spread]
        return sum(int(a.nbytes) for a in (*unique.values(), *more) if a is not None)

    def act(self, m: int, compute: str, kind: int) -> tuple[int, bool] | None:
        """Return the class of arithmetic, and whether rows are split in three of bfloat16.

        None where the records do not serve, or serve worse than dense panels.
        """
        if self.most is not None and m > self.most:
            return None
        if self.own == S8:
            return (S8, False) if compute == "int8" else None
        if compute == "bf16" and kind == BF16 and len(self.held.get(BF16, ())) == 1:
            return BF16, False
        if compute != "f32":
            return None
        if kind in self.held and len(self.held[kind]) == 1:
            return kind, False
        return BF16, True

    def dense(self, compute: str) -> Panels:
        """Return the panels of the dense matrix, for what the records do not serve."""
        if self.host.format.is_plain:
            raise ValueError(
                f"compute={compute!r} is not available for {self.host.format} on CUDA: expected f32"
            )
        if self.spread is None:
            self.spread = Panels(self.host.dense(), self.device)
        return self.spread

    def problem(self, r: Records, m: int, act: int, natural: bool = False) -> SparseProblem:
        """Return what the plan of a product with `m` rows depends on."""
        shape = r.tiles, r.chunks, act, r.structure, r.longest, r.mean
        return SparseProblem(m, *shape, *device_properties(self.device), natural)

    def plan(self, m: int, compute: str, kind: int) -> Plan:
        """Return the plan of a product with `m` rows of activations."""
        found = self.act(m, compute, kind)
        if found is None:
            return self.dense(compute).plan(m, compute, kind)
        act, split = found
        rows = 3 * m if split else m
        return plan_sparse(self.problem(self.parts(act)[0], rows, act, kind == _INT8))

    def call(self, x: Any, y: Any, compute: str, stream: int, placed: bool = False) -> Any:
        """Prepare a product for operands like these."""
        kind = _kind_of(x.dtype)
        assert kind is not None
        found = self.act(x.shape[0], compute, kind)
        if found is None:
            return self.dense(compute).call(x, y, compute, stream, placed)
        return SparseCall(self, x, y, *found, stream, placed)


class SparseCall(_Call):
    """Everything about a product with sparse weights but where the operands are."""

    def __init__(
        self,
        p: SparsePanels,
        x: Any,
        y: Any,
        act: int,
        split: bool,
        stream: int,
        placed: bool = False,
    ) -> None:
        m, k = x.shape
        kind, y_kind = _kind_of(x.dtype), _kind_of(y.dtype)
        assert kind is not None
        assert y_kind is not None
        self.panels, self.stream, self.m = p, stream, m
        self.act, self.split, self.rows = act, split, 3 * m if split else m
        self.width = 1 if act == S8 else 2
        parts = p.parts(act)
        self.places = parts[0].chunks * _RECORD[parts[0].structure]
        plain = x.strides[1] == x.itemsize and x.strides[0] % 16 == 0 and x.data.ptr % 16 == 0
        same = kind == (_INT8 if act == S8 else act)
        self.direct = placed or (plain and same and not split and k % 8 == 0)
        self.natural = self.direct and act == S8 and not placed
        self.x_step, self.y_step = x.strides[0], y.strides[0]
        a = self.act_args = _ActArgs()
        a.x_row, a.x_col = _strides(x)
        a.y_row, a.y_col = _strides(y)
        a.m, a.n, a.k, a.places = m, p.rows, k, self.places
        a.group, a.padded = k, self.places
        a.kind, a.y_kind, a.out_kind = kind, y_kind, 2 if split else act
        a.plain = plain and kind in (0, 1, 2) and k % 16 == 0
        a.tables, a.step = len(parts), 1.0
        self.scales = m
        self.row_bytes = x.strides[0] if self.direct else self.places * self.width
        self.k_bytes = self.width * k if self.direct else self.row_bytes
        self.launches = [self._part(r, y, split) for r in parts]
        if act == S8 and not self.direct:
            lines = bool(a.plain) and kind < 2
            self.prepare, self.blocks, self.threads = quantiser(p.device, m, k, lines)
        elif not self.direct:
            self.prepare = kernel(p.device, "activations.cu", "place")
        if split:
            self.combine = kernel(p.device, "activations.cu", "combine")

    def _part(self, r: Records, y: Any, split: bool) -> tuple[Plan, Any, _SparseArgs]:
        """Return the launch of one of the matrices that add up to the weights."""
        p = self.panels
        assert isinstance(p, SparsePanels)
        problem = p.problem(r, self.rows, self.act, self.natural)
        pl = plan_sparse(problem)
        g = _SparseArgs()
        g.planes[0], g.offsets = r.records.data.ptr, r.offsets.data.ptr
        span = dict(pl.defines)["SPAN"]
        g.slot, g.records = ring_of(problem, pl), r.chunks
        g.scales = None if p.scales is None else p.scales.data.ptr
        g.starts[: pl.grid[0] + 1] = spans(
            16 * r.pieces.astype(np.int64), _STEADY[r.structure], pl
        ).tolist()
        sums = pl.grid[1] * pl.grid[0] * pl.rows * pl.tokens * 4
        g.work = workspace(p.device, self.stream, "sums", sums)
        counters = pl.grid[1] * pl.row_blocks * 4
        g.counters = workspace(p.device, self.stream, "counters", counters)
        g.ldx = self.row_bytes
        g.y_row, g.y_col = (p.rows, 1) if split else _strides(y)
        lines = g.y_col == 1 and g.y_row % 4 == 0 and p.rows % 4 == 0
        g.wide = lines and (split or y.data.ptr % min(4 * y.itemsize, 16) == 0)
        g.m, g.n, g.n_padded, g.k_bytes = self.rows, p.rows, r.tiles * ROWS, self.k_bytes
        g.chunks, g.row_blocks = -(-r.chunks // span), pl.row_blocks
        g.y_kind = 2 if split else _kind_of(y.dtype)
        return pl, kernel(p.device, "sparse.cu", "sparse", pl.defines), g

    def __call__(self, x: int, y: int, bias: int, given: Any, cupy: Any) -> None:
        """Launch on operands at these addresses."""
        scale = None
        if not self.direct:
            held = _scratch(self.rows * self.places * self.width, np.uint8, self.stream, cupy)
            if self.act == S8:
                scale = _scratch(self.scales, np.float32, self.stream, cupy)
            self._prepare(x, held.data.ptr, scale)
            x = held.data.ptr
        scale = scale if given is None else given
        part = self.rows * self.panels.rows
        sums = None
        if self.split:
            sums = _scratch(part * len(self.launches), np.float32, self.stream, cupy)
        for i, (pl, run, held_args) in enumerate(self.launches):
            args = _SparseArgs.from_buffer_copy(held_args)
            args.x, args.row_scale = x, None if scale is None else scale.data.ptr
            args.bias, args.y = (bias, y) if sums is None else (None, sums.data.ptr + 4 * part * i)
            box = tensor_map(x, self.rows, self.k_bytes, self.row_bytes, pl.tokens, self.width)
            run.launch(pl.grid, pl.threads, pl.shared, self.stream, args, box, early=True)
        if sums is not None:
            self._combine(sums.data.ptr, y, bias)


def panels_of(host: _Storage, device: int) -> Panels:
    """Return the panels of a sparse matrix; what no kernel takes as it is lies there as dense."""
    fmt, structure = host.format, host.format.structure
    assert structure is not None
    runs = structure.startswith(("bsr", "block"))
    whole = fmt.group is not None and fmt.group % PLACES == 0 and fmt.group < host.cols
    served = (
        fmt.is_plain
        or str(fmt) == f"int8_{structure}"
        or (fmt.element.name == "int4" and runs and whole and fmt.scale == "f16")
    )
    if served and has_wgmma(device):
        panels = SparsePanels(host, device)
        if panels.most != 0:
            return panels
    if fmt.is_plain:
        raise ValueError(f"{fmt} needs a device of compute capability 9.0 on CUDA")
    return Panels(host.dense(), device)
