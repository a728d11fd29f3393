"""Sparse weights on a GPU, against float64 and the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nibblas as nb
from nibblas.cuda import _launch, _sparse
from nibblas.cuda._launch import Kernel, kernel
from nibblas.cuda._sparse import SparseCut, build_sparse

cupy = pytest.importorskip("cupy")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA device", allow_module_level=True)
ml_dtypes = pytest.importorskip("ml_dtypes")

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"f16": np.dtype(np.float16), "bf16": BF16}
SHAPES = [(1, 1, 1), (3, 33, 130), (8, 100, 256), (16, 257, 1000), (17, 64, 72), (33, 70, 520)]
SHAPES += [(64, 300, 384), (65, 40, 200), (130, 31, 127)]


def weights(fmt: str, n: int, k: int, density: float, seed: int = 0) -> nb.QTensor:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    pattern = nb.Format(fmt).structure
    assert pattern is not None
    names = {"bitmap": "unstructured", "2of4": "2:4"}
    name = names.get(pattern, pattern.replace("bsr", "group"))
    return nb.quantize(nb.prune(w, name, 0.5 if name == "2:4" else density), fmt)


def activations(m: int, k: int, dtype: Any, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, k)).astype(dtype)


def check(y: Any, x: np.ndarray, q: nb.QTensor, bias: Any = None) -> None:
    """Products of float64, and what rounding the sums and the result may add."""
    w = q.dequantize().astype(np.float64)
    reach = np.abs(w)
    if not q.format.is_plain:
        # The tensor cores see codes and a correction, which may be larger than the value.
        scales = np.repeat(np.asarray(q.scales, np.float64), q.format.group or w.shape[1], axis=1)
        reach = reach + scales[:, : w.shape[1]] * 2.0**q.format.bits
    exact, size = x.astype(np.float64) @ w.T, np.abs(x.astype(np.float64)) @ reach.T
    if bias is not None:
        exact, size = exact + bias, size + np.abs(bias)
    got = np.asarray(y.get()).astype(np.float64)
    assert got.shape == exact.shape
    eps = 2.0**-24 if y.dtype.itemsize > 2 else 2.0**-8 if y.dtype == BF16 else 2.0**-11
    bound = 1.01 * eps * np.abs(exact) + 2.0**-21 * size + 2.0**-24
    worst = np.abs(got - exact) / bound
    assert (worst <= 1).all(), f"{worst.max()} at {np.unravel_index(worst.argmax(), worst.shape)}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("structure", "density"),
    [("bitmap", 0.1), ("bitmap", 0.4), ("bitmap", 1.0), ("2of4", 0.5), ("block16x64", 0.4)],
)
def test_edges(structure: str, density: float, value: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    q = weights(f"{value}_{structure}", n, k, density)
    x = activations(m, k, DTYPES[value])
    y = cupy.asarray(x) @ q.to("cuda:0").T
    assert y.dtype == DTYPES[value]
    check(y, x, q)


@pytest.mark.parametrize("fmt", ["f16_bitmap", "f16_2of4"])
def test_strides_bias_out_repeat(fmt: str) -> None:
    q = weights(fmt, 200, 1001, 0.3).to("cuda:0")
    wide = activations(12, 2002, np.float16)
    x, bias = cupy.asarray(wide)[::-1, ::2], np.linspace(-3, 3, 200).astype(np.float32)
    out = cupy.empty((200, 12), np.float32).T
    assert nb.matmul(x, q.T, bias=cupy.asarray(bias), out=out, dtype=np.float32) is out
    check(out, wide[::-1, ::2], q, bias)
    again = nb.matmul(x, q.T, bias=cupy.asarray(bias), dtype=np.float32)
    assert (out == again).all()
    stack = cupy.asarray(activations(24, 1001, np.float16)).reshape(4, 6, 1001)
    check((stack @ q.T).reshape(24, 200), stack.get().reshape(24, 1001), q)
    check((stack[0, 0] @ q.T)[None], stack[0, 0].get()[None], q)


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize("fmt", ["f16_bitmap", "f16_2of4"])
def test_many_spans(fmt: str, m: int) -> None:
    """Several blocks share a row of records, and meet in the workspace."""
    q = weights(fmt, 96, 20000, 0.2)
    x = activations(m, 20000, np.float16)
    d, xd = q.to("cuda:0"), cupy.asarray(x)
    y = nb.matmul(xd, d.T, dtype=np.float32)
    check(y, x, q)
    assert (nb.matmul(xd, d.T, dtype=np.float32) == y).all()


@pytest.mark.parametrize("fmt", ["f16_bitmap", "f16_2of4", "bf16_2of4"])
def test_not_finite(fmt: str) -> None:
    q = weights(fmt, 64, 256, 0.3).to("cuda:0")
    for bad in (np.nan, np.inf, -np.inf):
        x = activations(5, 256, np.float32)
        x[3, 17] = bad
        y = (cupy.asarray(x.astype(DTYPES[fmt.split("_")[0]])) @ q.T).get().astype(np.float32)
        assert not np.isfinite(y[3]).any()
        assert np.isfinite(np.delete(y, 3, 0)).all()


EVERY = ["f16_bitmap", "f16_2of4", "bf16_block16x64", "int8_bitmap", "int8_2of4", "int8_block16x64"]
EVERY += ["int4_g128_bsr32"]


@pytest.mark.parametrize("fmt", EVERY)
def test_no_entries_all_entries_uneven_rows_and_empty_shapes(fmt: str) -> None:
    """None of the patterns divides 300, nor 40 rows."""
    x = activations(3, 300, np.float32).astype(DTYPES.get(fmt.split("_")[0], np.float32))
    none = nb.quantize(np.zeros((40, 300), np.float32), fmt)
    y = cupy.asarray(x) @ none.to("cuda:0").T
    # Codes of four bits are less 8 only when they are summed.
    check(y, x, none) if fmt.startswith("int4") else cupy.testing.assert_array_equal(y, 0)
    assert (cupy.asarray(x)[:0] @ none.to("cuda:0").T).shape == (0, 40)
    full = weights(fmt, 40, 300, 1.0)
    w = np.zeros((70, 300), np.float32)
    w[13::16] = full.dequantize()[:4]
    for q in (full, nb.quantize(w, fmt)):
        check(nb.matmul(cupy.asarray(x), q.to("cuda:0").T, dtype=np.float32), x, q)
        if not q.format.is_plain:
            same_as_dense(q, x)


@pytest.mark.parametrize("fmt", EVERY)
def test_weights_that_are_refused(fmt: str) -> None:
    """Those of the device as those of the host, with the same words."""
    bad = np.zeros((8, 256), np.float32)
    bad[5, 70] = np.nan
    cases = [(bad, "row 5, column 70")]
    if fmt.endswith("2of4"):
        cases.append((np.ones((8, 256), np.float32), "1024 entries are in the way"))
    for w, words in cases:
        with pytest.raises(ValueError, match=words) as host:
            nb.quantize(w, fmt)
        with pytest.raises(ValueError, match=words) as device:
            nb.quantize(cupy.asarray(w), fmt)
        assert str(host.value) == str(device.value)


@pytest.mark.parametrize(
    "cut", [(1, 1), (2, 2, 1, 2), (4, 2, 2, 1), (1, 3, 2, 1, 6, 2), (4, 2, 1, 1, 6, 3)], ids=str
)
@pytest.mark.parametrize(
    "fmt",
    ["f16_bitmap", "bf16_2of4", "int8_2of4", "int4_g128_bsr32", "int8_bitmap", "int8_block16x32"],
)
def test_every_cut(fmt: str, cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps, blocks of a multiprocessor and records of a run change where sums meet, no more."""
    monkeypatch.setattr(_sparse, "plan_sparse", lambda p: build_sparse(p, SparseCut(*cut)))
    for n, k in ((300, 1400), (40, 4480)):
        q, x = weights(fmt, n, k, 0.3), activations(11, k, np.float16)
        if q.format.element.name == "int8":
            same_as_dense(q, x)
        else:
            x = x.astype(DTYPES.get(fmt.split("_")[0], x.dtype))
            check(cupy.asarray(x) @ q.to("cuda:0").T, x, q)


