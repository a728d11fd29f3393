"""The Hadamard transform."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import nibblas as nb

#: What models have, and every kind of matrix: of primes, of their powers (52, 100, 244), of
#: four circulant ones (92, 116, 156, 172).
LENGTHS = [
    *(1, 2, 4, 8, 64, 1024, 12, 20, 24, 28, 36, 40, 44, 60, 96, 108, 124, 140, 384, 768, 1536),
    *(52, 76, 92, 100, 116, 148, 156, 172, 244, 1664),
]


@pytest.mark.parametrize("n", LENGTHS)
def test_the_matrix_is_orthonormal_and_of_one_magnitude(n: int) -> None:
    h = nb.hadamard(np.eye(n))
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(np.abs(h), 1 / np.sqrt(n), rtol=1e-12)
    np.testing.assert_allclose(nb.hadamard(h, inverse=True), np.eye(n), atol=1e-12)
    if n & (n - 1) == 0:
        np.testing.assert_allclose(nb.hadamard(h), np.eye(n), atol=1e-12)


def test_every_multiple_of_four_below_188_has_a_matrix() -> None:
    for n in range(4, 188, 4):
        h = nb.hadamard(np.eye(n)) * np.sqrt(n)
        np.testing.assert_array_equal(np.abs(np.rint(h)), 1)
        np.testing.assert_allclose(h, np.rint(h), atol=1e-12)
        np.testing.assert_array_equal(np.rint(h) @ np.rint(h).T, n * np.eye(n))


def test_lengths_of_models(rng: np.random.Generator) -> None:
    for n in (6656, 11008, 13824, 14336, 18944):
        x = rng.standard_normal((3, n))
        y = nb.hadamard(x)
        np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=1e-10, atol=1e-9 * n)
        np.testing.assert_allclose(nb.hadamard(y, inverse=True), x, atol=1e-10)


def test_sylvesters_matrix() -> None:
    want = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(2 * nb.hadamard(np.eye(4)), want)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis(axis: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 12, 8))
    h = nb.hadamard(np.eye(x.shape[axis]), axis=0)
    want = np.moveaxis(np.tensordot(h, x, (1, axis)), 0, axis)
    got = nb.hadamard(x, axis)
    assert got.shape == x.shape
    np.testing.assert_allclose(got, want, atol=1e-13)
    np.testing.assert_allclose(nb.hadamard(got, axis, inverse=True), x, atol=1e-13)


def test_products_do_not_change_and_outliers_spread(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((5, 384)), rng.standard_normal((7, 384))
    x[:, 3] *= 100
    np.testing.assert_allclose(nb.hadamard(x) @ nb.hadamard(w).T, x @ w.T, atol=1e-10)
    exact = x @ w.T

    def error(a: np.ndarray, b: np.ndarray) -> float:
        q = nb.quantize(b.astype(np.float32), "int8")
        y = nb.matmul(a.astype(np.float32), q.T, compute="int8")
        return float(np.abs(y - exact).max())

    assert error(nb.hadamard(x), nb.hadamard(w)) < 0.5 * error(x, w)


def test_types() -> None:
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        y = nb.hadamard(np.ones((2, 16), dtype))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y[:, 0].astype(np.float64), [4, 4])
        assert not y[:, 1:].astype(np.float64).any()
    assert nb.hadamard([1, 2, 3, 4]).dtype == np.float32
    assert nb.hadamard(np.ones((0, 4))).shape == (0, 4)


def test_bad_input() -> None:
    for n in (3, 6, 188, 7, 260):
        with pytest.raises(ValueError, match=f"length {n}"):
            nb.hadamard(np.ones(n))
    with pytest.raises(ValueError, match="length 0"):
        nb.hadamard(np.ones((3, 0)))
    with pytest.raises(ValueError, match="dimension"):
        nb.hadamard(1.0)
    with pytest.raises(np.exceptions.AxisError):
        nb.hadamard(np.ones(4), 1)
    with pytest.raises(TypeError):
        nb.hadamard(np.ones(4, complex))
    with pytest.raises(TypeError):
        nb.hadamard(["a"])
