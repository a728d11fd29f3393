"""The CUDA side without a GPU: errors, plans, sources, and compilation where CuPy is installed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    with pytest.raises((ImportError, RuntimeError), match="CuPy") as raised:
        q.to("cuda:0")
    if nvrtc is not None:
        # The same as where the driver is older than CuPy's CUDA.
        assert isinstance(raised.value, RuntimeError)
        assert "driver" in str(raised.value)


def test_names_of_devices(q: nb.QTensor) -> None:
    assert q.device == "cpu"
    assert q.to("cpu") is q
    for name in ("gpu", "cuda:x", "cuda:-1", "cuda:", "cuda0", ""):
        with pytest.raises(ValueError, match="unknown device"):
            q.to(name)


def test_activations_are_checked_before_a_device_is_asked_for() -> None:
    with pytest.raises(ValueError, match="unknown format 'int4'"):
        nb.cuda.activations(np.ones((2, 64), np.float32), "int4")
    with pytest.raises(TypeError, match="array of a CUDA device, got ndarray"):
        nb.cuda.activations(np.ones((2, 64), np.float32))


def test_bytes_of_e4m3() -> None:
    """What products in e4m3 multiply, against the format's own table."""
    from nibblas.cuda._worth import eighths

    table = nb.Format("e4m3").element.values
    for name in ("int4", "bipolar4", "ternary", "e2m1", "e3m2", "mxfp6_e2m3", "e4m3", "nvfp4"):
        e = nb.Format(name).element
        found = eighths(e)
        assert found is not None, name
        worth = table[found[0]] * found[1] * (np.diff(e.values[:2])[0] if e.linear else 1)
        if name.startswith("bipolar"):
            worth = worth / 2  # neighbours are two steps apart
        np.testing.assert_array_equal(worth[: len(e.values)], e.values)
    for name in ("nf4", "int8", "e5m2", "dyn8"):
        assert eighths(nb.Format(name).element) is None


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
        m, n_padded, chunks, groups, act, bits, grouped, more.pop("zero", 0),
        more.pop("scale", 1), 132, limit, **more,
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
                    chained = ("CHAIN", 1) in plan.defines
                    passes = plan.units // plan.row_blocks if plan.whole else 1
                    if chained:
                        passes = -(-m // plan.tokens) // plan.grid[1]
                    assert plan.grid[1] * plan.tokens * passes >= m
                    assert plan.row_blocks * plan.rows >= n
                    assert plan.whole or plan.split == 1
                    assert 1 <= plan.grid[0] <= plan.units * plan.split
                    assert plan.split == 1 or plan.grid[0] == plan.units * plan.split
                    assert plan.shared <= limit - 256
                    assert plan.threads <= 1024
                    if p.ordered:
                        assert plan.whole or chained
                    assert str(plan).startswith(plan.nest)


@pytest.mark.parametrize(
    ("m", "n"), [(256, 14336), (600, 14336), (1024, 28672), (2048, 4096), (5000, 12700)]
)
def test_sums_that_are_handed_on(m: int, n: int) -> None:
    """Rounds of whole rows and then spans of at least one: together all of the work."""
    plan = _plan.plan(problem(m, n, 4096, 2, 4, 1, wgmma=True, lift=True, lines=True))
    assert ("CHAIN", 1) in plan.defines
    blocks, side = plan.grid
    tiles = -(-m // plan.tokens)
    assert tiles % side == 0
    rows = plan.row_blocks * (tiles // side)
    whole = max(rows // blocks - 1, 0) * blocks
    assert whole * 32 + plan.units == rows * 32
    assert plan.units // blocks >= 32  # of one row
    assert blocks * side <= 132


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


LINE, PAIRS, FLOAT, TABLE, SMALL = 0, 1, 2, 3, 4
# (type of activations, bits, what a code is worth, mantissa bits): every decode there is.
DECODES = [
    *((act, bits, LINE, 0) for act in (0, 1, 2) for bits in range(1, 9)),
    *((act, 4, PAIRS, 0) for act in (0, 1, 2)),
    *((act, bits, TABLE, 0) for act in (0, 1, 2) for bits in range(5, 9)),
    *(
        (act, bits, FLOAT, m)
        for act in (0, 1)
        for bits, m in [(4, 1), (4, 0), (5, 2), (6, 3), (6, 2), (7, 3), (8, 2)]
    ),
    (2, 4, SMALL, 0),
    (2, 3, SMALL, 0),
]


@needs_nvrtc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_every_decode_compiles(arch: str) -> None:
    """In the nest that every architecture has, as small as it gets."""

    def image(i: int) -> bytes:
        act, bits, worth, mantissa = DECODES[i]
        more = {"worth": worth, "mantissa": mantissa, "scale": i % 3, "wgmma": arch == "sm_90a"}
        p = problem(8, 64, 4096, act, bits, (1, 2, 4, 0)[i % 4], **more)
        cut = _plan.Cut(1, 1, 1, 1, sets=1 + i % 2)
        return _compile.compile_source("gemm.cu", arch, _plan.build(p, cut).defines)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in pool.map(image, range(len(DECODES))):
            assert made[:4] == b"\x7fELF"
    for source in ("pack.cu", "activations.cu", "activation_planes.cu", "quantize.cu"):
        assert _compile.compile_source(source, arch)[:4] == b"\x7fELF"


def disassembler() -> str | None:
    """Return nvdisasm, from a toolkit or from NVIDIA's package."""
    found = shutil.which("nvdisasm")
    for folder in [] if found else site.getsitepackages():
        found = next(map(str, Path(folder).glob("nvidia/*/bin/nvdisasm")), found)
    return found


def check(name: str, plan: Any, instruction: str) -> None:
    """Compile a nest for sm_90a: no spills, wgmma not serialised, and the instruction it is for."""
    texts = _compile.sources()
    headers = [n for n in texts if n.startswith("nibblas/")]
    program = nvrtc.createProgram(
        texts[name].decode(), name, [texts[h] for h in headers], [h.encode() for h in headers]
    )
    options = (*_compile._options("sm_90a", plan.defines), "--ptxas-options=-v")
    nvrtc.compileProgram(program, options)
    log, image = nvrtc.getProgramLog(program), nvrtc.getCUBIN(program)
    nvrtc.destroyProgram(program)
    assert "serialized" not in log, f"{plan}: {log}"
    assert sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)) == 0, f"{plan}: {log}"
    tool = disassembler()
    if tool is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image + b"\0")  # CuPy takes a byte off the end
        file.flush()
        text = subprocess.run([tool, file.name], check=True, capture_output=True, text=True).stdout
    assert re.search(rf"\b{instruction}\.", text), f"{plan}: no {instruction}"
    assert not re.search(r"\b(LDL|STL)\b", text), f"{plan}: memory of a thread"


@needs_nvrtc
@pytest.mark.parametrize(
    ("m", "act", "bits", "grouped", "worth"),
    [
        *((m, act, 4, 1, LINE) for m in (1, 16, 64, 128, 1024, 4096) for act in (0, 2)),
        *((m, 2, 8, 0, LINE) for m in (64, 2048)),
        *((m, 0, 4, 4, PAIRS) for m in (1, 128)),
        (16, 0, 6, 1, FLOAT),
        (64, 1, 3, 1, LINE),
        (64, 2, 8, 1, TABLE),
    ],
)
def test_listed_kernels(m: int, act: int, bits: int, grouped: int, worth: int) -> None:
    more: dict[str, Any] = {"worth": worth, "mantissa": 2 * (worth == FLOAT)}
    more |= {"scale": 2 if grouped == 4 else 1, "lines": True}
    more["lift"] = (act, bits, worth) == (2, 4, LINE)
    plan = _plan.plan(problem(m, 14336, 4096, act, bits, grouped, wgmma=True, **more))
    wide = plan.nest == "hopper"
    names = {0: "HGMMA", 1: "HGMMA", 2: "IGMMA"} if wide else {0: "HMMA", 1: "HMMA", 2: "IMMA"}
    check(f"{plan.nest}.cu", plan, names[act])


@needs_nvrtc
@pytest.mark.parametrize(("m", "p", "q"), [(16, 1, 1), (16, 2, 2), (16, 3, 3), (640, 2, 2)])
def test_bit_planes_compile(m: int, p: int, q: int) -> None:
    for lines in (False, True):
        plan = _plan.plan_bits(m, 4096, p, q, 4, lines)
        check(f"{plan.nest}.cu", plan, "BGMMA")


@needs_nvrtc
def test_other_forms_of_the_hopper_nest_compile() -> None:
    """Zero points, odd integers, blocks that share out K."""
    for act, bits, zero, mul in [(0, 3, 1, 1), (1, 1, 0, 2), (2, 2, 1, 1)]:
        p = problem(64, 4096, 4096, act, bits, 1, zero=zero, mul=mul, wgmma=True)
        _compile.compile_source("hopper.cu", "sm_90a", _plan.plan(p).defines)
    for m, act, split in [(60, 0, 2), (60, 1, 2), (128, 2, 4)]:
        plan = _plan.plan(problem(m, 8192 // split, 4096, act, 4, 0, wgmma=True, lines=True))
        assert plan.split == split
        check("hopper.cu", plan, "HGMMA" if act < 2 else "IGMMA")


# What registers hold, worked out here from the standards' layouts.
@pytest.mark.parametrize("act", [0, 1])
def test_worth_of_every_element(act: int) -> None:
    from nibblas.cuda._worth import known, worth

    for e in nb.formats.table():
        if not known(e):
            continue
        w = worth(e, act, True)
        if w.kind == LINE:
            continue
        finite = np.isfinite(e.values)
        if w.kind == FLOAT:
            assert not w.tables
            continue
        total = np.zeros(len(e.values))
        for t in w.tables:
            half = t.view(np.float16) if act == 0 else (t.astype(np.uint32) << 16).view(np.float32)
            total += half[: len(e.values)].astype(np.float64) * w.unit
        error = np.abs(total - e.values)[finite]
        # One float16, or three bfloat16 together.
        assert (error <= (2.0**-11 if act == 0 else 0) * np.abs(e.values)[finite]).all(), e.name


def test_formats_that_the_kernels_know() -> None:
    from nibblas.cuda import is_dense

    # Codes of more than a byte, of many weights, with a table of the matrix, or beyond float16.
    unknown = {f"bfp{b}" for b in range(9, 17)} | {"dfp16", "log2_6"}
    for e in nb.formats.table():
        other = e.name.startswith(("lut", "trellis", "vq")) or nb.Format(e.name).is_plain
        assert is_dense(nb.Format(e.name)) == (e.name not in unknown and not other), e.name
    assert is_dense(nb.Format("int4_g32_si8"))
    assert not is_dense(nb.Format("int4_g32_bitmap"))
    assert not is_dense(nb.Format("f16"))


def test_integers_of_tables() -> None:
    from nibblas.cuda._plan import S8
    from nibblas.cuda._worth import integers, worth

    assert integers(nb.Format("e2m1").element)[1] == 0.5
    for name in ("e2m1", "e3m0", "e2m3", "pow2_4", "mxfp4", "nvfp4"):
        e = nb.Format(name).element
        codes, step = integers(e)
        np.testing.assert_array_equal(codes * np.float32(step), e.values)
    # The bytes of kernels are too narrow for 16 * e3m2, which the host multiplies in halves.
    for name in ("e3m2", "mxfp6_e3m2"):
        with pytest.raises(ValueError, match=f"'int8' is not available for {name} on CUDA"):
            worth(nb.Format(name).element, S8, finite=True)
    e = nb.Format("nf4").element
    codes, step = integers(e)
    assert np.abs(codes * np.float32(step) - e.values).max() <= e.rounding * 1.0001