def test_a_graph_repeats_the_product() -> None:
    q = weights("f16_bitmap", 128, 512, 0.3).to("cuda:0")
    x, y = cupy.asarray(activations(4, 512, np.float16)), cupy.empty((4, 128), np.float16)
    step = nb.cuda.graph(lambda: nb.matmul(x, q.T, out=y))
    x[...] = cupy.asarray(activations(4, 512, np.float16, 5))
    step()
    check(y, x.get(), q)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=str)
@pytest.mark.parametrize("fmt", ["f16_bitmap", "bf16_2of4", "f32_bitmap", "f32_2of4", "f16_bsr32"])
def test_every_float_meets_every_float(fmt: str, dtype: Any) -> None:
    q = weights(fmt, 70, 300, 0.3)
    x = activations(5, 300, dtype)
    y = nb.matmul(cupy.asarray(x), q.to("cuda:0").T, dtype=np.float32)
    check(y, x.astype(np.float32), q)


@pytest.mark.parametrize("fmt", ["f16_bitmap", "int8_2of4", "int4_g128_bsr32"])
def test_rows_stay_on_the_device(fmt: str) -> None:
    q = weights(fmt, 40, 300, 0.4)
    part = q.to("cuda:0")[3:20]
    assert part.device == "cuda:0"
    x = activations(4, 300, np.float16)
    check(cupy.asarray(x) @ part.T, x, q[3:20])
    assert part.to("cpu") == q[3:20]


