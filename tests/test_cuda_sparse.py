"""Sparse weights of the CUDA side without a GPU: plans, and compilation where CuPy is installed."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

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
    SparseProblem,
    plan_sparse,
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
        pl = plan_sparse(
            SparseProblem(m, tiles, chunks, act, structure, longest, slot * 3 // 4, 132, limit)
        )
        values = dict(pl.defines)
        assert pl.shared <= limit - 1024
        assert values["STAGES"] >= 2
        assert pl.rows == 32 * values["WR"]
        assert pl.threads == 32 * ((values["WR"] + 1) * values["WK"] + values["DRAIN"]) <= 1024
        assert pl.row_blocks * pl.rows >= 32 * tiles > (pl.row_blocks - 1) * pl.rows
        assert pl.grid[1] * pl.tokens >= m > (pl.grid[1] - 1) * pl.tokens
        assert 1 <= pl.grid[0] <= pl.units == pl.row_blocks * -(-chunks // values["SPAN"])


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
