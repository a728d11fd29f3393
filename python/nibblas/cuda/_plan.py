"""Which kernel serves a product, and how it is cut: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "BF16",
    "CHUNK",
    "E4M3",
    "F16",
    "FLOAT",
    "LINE",
    "PAIRS",
    "S8",
    "SMALL",
    "TABLE",
    "Cut",
    "HopperCut",
    "Plan",
    "Problem",
    "build",
    "build_hopper",
    "choose",
    "choose_hopper",
    "has_hopper",
    "padded_group",
    "plan",
    "plan_bits",
]

F16, BF16, S8, E4M3 = 0, 1, 2, 3
# What a code is worth; see decode.cuh.
LINE, PAIRS, FLOAT, TABLE, SMALL = 0, 1, 2, 3, 4
SCALE_BYTES = (4, 2, 1, 1)
CHUNK = 128


def padded_group(group: int | None, cols: int) -> int:
    """Return the places of a group in a packed row: 32, 64 or a multiple of 128."""
    if group is None or group >= cols:
        return max(-(-cols // CHUNK), 1) * CHUNK
    for places in (32, 64):
        if group <= places:
            return places
    return -(-group // CHUNK) * CHUNK


class Plan(NamedTuple):
    """One launch of a loop nest."""

    nest: str
    """``gemm`` or ``hopper``: the file and the function."""
    defines: tuple[tuple[str, int], ...]
    grid: tuple[int, int]
    threads: int
    shared: int
    row_blocks: int
    rows: int
    """Weight rows of a block."""
    tokens: int
    """Activation rows of a block."""
    units: int
    """What the blocks share out."""
    whole: bool
    """Whether a unit is all of K."""
    split: int = 1
    """Blocks of a cluster that share out K of a tile."""

    def __str__(self) -> str:
        values = " ".join(f"{k}={v}" for k, v in self.defines)
        return (
            f"{self.nest} [{values}] grid {self.grid[0]}x{self.grid[1]}, {self.threads} threads, "
            f"{self.shared} bytes of shared memory"
        )


class Problem(NamedTuple):
    """What a launch of ``gemm.cu`` depends on."""

    m: int
    """Rows of activations."""
    n_padded: int
    """Rows of weights, a multiple of 64."""
    chunks: int
    """Runs of 128 places along K."""
    groups: int
    """Scales of a row."""
    act: int
    """0 float16, 1 bfloat16, 2 int8, 3 e4m3."""
    bits: int
    """Of a code."""
    grouped: int
    """Scales per chunk, 0 where a row has one."""
    zero: int
    """0 without zero points, 1 integers, 2 floats."""
    scale: int
    """How scales are stored: 0 float32, 1 float16, 2 powers of two as bytes, 3 two levels."""
    multiprocessors: int
    shared_limit: int
    mul: int = 1
    """A code stands for ``mul*u - sub``."""
    zero_top: int = 0
    """The largest integer zero point."""
    wgmma: bool = False
    """Whether the device has wgmma."""
    worth: int = LINE
    """What a code is worth: LINE, PAIRS, FLOAT, TABLE or SMALL."""
    mantissa: int = 0
    """Mantissa bits of FLOAT."""
    act_scales: bool = False
    """Whether int8 activations have one scale per group."""
    lift: bool = False
    """Whether int8 products may take codes as they lie at the top of a byte."""
    lines: bool = False
    """Whether results have 16 bits and aligned rows, so that the copy engine can write them."""

    @property
    def book(self) -> int:
        """Bytes of shared memory that a table of values takes."""
        if self.worth == TABLE:
            return 8192
        return 32768 if self.worth == PAIRS and self.width == 2 else 0

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.act in (F16, BF16) else 1

    @property
    def decode(self) -> tuple[tuple[str, int], ...]:
        """What the nests that decode are compiled for."""
        return (
            ("ACT", self.act),
            ("BITS", self.bits),
            ("WORTH", self.worth),
            ("MANTISSA", self.mantissa),
            ("SCALE", self.scale),
            ("GROUPED", self.grouped),
            ("ZERO", self.zero),
        )

    @property
    def ordered(self) -> bool:
        """Whether the float sum must run over the groups in order, so that K cannot be cut."""
        return self.act == S8 and self.grouped > 0 and self.scale != 3


class Cut(NamedTuple):
    """How a launch is cut."""

    nt: int
    """Activation rows of a warp, in eights."""
    wn: int
    """Weight rows of a warp, in sixteens."""
    wr: int
    """Warps along the weight rows."""
    wk: int
    """Warps along K."""
    park: int = 0
    """KiB of shared memory, at most, in which integer sums of groups wait."""
    sets: int = 1
    """Accumulators per output."""
    resident: int = 1
    """Blocks of a multiprocessor, if shared memory allows."""
    stages: int = 4
    """Chunks in flight, at most."""
    whole: bool = False
    """Whether a block takes all of K."""


def choose(p: Problem) -> Cut:
    """Return the cut for a problem."""
    nt = 1 if p.m <= 8 else 2 if p.m <= 16 else 4 if p.m <= 32 else 8
    small = 24 * p.multiprocessors <= p.n_padded < 96 * p.multiprocessors
    if nt == 4 and small and not p.ordered:
        return Cut(2, 4, 1, 4, sets=2 if p.act == F16 else 1, resident=2, whole=True)
    if p.ordered:
        most, n = p.multiprocessors, p.n_padded
        if p.zero != 2 and nt <= 2 and _parks(p):
            if n < 96 * most:
                return Cut(nt, 2, 1, 12 if nt == 1 else 8, park=100)
            if n < 192 * most:
                return Cut(nt, 4 if nt == 2 else 2, 1, 4 * (3 - nt), resident=2, park=40)
            if nt == 1:
                return Cut(nt, 4, 2, 4, resident=2, stages=3, park=20)
        if nt <= 2:
            # A block walks all of K alone: what it has asked for must last.
            if n < 96 * most:
                return Cut(nt, 1, 1, 1, resident=2, stages=24)
            wr = 7 if n >= 192 * most and -(-n // 112) <= 2 * most else 4
            return Cut(nt, 1, wr, 1, resident=2 if wr == 7 else 4, stages=12 if nt == 1 else 8)
        return Cut(nt, 2 if nt == 8 else 1, 8, 1)
    if nt <= 2:
        # All of K in a block saves the meeting of its parts, worth 3 us, where the rows alone keep
        # the device busy; the wider a block, the less often activations are read. Tables take
        # shared memory, which one wide block shares.
        sets = 2 if p.act == F16 else 1
        most, n = p.multiprocessors, p.n_padded
        if n >= 192 * most:
            if nt == 1 and p.bits <= 2 and not p.book:
                return Cut(nt, 4, 4, 4, sets=sets, stages=4, whole=True)
            if p.book > 8192:
                return Cut(nt, 4, 4, 4 if nt == 1 else 3, stages=3, whole=p.grouped < 2)
            if p.worth == FLOAT and p.bits <= 4:
                return Cut(nt, 4, 4, 4, whole=True)
            if p.worth == FLOAT and nt == 2 and p.grouped > 1:
                return Cut(nt, 4, 4, 3, whole=True)
            if p.worth == FLOAT and nt == 2 and 0.9 * most <= -(-n // 224) <= most:
                return Cut(nt, 2, 7, 2, whole=True)
            wk = (4, 3)[nt - 1] if p.worth == LINE else (3, 2)[nt - 1]
            return Cut(nt, 4, 2, wk, sets=sets, resident=2, stages=3, whole=True)
        if n >= 96 * most:
            return Cut(nt, 4, 1, 4, sets=sets, resident=2, whole=True)
        if n >= 24 * most:
            return Cut(nt, 2, 1, 12 if nt == 1 else 8, sets=sets, whole=True)
        return Cut(nt, 4, 1, 8, sets=1 if nt == 2 else sets, stages=3)
    return Cut(nt, 2, 4, 2)


def _parks(p: Problem) -> bool:
    """Whether integer sums of groups can wait: of a round of steps, or of all of a row."""
    return p.grouped > 1 or p.groups >= p.chunks or p.groups * min(p.m, 16) <= 512


def build(p: Problem, cut: Cut) -> Plan:
    """Return the launch of a cut."""
    nt, wn, wr, wk = cut.nt, cut.wn, cut.wr, cut.wk
    rows, tokens, threads = 16 * wn * wr, 8 * nt, 32 * wr * wk
    row_blocks = -(-p.n_padded // rows)
    width = p.width
    scale_bytes = SCALE_BYTES[p.scale] + (0, 1, 4)[p.zero]
    stage = wr * wk * (wn * 256 * p.bits + p.grouped * wn * 16 * scale_bytes)
    stage += wk * tokens * CHUNK * width
    rest = wk * rows * 8 * 4 if wk > 1 else 0
    park = cut.park
    if park:
        one = min(tokens, p.m) * (rows + 4) * 4  # the sums of a group
        step = wk * p.grouped * (one + rows * 4)
        park = max(min((park << 10) // step, -(-p.chunks // wk)), 1)
        rest = park * step + one
        if p.grouped == 1 and p.groups < p.chunks:
            # Groups of many chunks are few, and rounds would cut them.
            park = -(-p.chunks // wk)
            rest = p.groups * (one + rows * 4) + one
    rest += p.book + 1024
    limit = (p.shared_limit + 1024) // cut.resident - 2048
    stages = cut.stages
    while stages > 2 and stages * stage + rest > limit:
        stages -= 1
    shared = stages * stage + rest
    resident = max(1, min(cut.resident, (p.shared_limit + 1024) // (shared + 2048)))
    m_blocks = -(-p.m // tokens)
    whole = cut.whole or p.ordered
    units = row_blocks if whole else row_blocks * p.chunks
    # A span of fewer chunks than warps would leave warps without work.
    blocks = units if whole else max(1, units // wk)
    if not p.ordered:
        blocks = min(blocks, max(1, p.multiprocessors * resident // m_blocks))
    defines = (
        *p.decode,
        ("NT", nt),
        ("WN", wn),
        ("WR", wr),
        ("WK", wk),
        ("STAGES", stages),
        ("PARK", park),
        ("SETS", cut.sets if p.worth == LINE else 1),
        ("BULK", int(p.wgmma)),
        ("ASCALE", int(p.act_scales)),
    )
    size = (blocks, m_blocks)
    return Plan("gemm", defines, size, threads, shared, row_blocks, rows, tokens, units, whole)


class HopperCut(NamedTuple):
    """How a launch of ``hopper.cu`` is cut."""

    t: int
    """Activation rows of a block."""
    wg: int
    """Warpgroups, of 64 weight rows each."""
    stages: int = 5
    """Chunks of room, at most; two of them are in use."""
    resident: int = 1
    """Blocks of a multiprocessor, if shared memory allows."""
    whole: bool = False
    """Whether a block takes all of K."""
    split: int = 1
    """Blocks of a cluster that share out K of a tile, each block having one."""
    side: int = 0
    """Blocks side by side along the activations, a divisor of all there are; 0: as many as fit."""
    chain: bool = False
    """Whether blocks hand sums that run along K in order to the next one."""


def has_hopper(p: Problem) -> bool:
    """Whether ``hopper.cu`` can decode the format to signed numbers of the activations' type."""
    if not p.wgmma or p.zero == 2 or p.act_scales:
        return False
    if p.worth != LINE or p.act == E4M3:
        return True
    if p.act == S8:
        return p.zero_top < 128 and not (p.bits == 8 and (p.zero or p.mul == 2))
    return p.act == F16 or p.bits == 8 or p.zero_top < 128