def test_refusals() -> None:
    q = weights("f16_bitmap", 32, 64, 0.3).to("cuda:0")
    for compute in ("int8", "bf16"):
        with pytest.raises(ValueError, match="compute"):
            nb.matmul(cupy.ones((2, 64), np.float16), q.T, compute=compute)
    with pytest.raises(ValueError, match="not available on CUDA"):
        q @ q.T


def same_as_dense(q: nb.QTensor, x: np.ndarray) -> None:
    """Integer products have the CPU's bits; float products are those of the dense weights."""
    d = q.to("cuda:0")
    check(nb.matmul(cupy.asarray(x), d.T, dtype=np.float32), x, q)
    wide = x.astype(np.float32)
    host = nb.matmul(wide, q.T, compute="int8", bias=np.arange(q.shape[0], dtype=np.float32))
    bias = cupy.arange(q.shape[0], dtype=np.float32)
    got = nb.matmul(cupy.asarray(wide), d.T, compute="int8", bias=bias)
    assert got.get().tobytes() == host.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("fmt", "density"),
    [
        ("int8_2of4", 0.5),
        ("int4_g128_bsr32", 0.5),
        ("int8_bitmap", 0.1),
        ("int8_bitmap", 0.5),
        ("int8_bitmap", 1.0),
        ("int8_block16x64", 0.4),
        ("int8_bsr32", 0.5),
    ],
)
def test_codes(fmt: str, density: float, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    same_as_dense(weights(fmt, n, k, density), activations(m, k, np.float16))


@pytest.mark.parametrize(
    ("fmt", "density", "structure"),
    [
        ("f16_bitmap", 0.3, _sparse.ENTRIES),
        ("f16_bitmap", 0.1, _sparse.PAIRS),
        ("f16_block16x16", 0.3, _sparse.TILES),
        ("bf16_block16x64", 0.3, _sparse.TILES),
        ("f16_block8x64", 0.3, _sparse.ENTRIES),
        ("int8_bitmap", 0.5, _sparse.ENTRIES),
        ("int8_bitmap", 0.1, _sparse.PAIRS),
        ("int8_block16x32", 0.3, _sparse.TILES),
        ("int8_block16x16", 0.3, _sparse.ENTRIES),
    ],
)
def test_what_is_kept_whole(fmt: str, density: float, structure: int) -> None:
    """Tiles of one product are kept or dropped; what does not fit them is a bitmap."""
    q = weights(fmt, 256, 1024, density).to("cuda:0")
    panels = q._storage.panels  # type: ignore[attr-defined]
    (records,) = panels.held[panels.own]
    assert records.structure == structure
    size = 2 if q.format.is_plain else 1
    assert panels.nbytes < (density + 0.35) * size * 256 * 1024


@pytest.mark.parametrize("m", [3, 12, 20])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32], ids=str)
@pytest.mark.parametrize("fmt", ["int4_g128_bsr32", "int4_g256_block16x64", "int4_g128_bsr48"])
def test_kept_groups(fmt: str, dtype: Any, m: int) -> None:
    for density in (0.05, 0.5, 1.0):
        q = weights(fmt, 200, 1030, density)
        x = activations(m, 1030, dtype)
        check(nb.matmul(cupy.asarray(x), q.to("cuda:0").T, dtype=np.float32), x, q)


@pytest.mark.parametrize(
    "fmt", ["int8_g32_bitmap", "int4_2of4", "int4_bsr32", "int4_g32_bitmap", "uint4_g64_bsr64"]
)
def test_formats_without_a_kernel_are_spread(fmt: str) -> None:
    same_as_dense(weights(fmt, 90, 512, 0.5), activations(9, 512, np.float16))


