"""The numeric contract: the same bits for every ISA, thread count, batch and layout."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
from conftest import levels, sequential_f32

import nibblas as nb
from nibblas import _core, testing

EXACT = ["f32", "int8", "int8_g32", "int8_g128"]
SHAPES = [(1, 50, 300), (3, 16, 64), (17, 33, 129), (64, 96, 256), (130, 20, 70), (2, 1, 1)]
FORMATS = [
    "int4_g32",
    "int8",
    "uint4_g16",
    "uint3_g128",
    "bipolar3_g64",
    "ternary_g32",
    "int6_g40_sbf16",
    "int4_g32_si8",
    "uint3_g24_si8",
]


def product(m: int, n: int, k: int, fmt: str, seed: int = 0) -> tuple[np.ndarray, nb.QTensor]:
    return testing.values((m, k), seed + 1), nb.quantize(testing.values((n, k), seed + 2), fmt)


def reference(
    x: np.ndarray, q: nb.QTensor, compute: str, bias: np.ndarray | None = None
) -> np.ndarray:
    y = np.empty((len(x), len(q)), np.float32)
    _core.reference(x, q._storage.parts(), y, compute, bias)
    return y


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_f32_is_a_sequential_fma(shape: tuple[int, int, int], fmt: str) -> None:
    m, n, k = shape
    x, q = product(m, n, k, fmt)
    np.testing.assert_array_equal(x @ q.T, sequential_f32(x, q.dequantize()))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("compute", EXACT)
@pytest.mark.parametrize("isa", levels())
def test_every_level_equals_the_reference(isa: str, compute: str, fmt: str) -> None:
    if compute not in nb.Format(fmt).computes:
        pytest.skip("the groups do not nest")
    for m, n, k in SHAPES:
        x, q = product(m, n, k, fmt)
        bias = testing.values((n,), 9)
        got = np.empty((m, n), np.float32)
        for b in (None, bias):
            _core.matmul(x, q._storage.pack(1), got, compute, b, 2, isa)
            np.testing.assert_array_equal(
                got.view(np.uint32),
                reference(x, q, compute, b).view(np.uint32),
                err_msg=f"{m},{n},{k}",
            )


@pytest.mark.parametrize("fmt", ["int8", "int4", "int4_g128_si8", "int4_g128", "uint4_g32"])
@pytest.mark.parametrize("m", [40, 70, 259])
def test_many_rows_and_more_than_a_window_of_k(m: int, fmt: str) -> None:
    n, k = 70, 4230
    x, q = product(m, n, k, fmt)
    got = np.empty((m, n), np.float32)
    _core.matmul(x, q._storage.pack(1), got, "int8", None, 1, levels()[-1])
    np.testing.assert_array_equal(got.view(np.uint32), reference(x, q, "int8").view(np.uint32))


def integer_result(x: np.ndarray, q: nb.QTensor) -> np.ndarray:
    """``compute="int8"`` in float64 with exact integers and one rounding for each step."""
    absmax = np.abs(x).max(1, keepdims=True)
    scale = absmax / np.float32(127)
    safe = np.where(scale == 0, np.float32(1), scale)
    codes = np.where(scale == 0, 0, np.clip(np.rint(x / safe), -127, 127)).astype(np.int64)
    weights = q.codes().astype(np.int64)
    if q.zeros is not None:
        weights = weights - q.zeros.astype(np.int64)
    total = (codes @ weights.T).astype(np.float32)
    # From +0, one fused multiply-add with the weight scale is a single rounding of the product.
    return (total * q.scales[:, 0]) * scale


@pytest.mark.parametrize("fmt", ["int4", "int8", "uint4", "bipolar3", "ternary"])
def test_int8_is_the_written_formula(fmt: str) -> None:
    for m, n, k in SHAPES:
        x, q = product(m, n, k, fmt)
        x[0] = 0
        want = integer_result(x, q)
        np.testing.assert_array_equal(nb.matmul(x, q.T, compute="int8"), want)


@pytest.mark.parametrize("fmt", ["int4", "int8", "uint4"])
@pytest.mark.parametrize(("m", "k"), [(5, 96), (1, 64), (70, 128), (33, 200)])
def test_int8_array_is_taken_as_codes(m: int, k: int, fmt: str) -> None:
    codes = np.random.default_rng(1).integers(-128, 128, (m, 2 * k)).astype(np.int8)
    q = nb.quantize(testing.values((7, k), 3), fmt)
    zeros = 0 if q.zeros is None else q.zeros.astype(np.int64)
    for x in (codes[:, :k], codes[:, ::2], np.asfortranarray(codes[:, k:])):
        total = (x.astype(np.int64) @ (q.codes().astype(np.int64) - zeros).T).astype(np.float32)
        for isa in levels():
            got = np.empty((m, 7), np.float32)
            _core.matmul(x, q._storage.pack(1), got, "int8", None, 1, isa)
            np.testing.assert_array_equal(got, total * q.scales[:, 0], err_msg=isa)
        np.testing.assert_array_equal(nb.matmul(x, q.T), x.astype(np.float32) @ q.T)
        wide = nb.matmul(x.astype(np.int16), q.T, compute="int8")
        np.testing.assert_array_equal(wide, nb.matmul(x.astype(np.float32), q.T, compute="int8"))


@pytest.mark.parametrize("compute", [*EXACT, "bf16"])
@pytest.mark.parametrize("fmt", ["int4_g32", "uint4_g128", "bipolar2"])
def test_threads(compute: str, fmt: str) -> None:
    for m, n, k in [(1, 1000, 256), (37, 200, 128), (200, 64, 64), (600, 300, 96)]:
        x, q = product(m, n, k, fmt)
        first = nb.matmul(x, q.T, compute=compute, threads=1)
        # The second product takes the panels the other way round.
        np.testing.assert_array_equal(nb.matmul(x, q.T, compute=compute, threads=1), first)
        for threads in (2, 3, 7, 16, 64):
            np.testing.assert_array_equal(
                nb.matmul(x, q.T, compute=compute, threads=threads), first
            )
        with nb.threads(5):
            np.testing.assert_array_equal(nb.matmul(x, q.T, compute=compute), first)


@pytest.mark.parametrize("compute", EXACT)
@pytest.mark.parametrize("fmt", ["int4_g32", "uint4_g64", "bipolar1"])
def test_batch_invariance(compute: str, fmt: str) -> None:
    x, q = product(130, 70, 192, fmt)
    every = nb.matmul(x, q.T, compute=compute)
    for m in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100, 129):
        np.testing.assert_array_equal(nb.matmul(x[:m], q.T, compute=compute), every[:m])
        np.testing.assert_array_equal(
            nb.matmul(x[130 - m :], q.T, compute=compute), every[130 - m :]
        )
    for i in (0, 57, 129):
        np.testing.assert_array_equal(nb.matmul(x[i], q.T, compute=compute), every[i])


@pytest.mark.parametrize("compute", EXACT)
def test_any_window_of_the_weight(compute: str) -> None:
    x, q = product(19, 90, 128, "int4_g32")
    every = nb.matmul(x, q.T, compute=compute)
    for a, b in [(0, 1), (3, 20), (15, 33), (16, 48), (64, 90), (89, 90)]:
        np.testing.assert_array_equal(nb.matmul(x, q[a:b].T, compute=compute), every[:, a:b])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(value: float) -> None:
    for fmt, m in itertools.product(("int4_g32", "uint4", "ternary_g64"), (1, 4, 40)):
        x, q = product(m, 33, 160, fmt)
        clean = {c: nb.matmul(x, q.T, compute=c) for c in q.format.computes}
        bad = x.copy()
        bad[m // 2, 101] = value
        others = np.arange(m) != m // 2
        for compute, want in clean.items():
            got = nb.matmul(bad, q.T, compute=compute)
            np.testing.assert_array_equal(got[others], want[others])
            if compute.startswith("int8"):
                assert np.isnan(got[m // 2]).all()
        with np.errstate(invalid="ignore"):
            ideal = bad.astype(np.float64) @ q.dequantize().T.astype(np.float64)
        got = nb.matmul(bad, q.T)[m // 2]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(ideal[m // 2]))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(ideal[m // 2]))


def test_subnormals_are_kept() -> None:
    q = nb.QTensor.from_parts(
        "int8", np.full((1, 64), 1, np.int8), np.array([[2.0**-20]], np.float32)
    )
    x = np.full((1, 64), 2.0**-126, np.float32)
    assert (x @ q.T)[0, 0] == np.float32(2.0**-140)
    q = nb.QTensor.from_parts(
        "int8", np.full((1, 64), 1, np.int8), np.array([[2.0**-140]], np.float32)
    )
    for compute in ("f32", "int8"):
        np.testing.assert_array_equal(
            nb.matmul(np.ones((1, 64), np.float32), q.T, compute=compute), [[np.float32(2.0**-134)]]
        )


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_codes(bits: int) -> None:
    """All codes at their ends, activations at theirs: what a saturating instruction gets wrong."""
    k = 512
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    patterns = [np.full(k, low), np.full(k, high), np.where(np.arange(k) % 2, low, high)]
    q = nb.QTensor.from_parts(f"int{bits}", np.stack(patterns), np.ones(3, np.float32))
    u = nb.QTensor.from_parts(
        f"uint{bits}", np.stack(patterns) - low, np.ones(3, np.float32), [0, 1, 3]
    )
    x = np.stack([np.full(k, -128), np.full(k, 127), np.where(np.arange(k) % 2, -128, 127)])
    for isa in levels():
        for w, integers in ((q, q.codes()), (u, u.codes() - u.zeros.astype(int))):
            for m in (1, 3, 16):
                codes = np.resize(x, (m, k)).astype(np.int8)
                got = np.empty((m, 3), np.float32)
                _core.matmul(codes, w._storage.pack(1), got, "int8", None, 1, isa)
                want = codes.astype(np.int64) @ integers.astype(np.int64).T
                np.testing.assert_array_equal(got, want)


def test_integer_fill_is_exact_everywhere() -> None:
    """Small integers and scales of powers of two leave nothing to round, in any compute."""
    rng = np.random.default_rng(8)
    for fmt in ("int4_g32", "uint4_g32", "bipolar2_g64", "ternary_g32"):
        element = nb.Format(fmt).element
        step = 2 if "bipolar" in fmt else 1
        codes = rng.choice(np.arange(element.minimum, element.maximum + 1, step), (40, 192))
        groups = nb.Format(fmt).groups(192)
        scales = np.exp2(rng.integers(-3, 3, (40, groups)))
        zeros = rng.integers(0, element.levels, (40, groups)) if element.zeros else None
        q = nb.QTensor.from_parts(fmt, codes, scales, zeros)
        x = rng.integers(-8, 9, (21, 192)).astype(np.float32)
        x[:, 0] = 127
        x[:, ::32] = 127
        want = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
        for compute in element.computes:
            np.testing.assert_array_equal(nb.matmul(x, q.T, compute=compute), want, err_msg=compute)


PROGRAM = """
import json, warnings
import nibblas as nb
report = nb.self_test()
print(json.dumps(report.as_dict() | {"active": nb.info()["isa"]["active"]}))
"""


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, object]]:
    return {}


@pytest.mark.parametrize("isa", levels())
def test_self_test_at_every_level(run_python, reports, isa: str) -> None:  # type: ignore[no-untyped-def]
    report = json.loads(run_python(PROGRAM, NIBBLAS_ISA=isa))
    assert report["active"] == isa
    assert report["ok"], report["failures"][:3]
    assert list(report["levels"]) == levels()[: levels().index(isa) + 1]
    assert report["seconds"] < 30
    assert report["cases"] >= 500
    reports[isa] = report
    assert len({r["hash"] for r in reports.values()}) == 1


def test_unknown_level_is_a_warning(run_python) -> None:  # type: ignore[no-untyped-def]
    out = run_python(
        "import warnings, numpy as np, nibblas as nb\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    q = nb.quantize(np.ones((4, 8)), 'int4')\n"
        "    np.ones(8) @ q.T\n"
        "print(nb.info()['isa']['active'], [str(w.message) for w in seen])",
        NIBBLAS_ISA="avx9000",
    )
    assert "avx9000" in out
    assert out.split()[0] == levels()[-1]


def test_self_test_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _core.matmul

    def broken(x, packed, y, compute, bias, threads, isa):  # type: ignore[no-untyped-def]
        real(x, packed, y, compute, bias, threads, isa)
        if isa == levels()[-1] and y.shape[0] > 16:
            y[16, 0] = np.nextafter(y[16, 0], np.float32(np.inf))

    monkeypatch.setattr(_core, "matmul", broken)
    report = nb.self_test()
    assert not report
    assert "FAILED" in str(report)
    assert all(line.startswith(levels()[-1]) for line in report.failures)


def test_values_never_change() -> None:
    digest = hashlib.sha256(testing.values((1000,), 7).tobytes()).hexdigest()
    assert digest == "1e0bb94b8a4dd6283930fb77c6bb6110429fd55dc7fbaa037f174966a6142622"
