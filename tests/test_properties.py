"""Properties over random shapes, formats and distributions."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import nibblas as nb
from nibblas import _core, testing

NAMES = [e.name for e in nb.formats.table()]
# Those whose codes are integers of a byte, with one scale per row.
ROWS = [e.name for e in nb.formats.table() if e.linear and e.bits <= 8 and e.group is None]
fast = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def formats(draw: st.DrawFn) -> nb.Format:
    name = draw(st.sampled_from(NAMES))
    group = draw(st.sampled_from(["", "_g8", "_g16", "_g32", "_g64", "_g128", "_g48", "_g100"]))
    scale = draw(st.sampled_from(["", "_sf32", "_sbf16"]))
    if scale[2:] not in nb.Format(name).element.scales:
        scale = ""
    return nb.Format(name + group + scale)


def fill(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(shape).astype(np.float32)
    if kind == "lognormal":
        sign = rng.choice([-1, 1], shape)
        return (sign * rng.lognormal(0, 2, shape)).astype(np.float32)
    if kind == "uniform":
        return rng.uniform(-1, 1, shape).astype(np.float32)
    if kind == "cauchy":
        return np.clip(rng.standard_cauchy(shape), -1e4, 1e4).astype(np.float32)
    top = np.float32(3)
    return np.where(np.indices(shape).sum(0) % 2, top, -top).astype(np.float32)


KINDS = ["normal", "lognormal", "uniform", "cauchy", "alternating"]
problems = {
    "m": st.integers(1, 70),
    "n": st.integers(1, 70),
    "k": st.integers(1, 300),
    "fmt": formats(),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**32),
}


def make(
    m: int, n: int, k: int, fmt: nb.Format, kind: str, seed: int
) -> tuple[np.ndarray, nb.QTensor]:
    rng = np.random.default_rng(seed)
    if fmt.element.span > 1:
        n, k = min(n, 3), min(k, 100)  # a search, which takes long
    return fill(rng, (m, k), kind), nb.quantize(fill(rng, (n, k), kind), fmt)


@fast
@given(**problems)
def test_f32_and_bf16_stay_within_the_bound(m, n, k, fmt, kind, seed):  # type: ignore[no-untyped-def]
    x, q = make(m, n, k, fmt, kind, seed)
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    for compute in ("f32", "bf16", "int8"):
        if compute not in fmt.computes:
            continue
        error = np.abs(nb.matmul(x, q.T, compute=compute) - exact)
        assert (error <= testing.matmul_bound(x, q, compute)).all(), compute


@fast
@given(**problems, compute=st.sampled_from(["f32", "int8", "int8_g32", "int8_g128"]))
def test_equal_to_the_reference(m, n, k, fmt, kind, seed, compute):  # type: ignore[no-untyped-def]
    assume(compute in fmt.computes)
    x, q = make(m, n, k, fmt, kind, seed)
    want = np.empty((len(x), len(q)), np.float32)
    _core.reference(x, q._storage.parts(), want, compute, None)
    got = nb.matmul(x, q.T, compute=compute)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@fast
@given(**problems)
def test_the_error_bound_of_the_weights(m, n, k, fmt, kind, seed):  # type: ignore[no-untyped-def]
    if fmt.element.span > 1:
        n, k = min(n, 3), min(k, 100)  # a search, which takes long
    w = fill(np.random.default_rng(seed), (n, k), kind)
    for method in ("rtn", "mse"):
        q = nb.quantize(w, fmt, method=method)
        bound = np.repeat(q.error_bound, fmt.group or k, axis=1)[:, :k].astype(np.float64)
        assert (np.abs(w.astype(np.float64) - q.dequantize()) <= bound).all()


@fast
@given(**problems)
def test_portable_parts_round_trip(m, n, k, fmt, kind, seed):  # type: ignore[no-untyped-def]
    _, q = make(m, n, k, fmt, kind, seed)
    own = ("codes", "scales", "zeros")
    further = {name: a for name, a in q.parts.items() if name not in own}
    assert nb.QTensor.from_parts(fmt, q.codes(), q.scales, q.zeros, **further) == q
    rows = slice(seed % n, None, 1 + seed % 3)
    np.testing.assert_array_equal(q[rows].dequantize(), q.dequantize()[rows])


@fast
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    a=st.sampled_from(ROWS),
    b=st.sampled_from(ROWS),
    seed=st.integers(0, 2**32),
)
def test_raw_sums_are_exact(m, n, k, a, b, seed):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    p = nb.quantize(rng.standard_normal((m, k)), a)
    q = nb.quantize(rng.standard_normal((n, k)), b)

    def integers(t: nb.QTensor) -> np.ndarray:
        c = t.codes().astype(np.int64)
        return c if t.zeros is None else c - t.zeros.astype(np.int64)

    want = integers(p) @ integers(q).T
    np.testing.assert_array_equal(nb.matmul(p, q.T, dtype=np.int32), want)
    np.testing.assert_array_equal(nb.matmul(p, q.T, dtype=np.int64), want)


axis = st.integers(-3, 3)


@fast
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    m=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
    steps=st.tuples(st.sampled_from([-2, -1, 1, 2]), st.sampled_from([-3, -1, 1, 2])),
    left=st.booleans(),
    compute=st.sampled_from(["f32", "int8"]),
)
def test_any_stack_and_strides(lead, m, order, steps, left, compute):  # type: ignore[no-untyped-def]
    q = STACK_WEIGHT
    rng = np.random.default_rng(m)
    shape = [*lead, m * abs(steps[0]), 24 * abs(steps[1])]
    perm = list(range(len(shape)))
    order.shuffle(perm)
    memory = rng.standard_normal([shape[i] for i in perm]).astype(np.float32)
    x = memory.transpose(np.argsort(perm))[..., :: steps[0], :: steps[1]]
    assert x.shape == (*lead, m, 24)
    flat = np.ascontiguousarray(x).reshape(-1, 24)
    want = nb.matmul(flat, q.T, compute=compute).reshape(*lead, m, 10)
    if left:
        got = nb.matmul(q, x.swapaxes(-1, -2), compute=compute).swapaxes(-1, -2)
    else:
        got = nb.matmul(x, q.T, compute=compute)
    np.testing.assert_array_equal(got, want)
    out = np.full(want.shape, 9, np.float32)[..., ::-1, :]
    nb.matmul(x, q.T, compute=compute, out=out)
    np.testing.assert_array_equal(out, want)


STACK_WEIGHT = nb.quantize(np.random.default_rng(9).standard_normal((10, 24)), "int4_g8")


@fast
@given(text=st.text(max_size=30))
def test_format_names_never_crash(text):  # type: ignore[no-untyped-def]
    try:
        f = nb.Format(text)
    except ValueError:
        return
    assert nb.Format(str(f)) == f
