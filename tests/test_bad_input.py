"""Each mistake gets the exception NumPy users expect, and a message that names it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import nibblas as nb

N, K = 8, 32


@pytest.fixture(scope="module")
def w() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((N, K)).astype(np.float32)


@pytest.fixture(scope="module")
def q(w: np.ndarray) -> nb.QTensor:
    return nb.quantize(w, "int4_g16")


def test_inner_dimension(q: nb.QTensor) -> None:
    for x in (np.ones((3, 31), np.float32), np.ones(33, np.float32), np.ones((2, 3, 5))):
        with pytest.raises(ValueError, match="mismatch in its core dimension") as e:
            x @ q.T
        assert str(x.shape) in str(e.value)
        assert str(q.T.shape) in str(e.value)
        with pytest.raises(ValueError, match="mismatch in its core dimension"):
            q @ np.swapaxes(np.atleast_2d(x), -1, -2)


def test_forgotten_transpose(q: nb.QTensor) -> None:
    x = np.ones((3, K), np.float32)
    with pytest.raises(ValueError, match=re.escape("use x @ q.T")):
        x @ q
    with pytest.raises(ValueError, match=re.escape("use q.T @ x")):
        q.T @ x.T


def test_wrong_axis(w: np.ndarray) -> None:
    square = nb.quantize(w[:, :N], "int8")
    x = np.ones((3, N), np.float32)
    with pytest.raises(ValueError, match=r"groups run along axis 1.*axis=0"):
        x @ square
    with pytest.raises(ValueError, match=r"groups run along axis 0.*axis=1"):
        square.T @ x.T
    along = nb.quantize(w[:, :N], "int8", axis=0)
    np.testing.assert_allclose(x @ along, x @ along.dequantize(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="groups run along"):
        nb.matmul(square, square)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "int9",
        "int1",
        "int",
        "float4",
        "INT4",
        "int4_g0",
        "int4_g",
        "int4_gx",
        "int4_g-8",
        "int4_g4",
        "int4_g99999999999999999999",
        "int4_g32_g32",
        "int4_sf8",
        "int4_s",
        "int4_",
        "_int4",
        "int4 ",
        "int4_g32_bogus",
        "int4\0",
        "int4_g３２",
        "é" * 1000,
    ],
)
def test_format_names(w: np.ndarray, name: str) -> None:
    for call in (
        lambda: nb.Format(name),
        lambda: nb.quantize(w, name),
        lambda: nb.QTensor.from_parts(name, [[1]], [1.0]),
    ):
        with pytest.raises(ValueError, match=r"format|element|group|scale|suffix"):
            call()


@pytest.mark.parametrize("name", [None, 4, b"int4", ["int4"], np.int8])
def test_format_is_a_string(w: np.ndarray, name: Any) -> None:
    with pytest.raises(TypeError, match="string"):
        nb.quantize(w, name)


@pytest.mark.parametrize("bad", [0, -1, -(2**70)])
def test_threads_below_one(w: np.ndarray, q: nb.QTensor, bad: int) -> None:
    x = np.ones((2, K), np.float32)
    for call in (
        lambda: nb.matmul(x, q.T, threads=bad),
        lambda: nb.quantize(w, "int4", threads=bad),
        lambda: nb.set_num_threads(bad),
        lambda: nb.threads(bad),
        lambda: nb.explain(x, q.T, threads=bad),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


@pytest.mark.parametrize("bad", [1.5, "2", [1]])
def test_threads_is_an_integer(q: nb.QTensor, bad: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        nb.matmul(np.ones(K, np.float32), q.T, threads=bad)
    with pytest.raises(TypeError, match="integer"):
        nb.set_num_threads(bad)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", ["int4_g16", "uint4_g16", "bipolar1", "bipolar4", "ternary_g8"])
@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_weights_that_are_not_finite(w: np.ndarray, value: float, fmt: str, method: str) -> None:
    bad = w.copy()
    bad[5, 17] = value
    with pytest.raises(ValueError, match=r"row 5.*17|5.*finite"):
        nb.quantize(bad, fmt, method=method)


def test_weights_too_large_for_the_scale(w: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scale"):
        nb.quantize(w * np.float32(1e30), "int4_g16")
    nb.quantize(w * np.float32(1e30), "int4_g16_sf32")
    with pytest.raises(ValueError, match="not finite"):
        nb.quantize(np.full((2, 8), 1e300), "int4")


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 8)])
def test_weights_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        nb.quantize(np.ones(shape, np.float32), "int4")


def test_quantize_arguments(w: np.ndarray) -> None:
    with pytest.raises(np.exceptions.AxisError):
        nb.quantize(w, "int4", axis=2)
    with pytest.raises(TypeError):
        nb.quantize(w, "int4", axis=1.0)
    with pytest.raises(ValueError, match=r"nope.*rtn"):
        nb.quantize(w, "int4", method="nope")
    with pytest.raises(TypeError, match="method"):
        nb.quantize(w, "int4", method=None)
    with pytest.raises(TypeError, match="dequantize"):
        nb.quantize(nb.quantize(w, "int4"), "int8")


BAD_DTYPES = [np.complex64, object, "U3", "S3", "M8[s]", "m8[s]", np.longdouble, [("a", "f4")]]


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
def test_dtypes(q: nb.QTensor, dtype: Any) -> None:
    x = np.zeros((3, K), dtype)
    with pytest.raises(TypeError):
        x @ q.T
    with pytest.raises(TypeError):
        nb.matmul(q, x.T)
    with pytest.raises(TypeError):
        nb.quantize(x, "int4")
    with pytest.raises(TypeError):
        nb.matmul(np.ones(K, np.float32), q.T, bias=np.zeros(N, dtype))


def test_result_dtypes(q: nb.QTensor) -> None:
    x = np.ones((3, K), np.float32)
    for dtype in (np.int32, np.int8, bool, np.complex64, object, np.longdouble, "U1"):
        with pytest.raises(TypeError):
            nb.matmul(x, q.T, dtype=dtype)
    with pytest.raises(TypeError):
        nb.matmul(x, q.T, dtype="nonsense")


def test_raw_sums(w: np.ndarray, q: nb.QTensor) -> None:
    row = nb.quantize(w, "int8")
    with pytest.raises(ValueError, match="grouped"):
        nb.matmul(row, q.T, dtype=np.int32)
    with pytest.raises(ValueError, match="grouped"):
        nb.matmul(q, row.T, dtype=np.int64)
    for dtype in (np.int8, np.uint32, bool, np.int16):
        with pytest.raises(TypeError, match="int32 or int64"):
            nb.matmul(row, row.T, dtype=dtype)
    with pytest.raises(ValueError, match="bias"):
        nb.matmul(row, row.T, dtype=np.int32, bias=np.zeros(N))
    with pytest.raises(ValueError, match="mismatch"):
        nb.matmul(row, nb.quantize(w[:, :16], "int8").T)


@pytest.mark.parametrize("compute", ["", "int3", "F32", "int8_g64", "bits"])
def test_compute_names(q: nb.QTensor, compute: str) -> None:
    with pytest.raises(ValueError, match=r"f32.*int8"):
        nb.matmul(np.ones((2, K), np.float32), q.T, compute=compute)
    with pytest.raises(ValueError, match=r"f32.*int8"):
        nb.explain(np.ones((2, K), np.float32), q.T, compute=compute)
    with pytest.raises(ValueError, match=r"f32.*int8"):
        nb.matmul(q, q.T, compute=compute)


def test_activation_groups_nest(w: np.ndarray) -> None:
    q = nb.quantize(w, "int4_g24")
    assert q.format.computes == ("f32", "bf16", "int8")
    with pytest.raises(ValueError, match=r"expected one of f32, bf16, int8$"):
        nb.matmul(np.ones((2, K), np.float32), q.T, compute="int8_g32")
    assert "int8_g128" in nb.Format("int4_g64").computes


def test_compute_is_a_string(q: nb.QTensor) -> None:
    with pytest.raises(TypeError, match="compute"):
        nb.matmul(np.ones((2, K), np.float32), q.T, compute=8)


def test_out(q: nb.QTensor) -> None:
    x = np.ones((3, K), np.float32)
    for shape in [(3, N + 1), (2, N), (N, 3), (N,), (), (3, N, 1), (3, 1)]:
        with pytest.raises(ValueError, match="shape"):
            nb.matmul(x, q.T, out=np.zeros(shape, np.float32))
    for dtype in (np.int32, bool, np.int8):
        with pytest.raises(TypeError, match="same_kind"):
            nb.matmul(x, q.T, out=np.zeros((3, N), dtype))
        with pytest.raises(TypeError, match="same_kind"):
            np.matmul(x, q.T, out=np.zeros((3, N), dtype))
    frozen = np.zeros((3, N), np.float32)
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        nb.matmul(x, q.T, out=frozen)
    for bad in ([[0.0] * N] * 3, 1, "x", q):
        with pytest.raises(TypeError):
            nb.matmul(x, q.T, out=bad)
    with pytest.raises(ValueError, match="tuple"):
        nb.matmul(x, q.T, out=(frozen, frozen))


def test_a_refused_call_leaves_out_alone(q: nb.QTensor) -> None:
    out = np.full((3, N), 7, np.float32)
    for call in (
        lambda: nb.matmul(np.ones((3, K + 1), np.float32), q.T, out=out),
        lambda: nb.matmul(np.ones((3, K), complex), q.T, out=out),
        lambda: nb.matmul(np.ones((3, K), np.float32), q.T, out=out, compute="no"),
        lambda: nb.matmul(np.ones((3, K), np.float32), q.T, out=out, bias=[1]),
        lambda: nb.matmul(np.ones((3, K), np.float32), q.T, out=out, threads=0),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
        assert (out == 7).all()


def test_bias(q: nb.QTensor) -> None:
    x = np.ones((3, K), np.float32)
    for bias in (np.zeros(N + 1), np.zeros((1, N)), 0.0, np.zeros(0)):
        with pytest.raises(ValueError, match="bias"):
            nb.matmul(x, q.T, bias=bias)


def test_no_tensor() -> None:
    x = np.ones((3, 3), np.float32)
    with pytest.raises(TypeError, match="QTensor"):
        nb.matmul(x, x)
    with pytest.raises(TypeError, match="QTensor"):
        nb.explain(x, x)
    with pytest.raises(TypeError, match="from_parts"):
        nb.QTensor()


# from_parts


def test_codes_out_of_range() -> None:
    for fmt, bad in [
        ("int4", 8),
        ("int4", -9),
        ("int2", 2),
        ("uint4", 16),
        ("uint4", -1),
        ("uint8", 256),
        ("int8", 128),
        ("int8", 2**40),
        ("bipolar3", 9),
        ("bipolar3", 2),
        ("bipolar1", 0),
        ("ternary", 2),
        ("ternary", -2),
    ]:
        codes = np.ones((2, 9), np.int64)
        codes[1, 8] = bad
        with pytest.raises(ValueError, match="code"):
            nb.QTensor.from_parts(fmt, codes, np.ones((2, 1)))


def test_codes_that_are_no_integers() -> None:
    for codes in ([[1.0]], [["a"]], [[1j]], [[True]], [[None]]):
        with pytest.raises(TypeError, match="codes"):
            nb.QTensor.from_parts("int4", codes, [[1.0]])


def test_parts_of_the_wrong_shape() -> None:
    codes = np.ones((4, 32), np.int8)
    good = np.ones((4, 2), np.float16)
    make = nb.QTensor.from_parts
    assert make("int4_g16", codes, good).shape == (4, 32)
    assert make("int4_g16", codes.ravel(), good, shape=(4, 32)) == make("int4_g16", codes, good)
    for scales in (np.ones((4, 1)), np.ones((4, 3)), np.ones((2, 4)), np.ones(8), np.ones(4), 1.0):
        with pytest.raises(ValueError, match="scales must have shape"):
            make("int4_g16", codes, scales)
    for shape in [(32, 4), (4, 31), (2, 64), (-4, -32), 128, (4, 32, 1), (2**62, 2**62)]:
        with pytest.raises(ValueError, match="shape"):
            make("int4_g16", codes, good, shape=shape)
    with pytest.raises(ValueError, match="shape"):
        make("int4_g16", codes.ravel(), good)
    with pytest.raises(TypeError):
        make("int4_g16", codes, good, shape=(4.0, 32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(value: float) -> None:
    codes = np.ones((2, 8), np.int8)
    for fmt in ("int4", "int4_g8", "int4_g8_sbf16"):
        with pytest.raises(ValueError, match="finite"):
            nb.QTensor.from_parts(fmt, codes, [[1.0], [value]])
    with pytest.raises(ValueError, match="finite"):
        nb.QTensor.from_parts("uint4", codes, [[1.0], [1.0]], [[1.0], [value]])


def test_scales_that_overflow_their_type() -> None:
    codes = np.ones((1, 8), np.int8)
    with pytest.raises(ValueError, match="overflow"):
        nb.QTensor.from_parts("int4_g8", codes, [[1e6]])
    with pytest.raises(ValueError, match="overflow"):
        nb.QTensor.from_parts("int4_g8_sbf16", codes, np.array([[3.4e38]], np.float32))
    with pytest.raises(ValueError, match="finite"):
        nb.QTensor.from_parts("int4", codes, [[1e300]])


def test_zeros() -> None:
    codes = np.ones((1, 8), np.int8)
    with pytest.raises(ValueError, match="no zero points"):
        nb.QTensor.from_parts("int4", codes, [1.0], [0])
    for bad in ([[16]], [[-1]], [[256]], [[2**40]]):
        with pytest.raises(ValueError, match="zero"):
            nb.QTensor.from_parts("uint4", codes, [1.0], bad)
    with pytest.raises(ValueError, match="zeros must have shape"):
        nb.QTensor.from_parts("uint4", codes, [1.0], [[1, 2]])
    with pytest.raises(TypeError, match="zeros"):
        nb.QTensor.from_parts("uint4", codes, [1.0], [["a"]])
    with pytest.raises(TypeError, match="scales"):
        nb.QTensor.from_parts("uint4", codes, ["a"])


# devices


def test_devices(q: nb.QTensor) -> None:
    assert q.to("cpu") is q
    for bad in ("gpu", "cpu:0x", "", 0, None):
        with pytest.raises(ValueError, match="device"):
            q.to(bad)
    # No CuPy, no GPU, or none of that number.
    with pytest.raises((ImportError, RuntimeError), match=r"CuPy|CUDA|cudaErrorInvalidDevice"):
        q.to("cuda:4096")
