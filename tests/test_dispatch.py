"""Who gets called: NumPy's two protocols, CuPy's rule, refusals."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

import nibblas as nb


@pytest.fixture(scope="module")
def q() -> nb.QTensor:
    return nb.quantize(np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32), "int8")


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, 16)).astype(np.float32)


def test_every_way_to_write_it(q: nb.QTensor, x: np.ndarray) -> None:
    want = x @ q.dequantize().T
    for got in (
        x @ q.T,
        np.matmul(x, q.T),
        operator.matmul(x, q.T),
        (q @ x.T).T,
        np.matmul(q, x.T).T,
        nb.matmul(x, q.T),
        q.T.__rmatmul__(x),
        q.__matmul__(x.T).T,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_type_has_the_method_and_the_instance_reads_none(q: nb.QTensor) -> None:
    assert callable(type(q).__array_ufunc__)
    assert q.__array_ufunc__ is None
    assert q.T.__array_ufunc__ is None


class CupyLike:
    """An array that follows CuPy's rule for binary operators."""

    __array_priority__ = 100

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __matmul__(self, other: Any) -> Any:
        if hasattr(other, "__array_ufunc__") and other.__array_ufunc__ is not None:
            raise AssertionError("the operator was not handed over")
        if hasattr(other, "__rmatmul__"):
            return NotImplemented
        raise AssertionError("no reflected operator")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.data


def test_cupy_rule(q: nb.QTensor, x: np.ndarray) -> None:
    np.testing.assert_array_equal(CupyLike(x) @ q.T, x @ q.T)


def test_numpy_scalars_on_the_left(q: nb.QTensor) -> None:
    for scalar in (np.float32(1), np.float64(1), np.int8(1), 1, 1.0, True):
        with pytest.raises(ValueError, match="enough dimensions"):
            scalar @ q
        with pytest.raises(ValueError, match="enough dimensions"):
            q @ scalar
        with pytest.raises(ValueError, match="enough dimensions"):
            np.matmul(np.asarray(scalar), q)


def test_others_may_take_over(q: nb.QTensor) -> None:
    class Other:
        def __rmatmul__(self, left: Any) -> str:
            return "other"

    assert q @ Other() == "other"


@pytest.mark.parametrize(
    "call",
    [
        lambda x, q: np.dot(x, q.T),
        lambda x, q: np.einsum("ik,jk->ij", x, q),
        lambda x, q: np.tensordot(x, q.T, 1),
        lambda x, q: np.inner(x, q),
        lambda x, q: np.concatenate([x, q]),
        lambda x, q: np.sum(q),
        lambda x, q: np.linalg.norm(q),
        lambda x, q: np.array_equal(x, q),
        lambda x, q: np.vdot(x, q),
    ],
)
def test_functions_are_refused(q: nb.QTensor, x: np.ndarray, call: Any) -> None:
    with pytest.raises(TypeError, match=r"@ .*dequantize"):
        call(x, q)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, q: x + q,
        lambda x, q: q + x,
        lambda x, q: np.add(x, q),
        lambda x, q: np.exp(q),
        lambda x, q: np.add.reduce(q),
        lambda x, q: np.add.outer(x, q),
        lambda x, q: np.multiply(x, q, out=x),
        lambda x, q: q * 2,
        lambda x, q: -q,
    ],
)
def test_other_ufuncs_are_refused(q: nb.QTensor, x: np.ndarray, call: Any) -> None:
    with pytest.raises(TypeError):
        call(x, q)


def test_matmul_into_a_tensor_is_refused(q: nb.QTensor, x: np.ndarray) -> None:
    with pytest.raises(TypeError):
        np.matmul(x, x.T, out=q)
    with pytest.raises(TypeError):
        np.matmul(x, q.T, out=q)


def test_ufunc_keywords(q: nb.QTensor, x: np.ndarray) -> None:
    want = x @ q.T
    default = [(-2, -1), (-2, -1), (-2, -1)]
    np.testing.assert_array_equal(np.matmul(x, q.T, axes=default), want)
    np.testing.assert_array_equal(np.matmul(x, q.T, casting="same_kind", subok=False), want)
    for bad in (
        {"axes": [(0, 1), (-2, -1), (-2, -1)]},
        {"casting": "unsafe"},
        {"signature": "ff->f"},
        {"order": "F"},
        {"axis": 1},
    ):
        with pytest.raises(TypeError):
            np.matmul(x, q.T, **bad)


def test_asarray_decodes(q: nb.QTensor) -> None:
    np.testing.assert_array_equal(np.asarray(q), q.dequantize())
    assert np.asarray(q).dtype == q.dtype == np.float32
    assert np.asarray(q, dtype=np.float64).dtype == np.float64
    assert np.array(q).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(q.T), q.dequantize().T)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="decode"):
            np.asarray(q, copy=False)