def _rounds(p: Problem, rows: int, t: int) -> int:
    """Return how many blocks of a shape one multiprocessor has to go through."""
    return -(-(-(-p.n_padded // rows) * -(-p.m // t)) // p.multiprocessors)


def _prefer_256(p: Problem) -> bool:
    """Whether 256 activation rows of a block take less time than twice 128, in rounds of blocks."""
    return p.m >= 2048 or 1.75 * _rounds(p, 128, 256) <= _rounds(p, 128, 128)


def _prefer_chain(p: Problem) -> bool:
    """Whether handing sums on takes less time than whole rounds of blocks, of 128 rows each.

    A block of 192 takes 1.3 times as long, and handing on some 7 us, as long as 10 chunks.
    """
    m_blocks, most = -(-p.m // 128), p.multiprocessors
    if p.groups < p.chunks or m_blocks < 2:
        return False
    spans = max(-(-p.n_padded // 192) * m_blocks / most, 1)
    return 1.3 * spans + 10 / p.chunks < _rounds(p, 128, 128)


def _split(p: Problem, tiles: int, slots: int) -> int:
    """Return how many blocks share out K of a tile, so that there is one for every place."""
    return next(s for s in (8, 4, 2, 1) if s == 1 or (tiles * s <= slots and p.chunks >= 4 * s))


def _narrow(p: Problem) -> HopperCut:
    """Return the cut for more than 128 rows where one row of blocks leaves multiprocessors idle.

    Times are in those of a block of 128 x 128: one of 192 takes 1.3 of them, or 1.4 in float16, and
    a meeting in memory as long as 12 chunks, or 24 of int8.
    """
    most = p.multiprocessors
    tiles = -(-p.n_padded // 128) * -(-p.m // 128)
    split = 1 if p.ordered else _split(p, tiles, most)
    if split > 1:
        return HopperCut(128, 2, whole=True, split=split)
    if p.ordered and 2 * tiles <= most:
        return HopperCut(128, 1, 8, whole=True)
    two = _rounds(p, 128, 128)
    three = (1.3 if p.width == 1 else 1.4) * _rounds(p, 192, 128)
    shared = tiles / most + 24 / p.width / p.chunks
    if not p.ordered and shared < min(two, three):
        return HopperCut(128, 2)
    light = p.ordered or (p.worth == LINE and p.bits < 8 and not p.zero)
    return HopperCut(128, 3 if three < two and light else 2, whole=True)


def choose_hopper(p: Problem) -> HopperCut:
    """Return the cut for a problem."""
    most, bands = p.multiprocessors, -(-p.n_padded // 64)
    wide, whole = p.n_padded >= 96 * most, p.n_padded >= 24 * most
    t = 32 if p.m <= 32 else 64 if p.m <= 64 else 128
    if p.m <= 128 and not wide:
        split = 1 if p.ordered else _split(p, bands, most)
        # Where K cannot be shared out, rows of activations are.
        while p.ordered and t > 32 and bands * -(-p.m // (t // 2)) <= most:
            t //= 2
        if split > 1 or (whole and bands <= most):
            return HopperCut(t, 1, 16 if t == 32 else 12, whole=True, split=split)
        if t == 128 and whole:
            return HopperCut(t, 2, whole=True)
        return HopperCut(t, 1, 10, 1 if t == 128 else 2, whole=whole)
    if p.m <= 64:
        if p.n_padded >= 192 * most:
            return HopperCut(t, 4, 8, whole=True)
        return HopperCut(t, 1, 10, 2, whole=True)
    scaled = p.grouped > 0 and p.scale != 3
    if p.width == 1 and not scaled and (wide or (whole and _prefer_256(p))):
        if wide and 1.56 * _rounds(p, 192, 128) < 2 * _rounds(p, 128, 256):
            return HopperCut(128, 3, 6, whole=True)
        # Without totals beside them a thread has the registers for twice the sums.
        return HopperCut(256, 2, 4, whole=True)
    # Sums of groups become floats meanwhile: that takes warps.
    if p.ordered and _prefer_chain(p):
        return HopperCut(128, 3, chain=True)
    if not wide:
        return _narrow(p)
    three = p.m >= 512 if p.ordered else p.m >= 2048 and p.bits < 8 and not p.zero
    return HopperCut(128, 3 if three and (p.ordered or p.worth == LINE) else 2, whole=True)


def _side(p: Problem, t: int, row_blocks: int, slots: int, chain: bool = False) -> int:
    """Return how many tiles of activations are multiplied at a time.

    What they read should stay in the cache, and no block should have more to do than others.
    """
    tiles = -(-p.m // t)
    nbytes = t * p.chunks * CHUNK * p.width

    def rounds(side: int) -> float:
        work, blocks = row_blocks * (tiles // side), max(slots // side, 1)
        return max(work / blocks, 1) if chain else -(-work // blocks)

    some = [s for s in range(1, min(tiles, slots) + 1) if tiles % s == 0]
    some = [s for s in some if s * nbytes <= 18 << 20] or [1]
    best = min(some, key=lambda s: (rounds(s), -s))
    return best if rounds(best) < rounds(tiles) or tiles * nbytes > 18 << 20 else tiles


def build_hopper(p: Problem, cut: HopperCut) -> Plan:
    """Return the launch of a cut."""
    t, wg = cut.t, cut.wg
    handed = wg == 4 or (wg > 1 and t >= 128)
    rows, threads = 64 * wg, 128 * wg + (128 if handed else 64)
    row_blocks = -(-p.n_padded // rows)
    width = p.width
    scale_bytes = SCALE_BYTES[p.scale] + (1 if p.zero else 0)
    stage = t * CHUNK * width + rows * (16 * p.bits + p.grouped * scale_bytes)
    stage = -(-stage // 1024) * 1024
    limit = (p.shared_limit + 1024) // cut.resident - 2048
    # The table, and 32 rows of X of every warpgroup on their way out.
    rest = p.book + wg * 32 * 68 * 4 + 1024
    stages = max(3, min(cut.stages, (limit - rest) // stage))
    shared = stages * stage + rest
    resident = max(1, min(cut.resident, (p.shared_limit + 1024) // (shared + 2048)))
    m_blocks = -(-p.m // t)
    split = 1 if p.ordered else min(cut.split, p.chunks)
    whole = (cut.whole or p.ordered or split > 1) and not cut.chain
    slots = p.multiprocessors * resident
    side = cut.side or (
        _side(p, t, row_blocks, slots, cut.chain) if whole or cut.chain else m_blocks
    )
    rounds = row_blocks * (m_blocks // side)
    units = rounds if whole else row_blocks * p.chunks
    blocks = units if split > 1 else min(units, max(1, slots // side))
    if cut.chain:
        # Whole rounds and, last, spans of at least all of K: no row of chunks meets three blocks.
        blocks = min(rounds, max(1, slots // side))
        units = (rounds - max(rounds // blocks - 1, 0) * blocks) * p.chunks
    # Pays where conversions of sums take longer than products; takes registers.
    halves = p.act == S8 and p.ordered and p.groups == p.chunks and (t, wg) == (128, 2)
    defines = (
        *p.decode,
        ("T", t),
        ("WG", wg),
        ("SPLIT", split),
        ("STAGES", stages),
        ("MUL", p.mul),
        ("HALVES", 1 + halves),
        ("LIFT", int(p.lift)),
        ("OUT", int(p.lines)),
        ("WHOLE", int(whole)),
        ("CHAIN", int(cut.chain)),
        ("RESIDENT", resident),
    )
    size = (blocks * split, side)
    return Plan("hopper", defines, size, threads, shared, row_blocks, rows, t, units, whole, split)


def plan(p: Problem) -> Plan:
    """Return the launch for a problem."""
    # Where rows of weights keep the device busy, wgmma is worth it early: when K could not be cut
    # either, and for codes that take few instructions.
    wide = 96 if p.ordered else 192 if (p.worth, p.bits) == (LINE, 4) else None
    few = 8 if wide and p.n_padded >= wide * p.multiprocessors else 16
    if (p.m > few or p.act == E4M3) and has_hopper(p):
        return build_hopper(p, choose_hopper(p))
    cut = choose(p)
    made = build(p, cut)
    # Wide codes and small devices: the widest cut may not fit.
    while made.shared > p.shared_limit - 1024:
        if cut.park:
            cut = Cut(cut.nt, 1, 4, 1)
        elif cut.wk > 1:
            cut = cut._replace(wk=cut.wk // 2)
        elif cut.wr > 1:
            cut = cut._replace(wr=cut.wr // 2)
        else:
            cut = cut._replace(wn=cut.wn // 2)
        made = build(p, cut)
    return made


def plan_bits(m: int, n: int, p: int, q: int, chunks: int, lines: bool = False) -> Plan:
    """Return the launch for bit planes of `m` rows of activations and `n` of weights.

    `p` and `q` are the planes of weights and activations, `chunks` their runs of 1024 k. `rows` are
    those of the activations that a block takes, `tokens` of the weights; the grid is made of them.
    `lines`: results have 32 bits and aligned rows.
    """
    if m <= 64 and p + q <= 4:
        groups, t = min(chunks, 4), 32
        slot = (64 * q + t * p) * 128
        rest = (groups - 1) * 64 * t * 4 + 1024
        stages = max(2, min(2 * groups, (220 * 1024 - rest) // slot))
        few = (("P", p), ("Q", q), ("T", t), ("KG", groups), ("STAGES", stages))
        shared = stages * slot + rest
        return Plan("bits_few", few, (1, 1), 128 * groups + 32, shared, 0, 64, t, 0, True)
    if m <= 64:
        wg, t, stages, lines = 1, 32, 12, False
    elif p * q * chunks <= 4:
        # Most of the time results leave: narrow tiles have less to write at once.
        wg, t, stages = 4, 64, 3 if lines else 5
    else:
        wg, t, stages, lines = 4, 128, 4, False
    rows = 64 * wg
    shared = stages * (rows + t) * 128 + (wg * 16384 if lines else 0) + 1024
    defines = (("T", t), ("WG", wg), ("STAGES", stages), ("OUT", int(lines)))
    return Plan("bits", defines, (1, 1), 128 * wg + 32, shared, 0, rows, t, 0, True)
