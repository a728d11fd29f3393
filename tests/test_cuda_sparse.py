"""Sparse weights of the CUDA side without a GPU: plans, and compilation where CuPy is installed."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_cuda import check, needs_nvrtc

from nibblas.cuda import _compile
from nibblas.cuda._plan import BF16, F16, S8
from nibblas.cuda._sparse import (
    ENTRIES,
    FOURS,
    GROUPS,
    PAIRS,
    TILES,
    SparsePanels,
    SparseProblem,
    most_rows,
    plan_sparse,
    ring_of,
    spans,
)

LIMIT = 232448
KINDS = [(ENTRIES, F16), (PAIRS, BF16), (FOURS, F16), (FOURS, S8), (GROUPS, F16), (GROUPS, BF16)]
KINDS += [(ENTRIES, S8), (PAIRS, S8), (TILES, BF16), (TILES, S8)]


@pytest.mark.parametrize("limit", [LIMIT, 101376])
@pytest.mark.parametrize("slot", [272, 4064, 8704])
def test_plans_fit_and_cover(slot: int, limit: int) -> None:
    longest = slot, 2 * slot, 4 * slot
    for (structure, act), m, tiles, chunks in itertools.product(
        KINDS, (1, 8, 9, 33, 64, 700), (1, 7, 896), (1, 2, 56)
    ):
        p = SparseProblem(m, tiles, chunks, act, structure, longest, slot * 3 // 4, 132, limit)
        pl = plan_sparse(p)
        values = dict(pl.defines)
        assert ring_of(p, pl) >= slot * values["SPAN"]
        # Blocks of a row of records wait for each other, so all of them are there at once.
        assert pl.grid[0] == 1 or pl.grid[0] * pl.grid[1] <= 132 * values["RESIDENT"]
        assert pl.shared <= limit - 1024
        assert values["STAGES"] >= 2
        assert pl.rows == 32 * values["WR"]
        assert pl.threads == 32 * ((values["WR"] + 1) * values["WK"] + values["DRAIN"]) <= 1024
        assert pl.row_blocks * pl.rows >= 32 * tiles > (pl.row_blocks - 1) * pl.rows
        assert pl.grid[1] * pl.tokens >= m > (pl.grid[1] - 1) * pl.tokens
        assert 1 <= pl.grid[0] <= pl.units == pl.row_blocks * -(-chunks // values["SPAN"])


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 200), (896, 56)], ids=str)
@pytest.mark.parametrize("m", [1, 40])
def test_spans_are_of_equal_work(m: int, shape: tuple[int, int]) -> None:
    """Also where some rows keep everything and others nothing."""
    tiles, records = shape
    steady = 1024
    rng = np.random.default_rng(tiles)
    kept = np.linspace(0, 1, tiles)[:, None]
    for density in (kept, kept > 0.9, kept * 0, kept * 0 + 1, rng.random(shape)):
        sizes = 16 + 512 * rng.binomial(16, np.broadcast_to(density, shape))
        most = 16 + 512 * 16
        longest = most, 2 * most, 4 * most
        pl = plan_sparse(
            SparseProblem(m, tiles, records, F16, TILES, longest, most // 2, 132, LIMIT)
        )
        d = dict(pl.defines)
        starts = spans(sizes, steady, pl)
        assert starts[0] == 0
        assert starts[-1] == pl.units
        assert (np.diff(starts) > 0).all()
        assert len(starts) == pl.grid[0] + 1
        # What a unit is worth, one by one.
        wide = pl.units // pl.row_blocks
        work = np.zeros(pl.units)
        for t in range(tiles):
            for r in range(records):
                work[t // d["WR"] * wide + r // d["SPAN"]] += sizes[t, r] + steady
        each = np.add.reduceat(work, starts[:-1])
        assert each.max() <= 1.05 * each.mean() + work.max()


@pytest.mark.parametrize(
    ("element", "own", "structure", "kept", "most"),
    [
        ("int8", S8, ENTRIES, 0.5, 32),
        ("int8", S8, ENTRIES, 0.6, 16),
        ("int8", S8, ENTRIES, 0.8, 0),
        ("int8", S8, PAIRS, 0.2, 64),
        ("int8", S8, FOURS, 0.5, 64),
        ("int8", S8, TILES, 0.8, 64),
        ("int4", F16, GROUPS, 1.0, 16),
        ("f16", F16, ENTRIES, 0.8, None),
        ("bf16", BF16, FOURS, 0.5, None),
    ],
)
def test_rows_that_records_serve(
    element: str, own: int, structure: int, kept: float, most: int | None
) -> None:
    """More than that go to dense panels, where there are any: numbers have none."""
    assert most_rows(element, structure, kept) == most
    records: Any = SimpleNamespace(structure=structure)
    panels: Any = SimpleNamespace(own=own, held={own: [records]}, most=most)
    compute = "int8" if own == S8 else "f32"
    for m in (1, 8, 16, 17, 32, 33, 64, 65, 4096):
        found = SparsePanels.act(panels, m, compute, own)
        assert found == ((own, False) if most is None or m <= most else None), m


@needs_nvrtc
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_compile_without_spills(kind: tuple[int, int]) -> None:
    structure, act = kind
    instruction = {F16: "HMMA", BF16: "HMMA", S8: "IMMA"}[act]
    if structure == FOURS:
        instruction += r"\.SP"

    def one(m: int) -> None:
        longest = 2368, 4624, 9000
        pl = plan_sparse(SparseProblem(m, 896, 56, act, structure, longest, 2000, 132, LIMIT))
        check("sparse.cu", pl, instruction)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, (8, 16, 32, 64)))


@needs_nvrtc
def test_packing_compiles() -> None:
    assert _compile.compile_source("sparse_pack.cu", "sm_90a")[:4] == b"\x7fELF"
