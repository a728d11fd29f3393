"""The CUDA side without a GPU: errors, plans, sources, and compilation where CuPy is installed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblas as nb
from nibblas.cuda import _compile, _plan

try:
    from cupy_backends.cuda.libs import nvrtc

    nvrtc.getVersion()
except Exception:
    nvrtc = None
needs_nvrtc = pytest.mark.skipif(nvrtc is None, reason="no CuPy with NVRTC")


@pytest.fixture
def q() -> nb.QTensor:
    return nb.quantize(np.random.default_rng(1).normal(size=(8, 64)).astype("f4"), "int4_g32")


def has_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="a driver is installed")
def test_devices_that_are_not_there(q: nb.QTensor) -> None:
    with pytest.raises((ImportError, RuntimeError), match="CuPy"):
        q.to("cuda:0")


def test_names_of_devices(q: nb.QTensor) -> None:
    assert q.device == "cpu"
    assert q.to("cpu") is q
    for name in ("gpu", "cuda:x", "cuda:-1", "cuda:", "cuda0", ""):
        with pytest.raises(ValueError, match="unknown device"):
            q.to(name)


def test_import_of_the_module_loads_no_cupy() -> None:
    code = "import sys, nibblas.cuda; assert 'cupy' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(nb.__file__).parents[1])},
    )


def test_sources_are_there() -> None:
    names = set(_compile.sources())
    assert {"gemm.cu", "hopper.cu", "bits.cu", "pack.cu", "activations.cu"} <= names
    assert {"nibblas/base.cuh", "nibblas/decode.cuh", "nibblas/scheduler.cuh"} <= names


@pytest.mark.parametrize(
    ("group", "cols", "places"),
    [
        (None, 1, 128),
        (None, 300, 384),
        (8, 300, 32),
        (32, 300, 32),
        (48, 300, 64),
        (100, 300, 128),
        (128, 300, 128),
        (200, 300, 256),
        (512, 300, 384),
    ],
)
def test_places_of_a_group(group: int | None, cols: int, places: int) -> None:
    assert _plan.padded_group(group, cols) == places


def problem(m: int, n: int, k: int, act: int, bits: int, grouped: int, **more: Any) -> Any:
    limit = more.pop("limit", 232448)
    chunks = -(-k // 128)
    groups = chunks * max(grouped, 1) if grouped else 1
    n_padded = -(-n // 64) * 64
    return _plan.Problem(
        m, n_padded, chunks, groups, act, bits, grouped, more.pop("zero", 0), True, 132, limit,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("act", [0, 1, 2])
def test_plans_cover_the_work(act: int, wgmma: bool) -> None:
    for m in (1, 8, 9, 16, 17, 33, 64, 65, 500, 5000):
        for n, k in [(1, 1), (64, 100_000), (4096, 4096), (28672, 8192), (300, 700)]:
            for grouped in (0, 1, 2, 4):
                for bits in (1, 3, 4, 7, 8):
                    limit = 232448 if wgmma or bits % 2 else 101376
                    p = problem(m, n, k, act, bits, grouped, wgmma=wgmma, limit=limit)
                    plan = _plan.plan(p)
                    assert plan.grid[1] * plan.tokens >= m
                    assert plan.row_blocks * plan.rows >= n
                    assert 1 <= plan.grid[0] <= plan.units
                    assert plan.shared <= limit - 256
                    assert plan.threads <= 1024
                    if p.ordered:
                        assert plan.whole
                    assert str(plan).startswith(plan.nest)


def test_zero_points_that_do_not_fit_a_byte_take_another_nest() -> None:
    assert _plan.has_hopper(problem(64, 64, 64, 2, 4, 1, zero=1, zero_top=15, wgmma=True))
    assert not _plan.has_hopper(problem(64, 64, 64, 2, 4, 1, zero=1, zero_top=200, wgmma=True))
    assert not _plan.has_hopper(problem(64, 64, 64, 2, 8, 1, zero=1, wgmma=True))
    assert not _plan.has_hopper(problem(64, 64, 64, 0, 4, 1, zero=2, wgmma=True))
    assert not _plan.has_hopper(problem(64, 64, 64, 0, 4, 1))


@needs_nvrtc
def test_a_kernel_that_does_not_compile_says_where() -> None:
    with pytest.raises(_compile.CompileError, match=r"gemm\.cu \(ACT=0\).* for sm_80: .*error"):
        _compile.compile_source("gemm.cu", "sm_80", (("ACT", 0),))


@needs_nvrtc
def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLAS_CUDA_CACHE", str(tmp_path))
    image = _compile.cubin("pack.cu", "sm_80")
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(_compile, "compile_source", lambda *a: b"not called")
    assert _compile.cubin("pack.cu", "sm_80") == image
    file.write_bytes(file.read_bytes()[:-1])
    assert _compile.cubin("pack.cu", "sm_80") == b"not called"
    monkeypatch.setenv("NIBBLAS_CUDA_CACHE", "")
    assert _compile.cubin("pack.cu", "sm_80") == b"not called"


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_every_decode_compiles(arch: str) -> None:
    """Every width for every class of arithmetic, in the nest that this architecture uses."""
    for act in (0, 1, 2):
        for bits in range(1, 9):
            grouped = (1, 2, 4, 0)[bits % 4]
            plan = _plan.plan(problem(8, 4096, 4096, act, bits, grouped))
            image = _compile.compile_source("gemm.cu", arch, plan.defines)
            assert image[:4] == b"\x7fELF"
    for source in ("pack.cu", "activations.cu"):
        assert _compile.compile_source(source, arch)[:4] == b"\x7fELF"


@needs_nvrtc
def test_hopper_nests_compile() -> None:
    for act in (0, 1, 2):
        for bits, zero, mul in [(4, 0, 1), (3, 1, 1), (1, 0, 2), (8, 0, 1)]:
            p = problem(64, 4096, 4096, act, bits, 1, zero=zero, mul=mul, wgmma=True)
            plan = _plan.plan(p)
            assert plan.nest == "hopper"
            _compile.compile_source("hopper.cu", "sm_90a", plan.defines)
    _compile.compile_source("bits.cu", "sm_90a", _plan.plan_bits(64, 64).defines)


def _spills(name: str, defines: tuple[tuple[str, int], ...]) -> int:
    import re

    texts = _compile.sources()
    headers = [n for n in texts if n.startswith("nibblas/")]
    program = nvrtc.createProgram(
        texts[name].decode(), name, [texts[h] for h in headers], [h.encode() for h in headers]
    )
    options = (*_compile._options("sm_90a", defines), "--ptxas-options=-v")
    nvrtc.compileProgram(program, options)
    log = nvrtc.getProgramLog(program)
    assert "serialized" not in log, log
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


@needs_nvrtc
@pytest.mark.parametrize(
    ("m", "fmt"),
    [
        *((m, fmt) for m in (1, 16, 64, 128) for fmt in ((0, 4, 1), (2, 4, 1))),
        *((m, (2, 8, 0)) for m in (16, 64, 128)),
    ],
)
def test_listed_kernels_do_not_spill(m: int, fmt: tuple[int, int, int]) -> None:
    plan = _plan.plan(problem(m, 14336, 4096, *fmt, wgmma=True))
    assert _spills(f"{plan.nest}.cu", plan.defines) == 0