@pytest.mark.parametrize(
    ("fmt", "density", "most"),
    [
        ("int8_bitmap", 0.5, 32),
        ("int8_bitmap", 0.6, 16),
        ("int8_bitmap", 0.1, 64),
        ("int8_2of4", 0.5, 64),
        ("int8_block16x64", 0.4, 64),
        ("int4_g128_bsr32", 0.5, 16),
    ],
)
def test_rows_beyond_the_records_meet_dense_panels(fmt: str, density: float, most: int) -> None:
    """Which nest a product takes, and that both give the CPU's bits."""
    compute = "int8" if fmt.startswith("int8") else "f32"
    q = weights(fmt, 100, 640, density)
    d = q.to("cuda:0")
    panels = d._storage.panels  # type: ignore[attr-defined]
    for m in (most, most + 1):
        x = activations(m, 640, np.float16)
        beyond = m > most
        nest = nb.explain(cupy.asarray(x), d.T, compute=compute).nest
        assert (nest == "sparse") != beyond
        assert (panels.spread is not None) == beyond
        same_as_dense(q, x) if compute == "int8" else check(cupy.asarray(x) @ d.T, x, q)


def test_a_bitmap_of_nearly_everything_lies_as_dense() -> None:
    for density, sparse in ((0.65, True), (0.8, False)):
        q = weights("int8_bitmap", 100, 640, density)
        x = activations(4, 640, np.float16)
        nest = nb.explain(cupy.asarray(x), q.to("cuda:0").T, compute="int8").nest
        assert (nest == "sparse") == sparse
        same_as_dense(q, x)


@pytest.mark.parametrize("fmt", ["int8_2of4", "int4_g128_bsr32", "int8_bitmap"])
def test_activations_quantised_once(fmt: str) -> None:
    q, x = weights(fmt, 100, 640, 0.5), cupy.asarray(activations(6, 640, np.float16))
    d = q.to("cuda:0")
    y = nb.cuda.activations(x, "int8") @ d.T
    assert (y == nb.matmul(x, d.T, compute="int8")).all()
    with pytest.raises(ValueError, match="int8"):
        nb.cuda.activations(x, "int8") @ weights("f16_bitmap", 100, 640, 0.5).to("cuda:0").T


def test_integers_in_a_split_sum() -> None:
    same_as_dense(weights("int8_2of4", 64, 20000, 0.5), activations(30, 20000, np.float16))
    q = weights("int8_2of4", 96, 640, 0.5).to("cuda:0")
    codes = np.random.default_rng(3).integers(-127, 128, (7, 640)).astype(np.int8)
    got = nb.matmul(cupy.asarray(codes), q.T, compute="int8").get()
    host = nb.matmul(codes, q.to("cpu").T, compute="int8")
    assert got.tobytes() == host.tobytes()


