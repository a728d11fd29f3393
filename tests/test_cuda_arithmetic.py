"""Integer operators and L-Mul on a device, bit for bit against the CPU.

Without a device the same kernels are compiled by the host's C++ compiler and run as blocks of one
thread, which leaves out what threads tell each other, and nothing of the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nibblas as nb
from nibblas import approx, intops
from nibblas.cuda import _arithmetic, _compile, _intops

NARROW = [np.int8, np.uint8, np.int16, np.uint16, np.int32]

# What CUDA has and C++ has not, for a block of one thread.
SHIM = r"""
#include <cmath>
#include <cstring>
#define __device__
#define __host__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __shared__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define NB_WARP 1
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dim { unsigned x, y, z; };
static Dim threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim{1, 1, 1}, gridDim{1, 1, 1};
uint4 kept[1 << 14];
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> static inline T __shfl_xor_sync(unsigned, T v, int) { return v; }
static inline void __syncthreads() {}
static inline int __syncthreads_or(int v) { return v; }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class To, class From> static inline To bits(From v) {
    To r;
    memcpy(&r, &v, sizeof r);
    return r;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
static inline unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
static inline float __uint_as_float(unsigned v) { return bits<float>(v); }
static inline float __double2float_rn(double v) { return (float)v; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline unsigned __cvta_generic_to_shared(const void *) { return 0; }
static inline void atomicOr(int *p, int v) { *p |= v; }
static inline float of_half(unsigned short h) {
    const int field = h >> 10 & 31, fraction = h & 1023;
    const float v = field == 31 ? (fraction ? NAN : INFINITY)
                                : ldexpf((field ? 1024 : 0) + fraction, (field ? field : 1) - 25);
    return h >> 15 ? -v : v;
}
extern "C" void place(unsigned x, unsigned y, unsigned gx, unsigned gy) {
    blockIdx = {x, y, 0};
    gridDim = {gx, gy, 1};
}
"""
HALVES = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));': "f = of_half(h);",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));': "__builtin_trap();",
}


def flat(name: str, seen: set[str]) -> str:
    """Return a source with what it includes, and nothing of PTX."""
    seen.add(name)
    text = _compile.sources()[name].decode().replace("#pragma once", "")
    for ptx, plain in HALVES.items():
        text = text.replace(ptx, plain)
    text = re.sub(r"asm volatile\(.*?\);", "", text)

    def include(found: re.Match[str]) -> str:
        return "" if found[1] in seen else flat(found[1], seen)

    return re.sub(r"#include <(nibblas/.*?)>", include, text)


class Host:
    """Kernels compiled for the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, ctypes.CDLL] = {}

    def library(self, source: str) -> ctypes.CDLL:
        if source not in self.made:
            text = self.folder / f"{source}.cpp"
            text.write_text(SHIM + flat(source, set()))
            out = text.with_suffix(".so")
            # Integers wrap as the device's do.
            options = [
                "-std=c++17",
                "-O1",
                "-w",
                "-shared",
                "-fPIC",
                "-fwrapv",
                "-ffp-contract=off",
            ]
            command = [str(compiler()), *options, str(text), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self.made[source] = ctypes.CDLL(str(out))
        return self.made[source]

    def kernel(self, device: int, source: str, name: str, defines: Any = ()) -> Any:
        library = self.library(source)
        function = getattr(library, name)

        def launch(grid: Any, threads: int, room: int, stream: int, args: Any) -> None:
            assert room <= 1 << 18
            function.argtypes = [type(args)]
            for y in range(grid[1]):
                for x in range(grid[0]):
                    library.place(x, y, *grid)
                    function(args)

        return types.SimpleNamespace(launch=launch)


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def bare(x: Any) -> Any:
    if isinstance(x, StandIn):
        return x.array
    if isinstance(x, (tuple, list)):
        return type(x)(bare(v) for v in x)
    return x


def dressed(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return StandIn(x)
    if isinstance(x, (tuple, list)) and any(isinstance(v, np.ndarray) for v in x):
        return type(x)(map(dressed, x))
    return x


class StandIn(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that claims to lie on a device."""

    __cuda_array_interface__ = property(lambda self: {})

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    data = property(lambda self: types.SimpleNamespace(ptr=self.array.ctypes.data))
    device = property(lambda self: types.SimpleNamespace(id=0))

    def get(self) -> np.ndarray:
        return self.array.copy()

    def __array__(self, *args: Any, **more: Any) -> Any:
        raise TypeError("an array of a device became one of the host")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **more: Any) -> Any:
        return dressed(getattr(ufunc, method)(*map(bare, inputs), **more))

    def __getitem__(self, key: Any) -> Any:
        return dressed(np.asarray(self.array[key]))

    def __int__(self) -> int:
        return int(self.array)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.array, name)
        if callable(value):
            return lambda *args, **more: dressed(value(*map(bare, args), **more))
        return dressed(value)


class Namespace(types.ModuleType):
    """NumPy, as far as CuPy is asked for."""

    ndarray = StandIn

    def __init__(self) -> None:
        super().__init__("cupy")
        here = types.SimpleNamespace(ptr=0)

        class Device:
            def __init__(self, number: int = 0) -> None:
                self.id = number

            def __enter__(self) -> None: ...
            def __exit__(self, *why: object) -> None: ...

        self.cuda = types.SimpleNamespace(Device=Device, get_current_stream=lambda: here)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(np, name)
        return lambda *args, **more: dressed(function(*map(bare, args), **more))

    def asarray(self, x: Any, *args: Any) -> Any:
        return StandIn(np.array(bare(x), *args))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("kernels"))


def real_cupy() -> Any:
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception:
        return None
    return cupy


@pytest.fixture(params=["host", "cuda"])
def send(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], Any]]:
    """What sends an array to the device."""
    _intops._upload.cache_clear()
    if request.param == "cuda":
        cupy = real_cupy()
        if cupy is None:
            pytest.skip("no CUDA device")
        yield cupy.asarray
    else:
        if compiler() is None:
            pytest.skip("no C++ compiler")
        host: Host = request.getfixturevalue("host")
        stand_in = Namespace()
        monkeypatch.setitem(sys.modules, "cupy", stand_in)
        for module in (_intops, _arithmetic):
            monkeypatch.setattr(module, "kernel", host.kernel)
        monkeypatch.setattr(_intops, "device_properties", lambda device: (1, 1 << 18))
        yield stand_in.asarray
    _intops._upload.cache_clear()


def fetch(y: Any) -> Any:
    assert hasattr(type(y), "__cuda_array_interface__"), f"{type(y)} is not on the device"
    return y.get()


def same(got: Any, want: Any) -> None:
    """Compare results, and their scales."""
    if isinstance(want, tuple):
        assert isinstance(got, tuple)
        for g, w in zip(got, want, strict=True):
            same(g, w)
        return
    if not isinstance(want, np.ndarray):
        assert got == want
        return
    g = got if isinstance(got, np.ndarray) else fetch(got)
    assert g.dtype == want.dtype
    assert g.shape == want.shape
    raw = np.dtype(f"u{want.dtype.itemsize}")
    differ = g.view(raw) != want.view(raw)
    where = np.argwhere(np.atleast_1d(differ))
    first = tuple(where[0]) if len(where) else ()
    assert not differ.any(), (
        f"{differ.sum()} of {differ.size} differ, first at {first}: "
        f"{np.atleast_1d(g)[first]} for {np.atleast_1d(want)[first]}"
    )


def same_errors(
    cases: list[tuple[Callable[[Any], Any], type[Exception]]], x: np.ndarray, sent: Any
) -> None:
    """Each call of what lies on the host and of what was sent fails alike, with the same words."""
    for call, error in cases:
        with pytest.raises(error) as on_host:
            call(x)
        with pytest.raises(error) as on_device:
            call(sent)
        assert str(on_device.value) == str(on_host.value)


def numbers(rng: np.random.Generator, dtype: Any, n: int) -> np.ndarray:
    """Ends, small and large integers of a type."""
    info = np.iinfo(dtype)
    wide = rng.integers(info.min, info.max, n, endpoint=True)
    near = rng.integers(max(info.min, -3000), min(info.max, 3000), n, endpoint=True)
    ends = [info.min, info.min + 1, 0, 1, 2, 5, info.max - 1, info.max]
    out = np.concatenate([ends, np.where(rng.random(n) < 0.5, wide, near)]).astype(dtype)
    return np.concatenate([out[:1], out])[1:]


@pytest.mark.parametrize("rounding", ["single", "gemmlowp", "float"])
@pytest.mark.parametrize("dtype", NARROW)
def test_requantize(rounding: str, dtype: Any, send: Any, rng: np.random.Generator) -> None:
    x = numbers(rng, dtype, 999)
    for multiplier, shift in [
        (2012766816, 3), (1382566725, 4), (2**30, -31), (2**31 - 1, 31), (-(2**31), 0), (0, 1),
    ]:  # fmt: skip
        for out in NARROW:
            arguments = {"multiplier": multiplier, "shift": shift, "zero": 3, "rounding": rounding}
            want = intops.requantize(x, dtype=out, **arguments)
            same(intops.requantize(send(x), dtype=out, **arguments), want)


@pytest.mark.parametrize("rounding", ["single", "gemmlowp", "float"])
def test_requantize_per_channel(rounding: str, send: Any, rng: np.random.Generator) -> None:
    for shape, axis in [((7, 33), -1), ((5, 3, 4), 1), ((6, 5), 0), ((4, 1), 1), ((0, 3), 1)]:
        x = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        m = rng.integers(2**30, 2**31, shape[axis])
        s = rng.integers(-2, 31, shape[axis])
        arguments = {"multiplier": m, "shift": s, "axis": axis, "rounding": rounding}
        same(intops.requantize(send(x), **arguments), intops.requantize(x, **arguments))


def test_add(send: Any, rng: np.random.Generator) -> None:
    for i, (left, right) in enumerate(zip(NARROW, reversed(NARROW), strict=True)):
        a, b = numbers(rng, left, 1001), numbers(rng, right, 1001)
        for rounding in ("once", "each"):
            more = {"out_scale": 0.037, "rounding": rounding, "dtype": NARROW[i]}
            want = intops.add(a, 0.011, b, 0.25, **more)
            same(intops.add(send(a), 0.011, send(b), 0.25, **more), want)
    a, b = np.arange(12).reshape(3, 4), np.arange(4)
    want = intops.add(a, 1.0, b, 2.0, out_scale=0.5)
    same(intops.add(send(a), 1.0, send(b), 2.0, out_scale=0.5), want)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu", "gelu"])
@pytest.mark.parametrize("dtype", NARROW)
def test_functions(name: str, dtype: Any, send: Any, rng: np.random.Generator) -> None:
    x = numbers(rng, dtype, 4999)
    if name == "exp":
        x = np.minimum(x, 0).astype(dtype)
    for scale in (1e-9, 3.1e-6, 1 / 256, 0.013, 0.31, 7.0, 1e8):
        for out in NARROW:
            outs: list[dict[str, float]] = [{}]
            if name in ("silu", "gelu"):
                outs = [{}, {"out_scale": 0.02}, {"out_scale": 1e-5}]
            for more in outs:
                call = getattr(intops, name)
                try:
                    want = call(x, scale, dtype=out, **more)
                except ValueError as e:
                    with pytest.raises(ValueError, match=re.escape(str(e))):
                        call(send(x), scale, dtype=out, **more)
                else:
                    same(call(send(x), scale, dtype=out, **more), want)


def test_gelu_of_many_scales(send: Any, rng: np.random.Generator) -> None:
    """Parameters are made on the host a second time: scales over many powers of two."""
    x = numbers(rng, np.int32, 300)
    for _ in range(150):
        s, out = 2.0 ** rng.uniform(-20, 3, 2)
        dtype = NARROW[rng.integers(5)]
        try:
            want = intops.gelu(x, s, out_scale=out, dtype=dtype)
        except ValueError:
            with pytest.raises(ValueError, match="too"):
                intops.gelu(send(x), s, out_scale=out, dtype=dtype)
        else:
            same(intops.gelu(send(x), s, out_scale=out, dtype=dtype), want)


@pytest.mark.parametrize("cols", [1, 3, 64, 257, 4096, 20000])
def test_softmax(cols: int, send: Any, rng: np.random.Generator) -> None:
    for i, dtype in enumerate(NARROW):
        x = numbers(rng, dtype, 5 * cols)[: 5 * cols].reshape(5, cols)
        if dtype == np.int32:
            x[1] = -(2**31)  # nothing but minus infinity
            x[2] >>= 16
        for scale in (1e-4, 0.05, 3.0):
            out = NARROW[(i + int(scale)) % 5]
            same(intops.softmax(send(x), scale, dtype=out), intops.softmax(x, scale, dtype=out))


def test_softmax_of_another_axis_and_masks(send: Any, rng: np.random.Generator) -> None:
    x = rng.integers(-500, 500, (4, 6, 8)).astype(np.int16)
    keep = rng.random((6, 8)) < 0.6
    keep[2] = False
    want = intops.softmax(x, 0.01, axis=1)
    same(
        tuple(map(contiguous, intops.softmax(send(x), 0.01, axis=1))),
        (contiguous(want[0]), want[1]),
    )
    want = intops.softmax(x, 0.01, where=keep)
    same(intops.softmax(send(x), 0.01, where=keep), want)
    same(intops.softmax(send(x), 0.01, where=send(keep)), want)


def contiguous(y: Any) -> Any:
    return (
        np.ascontiguousarray(y if isinstance(y, np.ndarray) else fetch(y))
        if hasattr(y, "shape")
        else y
    )


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "rmsnorm_quantize"])
@pytest.mark.parametrize("cols", [1, 5, 64, 384, 1023, 4096])
def test_norms(name: str, cols: int, send: Any, rng: np.random.Generator) -> None:
    for i, dtype in enumerate(NARROW):
        x = numbers(rng, dtype, 6 * cols)[: 6 * cols].reshape(6, cols)
        x[1], x[2] = 0, 77
        x[3] = 0
        x[3, cols // 2] = 100  # one hot
        w = rng.normal(size=cols).astype(np.float32)
        w[rng.random(cols) < 0.1] = 0
        b = rng.normal(size=cols).astype(np.float32)
        for eps, scale in [(0.0, 0.01), (1e-5, 0.01), (1e-12, 1e-6), (1e30, 1e-3), (1e-300, 1e100)]:
            more: dict[str, Any] = {"eps": eps}
            if name != "rmsnorm_quantize":
                more |= {"out_scale": 0.03, "dtype": NARROW[(i + cols) % 5]}
            rest = (w, b) if name == "layernorm" and i % 2 else (w,)
            call = getattr(intops, name)
            want = call(x, scale, *rest, **more)
            same(call(send(x), scale, *rest, **more), want)


@pytest.mark.parametrize("dtype", [*NARROW, np.uint32, np.int64, np.uint64])
def test_sqrt(dtype: Any, send: Any, rng: np.random.Generator) -> None:
    info = np.iinfo(dtype)
    roots = rng.integers(0, int(info.max) ** 0.5, 500).astype(object)
    near = [min(max(int(r) ** 2 + d, 0), int(info.max)) for r in roots for d in (-1, 0, 1)]
    v = np.array([0, 1, 2, 3, 4, int(info.max), int(info.max) - 1, *near], dtype)
    same(intops.sqrt(send(v)), intops.sqrt(v))
    same(intops.sqrt(send(v), compat="ivit"), intops.sqrt(v, compat="ivit"))


@pytest.mark.parametrize("compat", ["ibert", "ivit"])
def test_published(compat: str, send: Any, rng: np.random.Generator) -> None:
    x = rng.integers(-4000, 4000, (6, 197)).astype(np.int32)
    x[1] = 5
    small = rng.integers(-128, 128, (6, 197)).astype(np.int8)
    for scale in (1 / 16, 1 / 64, 1 / 256, 0.9):
        same(
            intops.exp(send(-np.abs(x)), scale, compat=compat),
            intops.exp(-np.abs(x), scale, compat=compat),
        )
        for q in (x, small):
            for name in ("softmax", "gelu"):
                call = getattr(intops, name)
                same(call(send(q), scale, compat=compat), call(q, scale, compat=compat))
    w, b = rng.normal(size=(2, 197)).astype(np.float32) + 3
    wide = rng.integers(-(2**31), 2**31, (6, 197)).astype(np.int32)
    for q in (x, small, wide):
        try:
            want = intops.layernorm(q, 0.01, w, b, compat=compat)
        except ValueError as e:
            with pytest.raises(ValueError, match=str(e)):
                intops.layernorm(send(q), 0.01, w, b, compat=compat)
        else:
            same(intops.layernorm(send(q), 0.01, w, b, compat=compat), want)


def test_bad_input(send: Any) -> None:
    x = np.arange(-4, 0, dtype=np.int32).reshape(1, 4)
    w = np.ones(4, np.float32)
    cases: list[tuple[Callable[[Any], Any], type[Exception]]] = [
        (lambda q: intops.softmax(q, 0.0), ValueError),
        (lambda q: intops.softmax(q, float("nan")), ValueError),
        (lambda q: intops.softmax(q, 0.1, dtype=np.float32), TypeError),
        (lambda q: intops.softmax(q, 0.1, axis=2), np.exceptions.AxisError),
        (lambda q: intops.softmax(q, 0.1, where=[True] * 3), ValueError),
        (lambda q: intops.softmax(q, 9.0, compat="ibert"), ValueError),
        (lambda q: intops.softmax(q, 1e-9, compat="ibert"), ValueError),
        (lambda q: intops.gelu(q, 1.0, out_scale=1e-30), ValueError),
        (lambda q: intops.gelu(q, 1e-9, compat="ibert"), ValueError),
        (lambda q: intops.gelu(q, -1.0), ValueError),
        (lambda q: intops.exp(q * -1, 0.1), ValueError),
        (lambda q: intops.sqrt(q), ValueError),
        (lambda q: intops.layernorm(q, 0.1, w * np.nan, out_scale=1.0), ValueError),
        (lambda q: intops.layernorm(q, 0.1, w, eps=-1, out_scale=1.0), ValueError),
        (lambda q: intops.layernorm(q, 0.1, w, out_scale=1e-300), ValueError),
        (lambda q: intops.layernorm(q, 0.1, w[:3], out_scale=1.0), ValueError),
        (lambda q: intops.layernorm(q, 0.1, w), TypeError),
        (lambda q: intops.requantize(q, multiplier=1, shift=32), ValueError),
        (lambda q: intops.requantize(q, multiplier=[1, 2], shift=0), ValueError),
        (lambda q: intops.requantize(q, multiplier=1, shift=0, rounding="up"), ValueError),
        (lambda q: intops.requantize(q, multiplier=1.5, shift=0), TypeError),
        (lambda q: intops.add(q, 1.0, q, 1e30, out_scale=1e-9), ValueError),
        (lambda q: intops.rmsnorm(q.astype(np.float32), 0.1, w, out_scale=1.0), TypeError),
        (lambda q: intops.silu(q.astype(np.int64) * 2**40, 0.1), ValueError),
    ]
    same_errors(cases, x, send(x))
    with pytest.raises(TypeError, match="one device"):
        intops.add(send(x), 1.0, x, 1.0, out_scale=1.0)


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.4e38, -3.4e38, 1e-38, 1e-40, -1e-45, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("offset", [None, "mitchell", "least_squares"])
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
def test_lmul_of_floats(offset: Any, overflow: str, send: Any, rng: np.random.Generator) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint32)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            ends = np.array(FLOATS).astype(dtype)
        x = np.concatenate([bits.view(dtype)[:4000], ends])
        y = np.concatenate([rng.permutation(x), ends])[: len(x)]
        for a, b in [(x, y), (ends[:, None], ends), (x[:7], x[:7])]:
            want = approx.lmul(a, b, offset=offset, overflow=overflow)
            got = approx.lmul(send(a), send(b), offset=offset, overflow=overflow)
            same(got, want)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e2m1", "e3m2", "e2m3", "e4m5", "e6m9"])
def test_lmul_of_patterns(name: str, send: Any, rng: np.random.Generator) -> None:
    fmt = approx.SmallFloat.parse(name)
    bits = 1 + fmt.exponent + fmt.mantissa
    dtype = np.uint8 if bits <= 8 else np.uint16
    if bits <= 8:
        a, b = (v.ravel() for v in np.meshgrid(*2 * [np.arange(2**bits, dtype=dtype)]))
    else:
        a, b = rng.integers(0, 2**bits, (2, 30000)).astype(dtype)
    for offset in (None, "mitchell"):
        want = approx.lmul(a, b, format=name, offset=offset)
        same(approx.lmul(send(a), send(b), format=name, offset=offset), want)


@pytest.mark.parametrize("name", ["fp16", "bf16", "e5m2", "e4m3", "e2m1", "e3m2", "e8m3", "fp32"])
def test_lmul_rounds_first(name: str, send: Any, rng: np.random.Generator) -> None:
    fmt = approx.SmallFloat.parse(name)
    top, low = fmt.largest, fmt.smallest
    steps = low * 2.0**-fmt.mantissa * np.arange(-3, 4 * 2 ** min(fmt.mantissa, 6)) / 4
    ends = [0.0, -0.0, low, low * 0.99, low / 2, top, min(top * 1.01, 3.4e38), 1e-45, -1e-39]
    random = rng.normal(size=3000) * np.exp2(rng.uniform(-20, 20, 3000))
    for dtype in (np.float32, np.float64, np.float16):
        with np.errstate(over="ignore"):
            x = np.concatenate([random, ends, steps, -steps]).astype(dtype)
        x = x[np.isfinite(x)]
        if fmt.specials == "ieee":
            x = np.concatenate([x, np.array([np.inf, -np.inf, np.nan], dtype)])
        y = rng.permutation(x)
        same(approx.lmul(send(x), send(y), format=name), approx.lmul(x, y, format=name))


def test_lmul_bad_input(send: Any) -> None:
    x = np.ones(3, np.float32)
    cases: list[tuple[Callable[[Any], Any], type[Exception]]] = [
        (lambda q: approx.lmul(q, q, format="e4m3", overflow="inf"), ValueError),
        (lambda q: approx.lmul(q * np.float32("inf"), q, format="e4m3"), ValueError),
        (lambda q: approx.lmul(q * np.float32("nan"), q, format="e2m1"), ValueError),
        (lambda q: approx.lmul(q, q, format="e9m9"), ValueError),
        (lambda q: approx.lmul(q, q, offset="other"), ValueError),
        (lambda q: approx.lmul(q.astype(np.float64), q.astype(np.float64)), TypeError),
        (
            lambda q: approx.lmul(q.astype(np.uint8) * 100, q.astype(np.uint8), format="e2m1"),
            ValueError,
        ),
        (lambda q: approx.lmul(q.astype(np.uint8), q.astype(np.uint8), format="fp16"), TypeError),
        (lambda q: approx.lmul(q, q.astype(np.float16)), TypeError),
        (lambda q: approx.lmul_matmul(q, q), ValueError),
        (lambda q: approx.lmul_matmul(q, q.reshape(1, 3)), ValueError),
    ]
    same_errors(cases, x, send(x))
    with pytest.raises(TypeError, match="on the host"):
        approx.lmul(send(x), x)


QUOTIENTS = """
extern "C" void quotients(
    const u64 *n, const u64 *d, const int *k, u64 *q, u64 *whole, long count) {
    for (long i = 0; i < count; i++) {
        q[i] = ratio_of(n[i] | 1ull << 63, d[i] | 1ull << 63, k[i]);
        whole[i] = quotient(n[i], d[i]);
    }
}
"""


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_quotients_are_exact(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of random numbers, and of those near powers of two."""
    text, out = tmp_path / "q.cpp", tmp_path / "q.so"
    text.write_text(SHIM + flat("nibblas/intops.cuh", set()) + QUOTIENTS)
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fwrapv"]
    subprocess.run([str(compiler()), *options, str(text), "-o", str(out)], check=True)

    def draw(n: int) -> np.ndarray:
        power = np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64)
        near = power + rng.integers(-3, 4, n).astype(np.int64).view(np.uint64)
        wide = rng.integers(0, 2**64, n, dtype=np.uint64)
        return np.where(
            rng.random(n) < 0.3, wide, np.where(rng.random(n) < 0.5, near, wide % power)
        )

    count = 100_000
    n, d, k = draw(count), np.maximum(draw(count), np.uint64(1)), rng.integers(0, 63, count)
    k32, q, whole = k.astype(np.int32), np.empty(count, np.uint64), np.empty(count, np.uint64)
    pointers = [ctypes.c_void_p(v.ctypes.data) for v in (n, d, k32, q, whole)]
    ctypes.CDLL(str(out)).quotients(*pointers, ctypes.c_long(count))
    np.testing.assert_array_equal(whole, n // d)
    top = 1 << 63
    want = [
        ((a | top) << s) // (b | top)
        for a, b, s in zip(n.tolist(), d.tolist(), k.tolist(), strict=True)
    ]
    assert q.tolist() == want


# What needs more than one thread, or tensor cores.


@pytest.fixture
def cupy() -> Any:
    module = real_cupy()
    if module is None:
        pytest.skip("no CUDA device")
    return module


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 5), (64, 64, 64), (130, 33, 129), (5, 0, 4)])
def test_lmul_matmul(shape: tuple[int, int, int], cupy: Any, rng: np.random.Generator) -> None:
    m, k, n = shape
    for dtype in (np.float32, np.float16):
        a = (rng.normal(size=(2, m, k)) * np.exp2(rng.uniform(-12, 3, (2, m, 1)))).astype(dtype)
        b = rng.normal(size=(k, n)).astype(dtype)
        a[rng.random(a.shape) < 0.1] = 0
        more = {"offset": "mitchell", "overflow": "inf"} if dtype == np.float16 else {}
        for special in range(3 if k else 1):
            if special == 1:
                # Products that pass the largest number, in some of the tiles.
                a[0, m // 2], b[k // 3] = np.sqrt(np.finfo(dtype).max) * 8, np.finfo(dtype).max
            if special == 2:
                a[0, 0, 0], a[1, m - 1, k - 1], b[k // 2, n - 1] = np.inf, np.nan, -np.inf
            want = approx.lmul_matmul(a, b, **more)
            got = approx.lmul_matmul(cupy.asarray(a), cupy.asarray(b), **more).get()
            # A sum that is no number has no bits of its own.
            want[np.isnan(want)] = got[np.isnan(got)] = np.nan
            same(got, want)


def test_lmul_matmul_of_patterns(cupy: Any, rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 0x78, (2, 70, 70)).astype(np.uint8)
    want = approx.lmul_matmul(a, b, format="e4m3")
    same(approx.lmul_matmul(cupy.asarray(a), cupy.asarray(b), format="e4m3"), want)


def test_every_root_of_32_bits(cupy: Any) -> None:
    """All 2^32 numbers."""
    part = 1 << 28
    for start in range(0, 1 << 32, part):
        v = cupy.arange(start, start + part, dtype=np.uint64)
        root = intops.sqrt(v.astype(np.uint32)).astype(np.uint64)
        assert bool(((root * root <= v) & (v < (root + 1) * (root + 1))).all()), start


@pytest.mark.parametrize("left", [np.int8, np.uint8])
@pytest.mark.parametrize("right", [np.int8, np.uint8])
def test_matmul(left: Any, right: Any, cupy: Any, rng: np.random.Generator) -> None:
    shapes = [(1, 1, 1), (3, 70, 5), (128, 256, 128), (200, 1008, 130), (2, 16, 300), (4, 0, 3)]
    for m, k, n in shapes:
        a, b = numbers(rng, left, m * k)[: m * k], numbers(rng, right, k * n)[: k * n]
        a, b = a.reshape(m, k), b.reshape(k, n)
        za, zb = (int(rng.integers(np.iinfo(t).min, np.iinfo(t).max + 1)) for t in (left, right))
        bias = rng.integers(-1000, 1000, n)
        for dtype in (np.int32, np.int64):
            for more in ({}, {"a_zero": za, "b_zero": zb, "bias": bias}, {"bias": [7]}):
                want = intops.matmul(a, b, dtype=dtype, **more)
                same(intops.matmul(cupy.asarray(a), cupy.asarray(b), dtype=dtype, **more), want)
                turned = cupy.asarray(np.ascontiguousarray(b.T)).T
                same(intops.matmul(cupy.asarray(a), turned, dtype=dtype, **more), want)
        same(intops.matmul(cupy.asarray(a)[0], cupy.asarray(b)), intops.matmul(a[0], b))


def test_matmul_of_stacks_and_of_many_products(cupy: Any, rng: np.random.Generator) -> None:
    a = rng.integers(-128, 128, (3, 1, 40, 33)).astype(np.int8)
    b = rng.integers(0, 256, (2, 33, 70)).astype(np.uint8)
    want = intops.matmul(a, b, b_zero=100)
    same(intops.matmul(cupy.asarray(a), cupy.asarray(b), b_zero=100), want)
    ones = np.full((2, 200_000), -128, np.int8)
    want = intops.matmul(ones, ones.T, dtype=np.int64)
    assert want[0, 0] == 200_000 * 2**14
    same(intops.matmul(cupy.asarray(ones), cupy.asarray(ones).T, dtype=np.int64), want)
    with pytest.raises(ValueError, match="past int32"):
        intops.matmul(cupy.asarray(ones), cupy.asarray(ones).T)
    with pytest.raises(TypeError, match="one device"):
        intops.matmul(cupy.asarray(ones), ones.T, dtype=np.int64)


@pytest.mark.parametrize(
    "fmt", ["int8", "int4", "uint4", "uint8", "ternary", "bipolar1", "bipolar5"]
)
def test_matmul_of_tensors(fmt: str, cupy: Any, rng: np.random.Generator) -> None:
    q = nb.quantize(rng.normal(size=(70, 200)).astype(np.float32), fmt)
    a = rng.integers(-128, 128, (2, 5, 200)).astype(np.int8)
    want = intops.matmul(a, q.T)
    same(intops.matmul(cupy.asarray(a), q.T), want)
    same(intops.matmul(cupy.asarray(a), q.to("cuda:0").T), want)
    grouped = nb.quantize(rng.normal(size=(8, 200)).astype(np.float32), "int4_g32")
    with pytest.raises(ValueError, match="grouped"):
        intops.matmul(cupy.asarray(a), grouped.T)


def test_bitlinear(cupy: Any, rng: np.random.Generator) -> None:
    q = nb.quantize(rng.normal(size=(64, 256)).astype(np.float32), "ternary")
    x = rng.integers(-30000, 30000, (7, 256)).astype(np.int16)
    w = rng.normal(size=256).astype(np.float32)
    want = intops.bitlinear(x, 0.01, w, q, eps=1e-6)
    same(intops.bitlinear(cupy.asarray(x), 0.01, w, q, eps=1e-6), want)


def test_signs(cupy: Any, rng: np.random.Generator) -> None:
    a, b = (np.where(rng.random((n, 300)) < 0.5, -1, 1).astype(np.int8) for n in (7, 70))
    want = approx.hamming_matmul(a, b)
    q = nb.QTensor.from_parts("bipolar1", b, np.ones((70, 1), np.float32))
    for right in (cupy.asarray(b), cupy.asarray(b > 0), b, q, q.to("cuda:0")):
        same(approx.hamming_matmul(cupy.asarray(a), right), want)
        same(approx.hamming_matmul(cupy.asarray(a > 0), right), want)
    x = rng.integers(-128, 128, (2, 3, 300)).astype(np.int8)
    same(approx.matadd(cupy.asarray(x), cupy.asarray(b)), approx.matadd(x, b))
    same(approx.matadd(cupy.asarray(x), q), approx.matadd(x, b))
    floats = rng.normal(size=(5, 300)).astype(np.float32)
    got = approx.matadd(cupy.asarray(floats), q).get()
    np.testing.assert_allclose(got, floats @ b.T.astype(np.float32), atol=5e-3)
    with pytest.raises(ValueError, match="-1 and 1 alone"):
        approx.hamming_matmul(cupy.asarray(a * 2), b)
    with pytest.raises(TypeError, match="int8 or floats"):
        approx.matadd(cupy.asarray(x).astype(np.int32), b)


@pytest.mark.parametrize("base", ["2", "sqrt2"])
def test_log2_softmax_and_product(base: str, cupy: Any, rng: np.random.Generator) -> None:
    x = rng.integers(-3000, 3000, (3, 17, 200)).astype(np.int16)
    v = rng.integers(-128, 128, (200, 130)).astype(np.int8)
    more = {"base": base, "top": 0.9}
    codes = intops.log2_softmax(x, 0.002, **more)
    got = intops.log2_softmax(cupy.asarray(x), 0.002, **more)
    same(got, codes)
    same(
        intops.log2_matmul(got, cupy.asarray(v), 0.1, **more),
        intops.log2_matmul(codes, v, 0.1, **more),
    )


def test_layouts_streams_and_graphs(cupy: Any, rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, (40, 9, 130)).astype(np.int8)
    w = np.ones(65, np.float32)
    views = [lambda a: a[::-2, :, 1:66], lambda a: a.T[:65].T, lambda a: a.reshape(-1)[1:131]]
    for view in views:
        same(
            intops.gelu(view(cupy.asarray(x)), 0.01),
            intops.gelu(np.ascontiguousarray(view(x)), 0.01),
        )
        same(intops.softmax(view(cupy.asarray(x)), 0.01), intops.softmax(view(x).copy(), 0.01))
    want = intops.layernorm(x[..., :65], 0.1, w, out_scale=0.03)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        there = cupy.asarray(x)
        got = intops.layernorm(there[..., :65], 0.1, w, out_scale=0.03)
    stream.synchronize()
    same(got, want)
    held = cupy.asarray(x)
    results: list[Any] = []

    def work() -> None:
        results[:] = [intops.layernorm(held[..., :65], 0.1, w, out_scale=0.03)[0]]

    step = nb.cuda.graph(work)
    held[...] = cupy.asarray(x[::-1].copy())
    # Parameters that are forgotten are still the graph's.
    _intops._upload.cache_clear()
    junk = [cupy.full(n, 77, np.int32) for n in (64, 128, 256, 1024)]
    step()
    cupy.cuda.Device().synchronize()
    same(results[0], np.ascontiguousarray(want[0][::-1]))
    assert all(bool((j == 77).all()) for j in junk)


def test_tensors_of_another_library(cupy: Any, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = rng.integers(-100, 100, (5, 64)).astype(np.int16)
    there = torch.from_numpy(x).cuda()
    codes, scale = intops.softmax(there, 0.05)
    want = intops.softmax(x, 0.05)
    assert isinstance(codes, torch.Tensor)
    assert codes.is_cuda
    assert scale == want[1]
    np.testing.assert_array_equal(codes.cpu().numpy(), want[0])
    floats = torch.from_numpy(x.astype(np.float32)).cuda()
    got = approx.lmul(floats, floats)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.cpu().numpy(), approx.lmul(*[x.astype(np.float32)] * 2))


# The machine code.

try:
    from cupy_backends.cuda.libs import nvrtc

    nvrtc.getVersion()
except Exception:
    nvrtc = None
needs_nvrtc = pytest.mark.skipif(nvrtc is None, reason="no CuPy with NVRTC")

INTEGER = ["intops.cu", "intops_rows.cu", "intops_matmul.cu", "intops_published.cu"]
# Arithmetic on floats; conversions and reciprocals are how an integer division shows itself.
FLOAT = r"(?:FADD|FMUL|FFMA|FSWZADD|MUFU|DADD|DMUL|DFMA|HADD2|HMUL2|HMMA|HGMMA|I2F|F2I|I2FP)"


@functools.cache
def compiled(source: str, arch: str) -> bytes:
    return _compile.compile_source(source, arch)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("source", [*INTEGER, "intops_float.cu", "arithmetic.cu"])
def test_sources_compile(source: str, arch: str) -> None:
    assert compiled(source, arch)[:4] == b"\x7fELF"


def machine_code(source: str) -> dict[str, str]:
    """Return what nvdisasm says of every kernel of a source."""
    from test_cuda import disassembler

    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm")
    image = compiled(source, "sm_90a")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image + b"\0")  # CuPy takes a byte off the end
        file.flush()
        text = subprocess.run([tool, file.name], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@needs_nvrtc
@pytest.mark.parametrize("source", INTEGER)
def test_integer_operators_have_no_float_instruction(source: str) -> None:
    kernels = machine_code(source)
    names = re.findall(
        r"__global__ void __launch_bounds__\([\d, ]+\) (\w+)", _compile.sources()[source].decode()
    )
    assert set(kernels) == set(names)
    for name, text in kernels.items():
        assert re.search(r"\bIMAD\b|\bIADD3\b", text), name
        assert not re.search(rf"\b{FLOAT}\b", text), name
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name}: memory of a thread"


def virtual_code(source: str) -> str:
    """Return the PTX of a source: what there is without a disassembler."""
    texts = _compile.sources()
    headers = [n for n in texts if n.startswith("nibblas/")]
    program = nvrtc.createProgram(
        texts[source].decode(), source, [texts[h] for h in headers], [h.encode() for h in headers]
    )
    try:
        nvrtc.compileProgram(program, _compile._options("compute_90a", ()))
        return str(nvrtc.getPTX(program))
    finally:
        nvrtc.destroyProgram(program)


@needs_nvrtc
@pytest.mark.parametrize("source", INTEGER)
def test_integer_operators_have_no_float_type(source: str) -> None:
    """Nor a division, which the assembler would make of floats."""
    text = virtual_code(source)
    assert ".s32" in text
    found = re.findall(r"^.*(?:\.f16|\.bf16|\.f32|\.f64|\bdiv\.|\brem\.).*$", text, re.MULTILINE)
    assert not found, found[:5]


@needs_nvrtc
def test_lmul_adds_and_multiplies_no_floats() -> None:
    kernels = machine_code("arithmetic.cu")
    assert not re.search(rf"\b{FLOAT}\b", kernels["lmul"])
    assert re.search(r"\bFADD\b", kernels["lmul_matmul"])
    assert not re.search(r"\b(FMUL|FFMA|MUFU)\b", kernels["lmul_matmul"])


@needs_nvrtc
def test_the_check_finds_floats() -> None:
    text = virtual_code("intops_float.cu")
    assert "mul.rn.f32" in text
    assert "div.u64" in text
    assert re.search(rf"\b{FLOAT}\b", machine_code("intops_float.cu")["requantize_float"])