# Lets the kernel after it begin at once, and writes what that one reads only after a while.
LATE = r"""
extern "C" __global__ void late(unsigned short *x, const unsigned short *from, int n) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const long long start = clock64();
    while (clock64() - start < 100000) {}
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        x[i] = from[i];
}"""


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a function with kernels that start when those before have ended."""
    launch = Kernel.launch

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "launch", lambda k, *a, early=False: launch(k, *a))
            return function()

    return call


@pytest.mark.parametrize("fmt", ["f16_bitmap", "bf16_2of4", "int8_2of4", "int4_g128_bsr32"])
def test_products_of_weights_just_packed(fmt: str, plainly: Any) -> None:
    """A product begins before the kernels ahead of it have ended, but packing is over by then."""
    dtype = DTYPES.get(fmt.split("_")[0], np.dtype(np.float16))
    compute = "int8" if fmt.startswith("int8") else "f32"
    sets = [weights(fmt, 500, 2048, 0.3, seed).dequantize() for seed in range(3)]
    xs = [cupy.asarray(activations(9, 2048, dtype, seed)) for seed in range(3)]

    def product(w: np.ndarray, x: Any) -> Any:
        return nb.matmul(x, nb.quantize(cupy.asarray(w), fmt).T, compute=compute, dtype=np.float32)

    want = [plainly(lambda w=w, x=x: product(w, x)).get() for w in sets for x in xs]
    host = nb.quantize(sets[0], fmt)
    if compute == "int8":
        exact = nb.matmul(xs[0].get().astype(np.float32), host.T, compute="int8")
        assert want[0].tobytes() == exact.tobytes()
    else:
        check(cupy.asarray(want[0]), xs[0].get(), host)
    # What a round frees is what the next one gets.
    for _ in range(8):
        got = [product(w, x) for w in sets for x in xs]
        for y, exact in zip(got, want, strict=True):
            assert y.get().tobytes() == exact.tobytes()


def layers() -> list[tuple[nb.QTensor, str]]:
    formats = ["f16_bitmap", "f16_2of4", "int8_2of4", "int4_g128_bsr32", "int4_g128", "f16_bitmap"]
    out = []
    for i, fmt in enumerate(formats):
        w = np.random.default_rng(i).standard_normal((1024, 1024)).astype(np.float32) / 32
        pattern = nb.Format(fmt).structure
        if pattern is not None:
            names = {"bitmap": "unstructured", "2of4": "2:4", "bsr32": "group32"}
            w = nb.prune(w, names[pattern], 0.5)
        out.append((nb.quantize(w, fmt).to("cuda:0"), "int8" if fmt.startswith("int8") else "f32"))
    return out


@pytest.mark.parametrize("m", [1, 9, 40])
def test_products_that_feed_each_other(m: int, plainly: Any) -> None:
    """Each begins before the one before has ended, one by one and in a graph."""
    stack = layers()
    late = cupy.RawKernel(LATE, "late")
    x, fresh = cupy.zeros((m, 1024), np.float16), cupy.zeros((m, 1024), np.float16)
    bufs = [cupy.empty((m, 1024), np.float16) for _ in range(2)]

    def chain() -> Any:
        late((4,), (256,), (x, fresh, np.int32(x.size)))
        held = x
        # The same two arrays again and again: each kernel also writes what the last but one read.
        for i, (q, compute) in enumerate(stack):
            held = nb.matmul(held, q.T, compute=compute, out=bufs[i % 2])
        return held

    inputs = [activations(m, 1024, np.float16, seed) for seed in range(4)]
    want = []
    for a in inputs:
        fresh[...] = cupy.asarray(a)
        want.append(plainly(chain).get())
    assert np.isfinite(want[0]).all()
    assert want[0].tobytes() != want[1].tobytes()
    step = nb.cuda.graph(chain)
    for run in [chain, step] * 5:
        for a, exact in zip(inputs, want, strict=True):
            fresh[...] = cupy.asarray(a)
            x.fill(7)
            assert run().get().tobytes() == exact.tobytes()
    for a in inputs:
        fresh[...] = cupy.asarray(a)
        for _ in range(20):
            step()
        assert step().get().tobytes() == want.pop(0).tobytes()


def test_a_captured_product_after_two_streams(plainly: Any) -> None:
    """What it waits for are a copy and a kernel of another stream."""
    q = weights("f16_bitmap", 512, 2048, 0.3).to("cuda:0")
    a, b = (cupy.asarray(activations(8, 2048, np.float16, s)) for s in (1, 2))
    x, y = cupy.empty_like(a), cupy.empty((8, 512), np.float16)
    want = plainly(lambda: nb.matmul(cupy.concatenate([b[:4], a[4:]]), q.T)).get()
    one, two = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with one:
        nb.matmul(x, q.T, out=y)
        one.synchronize()
        one.begin_capture()
        x.data.copy_from_device_async(a.data, a.nbytes, one)
        event = cupy.cuda.Event(disable_timing=True)
        event.record(one)
        with two:
            two.wait_event(event)
            x[:4] = b[:4]
            event.record(two)
        one.wait_event(event)
        nb.matmul(x, q.T, out=y)
        graph = one.end_capture()
    for _ in range(5):
        x.fill(0)
        y.fill(0)
        cupy.cuda.get_current_stream().synchronize()
        graph.launch(one)
        one.synchronize()
        assert y.get().tobytes() == want.tobytes()


@pytest.mark.parametrize("early", [False, True])
def test_a_launch_that_fails(early: bool) -> None:
    from cupy_backends.cuda.api.driver import CUDADriverError

    q, x = weights("f16_bitmap", 64, 256, 0.3).to("cuda:0"), cupy.ones((2, 256), np.float16)
    y = x @ q.T
    pl = q._storage.panels.plan(2, "f32", 0)  # type: ignore[attr-defined]
    run = kernel(0, "sparse.cu", "sparse", pl.defines)
    with pytest.raises(CUDADriverError, match="INVALID_VALUE"):
        run.launch(pl.grid, 4096, pl.shared, 0, _sparse._SparseArgs(), early=early)
    assert (x @ q.T == y).all()


def test_where_kernels_cannot_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older devices and drivers launch one after the other."""
    decide = _launch._early_launch.__wrapped__
    assert decide(0) is not None
    with monkeypatch.context() as patch:
        patch.setattr(_launch, "_capability", lambda device: 89)
        assert decide(0) is None
    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 12020)
        assert decide(0) is None
    q, x = weights("f16_bitmap", 64, 256, 0.3).to("cuda:0"), cupy.ones((2, 256), np.float16)
    y = x @ q.T
    monkeypatch.setattr(
        _sparse, "kernel", lambda *a: Kernel(kernel(*a).module, kernel(*a).function)
    )
    q._storage.panels.calls = {}  # type: ignore[attr-defined]
    assert (x @ q.T == y).all()
