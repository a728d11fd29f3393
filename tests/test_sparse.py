"""Sparse weights: pruning, packing without loss, products equal to dense ones, delta inference."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import levels

import nibblas as nb
from nibblas import _core
from nibblas.qtensor import QTensor, _Storage

VALUES = ["int8", "int4_g32", "uint4_g16", "mxfp4", "ternary", "f32", "f16", "bf16", "nf4_g64"]
STRUCTURES = ["bitmap", "2of4", "bsr32", "bsr7", "block16x64", "block3x10"]
PATTERN = {
    "bitmap": "unstructured",
    "2of4": "2:4",
    "bsr32": "group32",
    "bsr7": "group7",
    "block16x64": "block16x64",
    "block3x10": "block3x10",
}
SHAPES = [(1, 50, 300), (3, 16, 64), (17, 33, 129), (40, 96, 256), (2, 1, 1)]


def weights(
    rng: np.random.Generator, n: int, k: int, structure: str, density: float = 0.4
) -> np.ndarray:
    w = rng.standard_normal((n, k)).astype(np.float32)
    return nb.prune(w, PATTERN[structure], None if structure == "2of4" else density)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Bit for bit, but for the sign of zero."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("value", VALUES)
def test_a_sparse_matrix_is_the_dense_one_written_shorter(
    value: str, structure: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    w = weights(rng, 37, 150, structure)
    dense, q = nb.quantize(w, value), nb.quantize(w, f"{value}_{structure}")
    assert str(q.format) == f"{value}_{structure}"
    assert (q.format.structure, q.format.dense) == (structure, dense.format)
    np.testing.assert_array_equal(q.codes(), dense.codes())
    assert_same(q.dequantize(), dense.dequantize())
    assert (q.error_bound == dense.error_bound).all()
    other = nb.QTensor.from_parts(str(q.format), dense.codes(), dense.scales, dense.zeros)
    assert q == other
    assert q != dense
    for again in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert again == q
    nb.save(tmp_path / "q.safetensors", {"w": q, "t": q.T})
    loaded = nb.load(tmp_path / "q.safetensors")
    assert loaded["w"] == q
    assert loaded["t"] == q.T


@pytest.mark.parametrize("structure", [*STRUCTURES, None])
@pytest.mark.parametrize("value", [*VALUES, "uint3_g12", "int5_g20", "nvfp4"])
def test_panels_give_every_array_back(
    value: str, structure: str | None, rng: np.random.Generator, tmp_path: Path
) -> None:
    fmt = value if structure is None else f"{value}_{structure}"
    shapes = [((37, 150), 0.4), ((20, 64), 0.05), ((1, 3), 1.0), ((0, 5), 1.0), ((5, 0), 1.0)]
    for shape, density in shapes:
        x = np.ones((2, shape[1]), np.float32)
        w = weights(rng, *shape, structure or "bitmap", density)
        want = nb.quantize(w, fmt)
        q = copy.deepcopy(want).pack(keep=False)
        assert not {"codes", "scales", "zeros", "mask"} & q._storage._arrays.keys()
        assert list(q.parts) == list(want.parts)
        assert q == want
        assert q.nbytes == want.nbytes
        assert pickle.loads(pickle.dumps(q)) == want
        np.testing.assert_array_equal(q.dequantize(), want.dequantize())
        nb.save(tmp_path / "q.safetensors", {"w": q})
        assert nb.load(tmp_path / "q.safetensors")["w"] == want
        assert_same(x @ q.T, x @ want.T)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("value", VALUES)
def test_products_equal_those_of_the_dense_format(
    value: str, structure: str, rng: np.random.Generator
) -> None:
    for m, n, k in SHAPES:
        w = weights(rng, n, k, structure)
        dense, q = nb.quantize(w, value), nb.quantize(w, f"{value}_{structure}")
        x = rng.standard_normal((m, k)).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        for compute in q.format.computes:
            if compute == "bf16":
                continue
            want = np.empty((m, n), np.float32)
            _core.matmul(x, dense._storage.pack(1), want, compute, bias, 1, "scalar")
            for isa in levels():
                got = np.empty((m, n), np.float32)
                _core.matmul(x, q._storage.pack(1), got, compute, bias, 2, isa)
                np.testing.assert_array_equal(got, want, err_msg=f"{compute} {isa} {m},{n},{k}")


@pytest.mark.parametrize("value", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.25, 0.5])
def test_few_kept_numbers(value: str, density: float, rng: np.random.Generator) -> None:
    # Rows by ones, by a register, by two, by tasks; panels and K that end anywhere.
    shapes = [(1, 50, 300), (2, 33, 129), (4, 100, 640), (9, 40, 96), (1, 1, 1), (8, 17, 64)]
    shapes += [(16, 15, 257), (17, 16, 512), (33, 48, 65), (70, 129, 320), (300, 40, 130)]
    for m, n, k in shapes:
        w = weights(rng, n, k, "bitmap", density)
        w[n // 2] = 0
        w[n // 3, : k // 2] = 1
        dense, q = nb.quantize(w, value), nb.quantize(w, f"{value}_bitmap")
        x = rng.standard_normal((m, k)).astype(np.float32)
        broken = x.copy()
        broken[-1, k // 2] = np.inf
        broken[0, 0] = np.nan
        for a in (x, broken, x[:, ::-1], x.astype(np.float16)):
            want = np.empty((m, n), np.float32)
            _core.matmul(a, dense._storage.pack(1), want, "f32", None, 1, "scalar")
            for isa in levels():
                got = np.empty((m, n), np.float32)
                _core.matmul(a, q._storage.pack(1), got, "f32", None, 2, isa)
                np.testing.assert_array_equal(got, want, err_msg=f"{isa} {m},{n},{k}")
        bias = rng.standard_normal(n).astype(np.float32)
        assert_same(nb.matmul(x, q.T, bias=bias), nb.matmul(x, dense.T, bias=bias))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.3])
def test_few_kept_codes(density: float, rng: np.random.Generator) -> None:
    # Rows by ones, twos, fours, eights, and tiles; decoding in whole and parts of 256 and 1024.
    shapes = [(1, 50, 1088), (2, 33, 1024), (4, 15, 2112), (7, 16, 1025), (9, 40, 96), (1, 1, 1)]
    shapes += [(17, 20, 1100), (33, 17, 64), (70, 33, 65), (66, 20, 1100), (3, 18, 0)]
    for m, n, k in shapes:
        w = weights(rng, n, k, "bitmap", density)
        w[n // 2] = 0
        w[n // 3, : min(k // 2, 60)] = 1  # far ahead of the other rows
        w[0, : k - 5] = 0  # and far behind
        dense, q = nb.quantize(w, "int8"), nb.quantize(w, "int8_bitmap")
        x = (rng.standard_normal((m, k)) * 3).astype(np.float32)
        broken = x.copy()
        broken[-1, k // 2 : k // 2 + 1] = np.inf
        broken[0, :1] = np.nan
        bias = rng.standard_normal(n).astype(np.float32)
        for compute in ("int8", "f32", "bf16"):
            for a in (x, broken, x[:, ::-1]):
                want = np.empty((m, n), np.float32)
                _core.matmul(a, dense._storage.pack(1), want, compute, bias, 1, "scalar")
                for isa in levels():
                    if compute == "bf16" and isa == "amx":
                        continue
                    got = np.empty((m, n), np.float32)
                    _core.matmul(a, q._storage.pack(1), got, compute, bias, 2, isa)
                    np.testing.assert_array_equal(got, want, err_msg=f"{compute} {isa} {m},{n},{k}")
        left = nb.quantize(x, "int8")
        want = left.codes().astype(np.int32) @ dense.codes().astype(np.int32).T
        np.testing.assert_array_equal(nb.matmul(left, q.T, dtype=np.int32), want)
        assert copy.deepcopy(q).pack(keep=False) == q


def test_zeros_that_are_kept(rng: np.random.Generator) -> None:
    w = weights(rng, 40, 300, "bitmap", 0.15)
    s = nb.quantize(w, "int8_bitmap")._storage
    arrays = {name: part.copy() for name, part in s.arrays().items()}
    arrays["codes"][::7] = 128
    q = QTensor._wrap(_Storage(s.format, s.rows, s.cols, arrays, None), False)
    same = copy.deepcopy(q).pack(keep=False)
    assert same == q
    np.testing.assert_array_equal(same._storage.arrays()["mask"], arrays["mask"])
    x = rng.standard_normal((3, 300)).astype(np.float32)
    np.testing.assert_allclose(x @ q.T, x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fmt",
    [
        "int4_g32_bsr32",
        "int4_bsr32",
        "int8_block16x64",
        "int4_g32_block16x64",
        "int4_g128_block16x64",
        "int8_g64_block16x64",
        "uint4_g128_block16x64",
        "int4_block16x64",
        "int2_block16x64",
        "int6_g32_block16x64",
        "ternary_block16x64",
        "nf4_block16x64",
        "nf4_g64_block16x64",
        "mxfp4_block16x64",
        "mxfp6_e3m2_block16x64",
        "nvfp4_block16x64",
        "f32_block16x64",
        "f16_block16x64",
        "bf16_block16x64",
    ],
)
def test_structures_that_skip_work(fmt: str, rng: np.random.Generator) -> None:
    structure = fmt.rsplit("_", 1)[1]
    for m, n, k in [(1, 64, 256), (3, 100, 224), (16, 48, 640), (40, 130, 320), (70, 33, 200)]:
        for density in (0.1, 0.5, 1.0):
            w = weights(rng, n, k, structure, density)
            w[: n // 3] *= rng.random((n // 3, 1)) < 0.5  # some rows and blocks keep nothing
            dense, q = nb.quantize(w, fmt.rsplit("_", 1)[0]), nb.quantize(w, fmt)
            x = rng.standard_normal((m, k)).astype(np.float32)
            x[0, 0] = np.nan if m == 3 else x[0, 0]
            for compute in (c for c in q.format.computes if c != "bf16"):
                for isa in levels():
                    want, got = np.empty((2, m, n), np.float32)
                    _core.matmul(x, dense._storage.pack(1), want, compute, None, 1, isa)
                    _core.matmul(x, q._storage.pack(1), got, compute, None, 2, isa)
                    np.testing.assert_array_equal(got, want, err_msg=f"{isa} {compute} {m},{n},{k}")


@pytest.mark.parametrize(
    ("base", "compute"),
    [
        ("int8", "int8"),
        ("int8", "int8_g32"),
        ("int8", "int8_g128"),
        ("int8_g256", "int8"),
        ("int4_g128", "int8"),
        ("int4_g128", "int8_g128"),
        ("int4_g64", "int8_g32"),
        ("int4_g32", "int8"),
        ("int2_g16", "int8"),
        ("int4", "int8"),
        ("int3", "int8_g128"),
        ("nf4", "int8"),
        ("mxfp4", "int8"),
        ("nf4_g128", "int8_g32"),
    ],
)
@pytest.mark.parametrize("m", [17, 64, 130, 300])
def test_kept_tiles_of_many_rows(m: int, base: str, compute: str, rng: np.random.Generator) -> None:
    """Rows that fill their tiles and rows that do not, more than one window of K, some empty."""
    n, k = 72, 4800
    w = weights(rng, n, k, "block16x64", 0.3)
    w[16:32] = 0
    w[32:48, :4096] = 0
    w[48:64, 4096:] = 0
    dense, q = nb.quantize(w, base), nb.quantize(w, f"{base}_block16x64")
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[m // 2, 5] = np.inf
    for isa in levels()[1:] or levels():
        want, got = np.empty((2, m, n), np.float32)
        _core.matmul(x, dense._storage.pack(1), want, compute, None, 1, isa)
        for threads in (1, 3):
            _core.matmul(x, q._storage.pack(1), got, compute, None, threads, isa)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa} {threads}")


def test_dropped_blocks_meet_what_bf16_cannot_hold(rng: np.random.Generator) -> None:
    w = np.abs(weights(rng, 32, 256, "block16x64", 0.25))  # kept blocks alone would give inf
    x = np.zeros((6, 256), np.float32)
    x[1] = 3.4e38  # finite in float32, infinite in bfloat16
    for m in (2, 6):
        for isa in levels():
            want, got = np.empty((2, m, 32), np.float32)
            _core.matmul(x[:m], nb.quantize(w, "int8")._storage.pack(1), want, "bf16", None, 1, isa)
            q = nb.quantize(w, "int8_block16x64")
            _core.matmul(x[:m], q._storage.pack(1), got, "bf16", None, 1, isa)
            np.testing.assert_array_equal(got, want, err_msg=f"{isa} {m}")
            assert np.isnan(want[1]).all()


@pytest.mark.parametrize("structure", ["bitmap", "block16x64"])
def test_products_of_other_kinds(structure: str, rng: np.random.Generator) -> None:
    w = weights(rng, 40, 64, structure)
    dense, q = nb.quantize(w, "int8"), nb.quantize(w, f"int8_{structure}")
    x = rng.standard_normal((2, 5, 64))
    assert_same(x @ q.T, x @ dense.T)
    assert_same(q @ x[0].T, dense @ x[0].T)
    assert_same(np.matmul(x[0, 0], q.T), np.matmul(x[0, 0], dense.T))
    left = nb.quantize(rng.standard_normal((6, 64)), "int8")
    assert_same(left @ q.T, left @ dense.T)
    assert_same(q @ left.T, dense @ left.T)
    raw = nb.matmul(q, left.T, dtype=np.int32)
    assert_same(raw, q.codes().astype(np.int32) @ left.codes().astype(np.int32).T)
    np.testing.assert_allclose(
        nb.matmul(x[0], q.T, compute="bf16"), x[0] @ w.T, rtol=0.05, atol=0.5
    )
    text = str(nb.explain(x[0], q.T, compute="int8"))
    assert f"int8_{structure}" in text


def test_slices(rng: np.random.Generator) -> None:
    for structure in STRUCTURES:
        w = weights(rng, 48, 256, structure)
        dense, q = nb.quantize(w, "int4_g32"), nb.quantize(w, f"int4_g32_{structure}")
        for key in [np.s_[3:20], np.s_[:, 64:192], np.s_[::2, 32:], np.s_[[5, 1]], np.s_[0:0]]:
            assert q[key].format == q.format
            assert_same(q[key].dequantize(), dense[key].dequantize())
        assert_same(q.T[64:192].dequantize(), dense.T[64:192].dequantize())
        with pytest.raises(ValueError, match="cut a group"):
            q[:, 1:]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_zero_full_and_empty(structure: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 96)).astype(np.float32)
    for w in (np.zeros((20, 96), np.float32), np.ones((20, 96), np.float32)):
        if structure == "2of4" and w.any():
            with pytest.raises(ValueError, match="960 entries are in the way"):
                nb.quantize(w, "int8_2of4")
            continue
        for value in ("int8", "int4_g32", "f32"):
            q = nb.quantize(w, f"{value}_{structure}")
            for compute in {"f32", "int8"} & set(q.format.computes):
                want = nb.matmul(x, nb.quantize(w, value).T, compute=compute)
                assert_same(nb.matmul(x, q.T, compute=compute), want)
    for shape in [(0, 5), (5, 0), (0, 0)]:
        q = nb.quantize(np.zeros(shape, np.float32), f"int8_{structure}")
        assert (np.ones((2, shape[1]), np.float32) @ q.T).shape == (2, shape[0])
        assert pickle.loads(pickle.dumps(q)) == q


def test_formats_that_cannot_be_sparse() -> None:
    for name in ["bipolar4_bitmap", "int8_bsr0", "int8_block16", "f32_g32", "int4_g32_si8_bitmap"]:
        with pytest.raises(ValueError, match=name.split("_")[0]):
            nb.Format(name)
    floats = nb.quantize(np.ones((2, 8)), "uint4")
    parts = floats.codes(), floats.scales, np.full((2, 1), 0.5)
    with pytest.raises(ValueError, match="float zero points"):
        nb.QTensor.from_parts("uint4_bitmap", *parts)
    with pytest.raises(ValueError, match="no code for 0"):
        nb.Format("bipolar1_2of4")


def test_plain_numbers(rng: np.random.Generator) -> None:
    w = rng.standard_normal((33, 70)).astype(np.float32)
    x = rng.standard_normal((7, 70)).astype(np.float32)
    q = nb.quantize(w, "f32")
    assert_same(q.dequantize(), w)
    assert_same(q.codes(), w)
    assert (q.error_bound == 0).all()
    half = nb.quantize(w, "f16")
    assert_same(half.dequantize(), w.astype(np.float16).astype(np.float32))
    assert (np.abs(half.dequantize() - w).max(1, keepdims=True) <= half.error_bound).all()
    np.testing.assert_allclose(x @ q.T, x @ w.T, rtol=1e-4, atol=1e-5)
    assert nb.QTensor.from_parts("f32", w, np.ones(33)) == q
    for bad in (np.nan, np.inf):
        broken = w.copy()
        broken[3, 4] = bad
        with pytest.raises(ValueError, match="row 3, column 4"):
            nb.quantize(broken, "f32_bitmap")
    with pytest.raises(ValueError, match="overflows f16"):
        nb.quantize(w * 1e6, "f16")
    with pytest.raises(ValueError, match="scales of f32 are 1"):
        nb.QTensor.from_parts("f32", w, np.full(33, 2.0))
    with pytest.raises(ValueError, match="expected one of f32"):
        nb.matmul(x, q.T, compute="int8")


def test_files_that_lie(rng: np.random.Generator, tmp_path: Path) -> None:
    q = nb.quantize(weights(rng, 6, 40, "bitmap"), "int4_bitmap")
    state = list(q.__reduce__()[1])
    rebuild = q.__reduce__()[0]

    def with_arrays(**changed: np.ndarray) -> None:
        rebuild(*state[:3], {**q.parts, **changed}, *state[4:])

    with_arrays()
    mask = q.parts["mask"].copy()
    for codes in (q.parts["codes"][1:], np.append(q.parts["codes"], np.uint8(0))):
        with pytest.raises(ValueError, match=r"bytes of codes|must be"):
            with_arrays(codes=codes)
    flipped = mask.copy()
    flipped[0, 0] ^= 255
    with pytest.raises(ValueError, match=r"bytes of codes|padding bits"):
        with_arrays(mask=flipped)
    with pytest.raises(ValueError, match="mask"):
        with_arrays(mask=mask[:, :-1])
    wide = nb.quantize(weights(rng, 6, 41, "bitmap"), "int8_bitmap")
    stray = wide.parts["mask"].copy()
    stray[2, -1] |= 128
    with pytest.raises(ValueError, match="bits past its last unit"):
        wide.__reduce__()[0](*wide.__reduce__()[1][:3], {**wide.parts, "mask": stray}, None, False)
    two = nb.quantize(weights(rng, 6, 40, "2of4"), "int8_2of4")
    arrays = {**two.parts, "mask": two.parts["mask"] | 1 | 2 | 4}
    with pytest.raises(ValueError, match="2of4 mask"):
        two.__reduce__()[0](*two.__reduce__()[1][:3], arrays, None, False)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(structure: str, bad: float) -> None:
    w = np.zeros((20, 70), np.float32)
    w[17, 66] = bad
    for value in ("int8", "int4_g32", "f32"):
        with pytest.raises(ValueError, match="row 17, column 66"):
            nb.quantize(w, f"{value}_{structure}")
    with pytest.raises(ValueError, match="not finite"):
        nb.prune(w, PATTERN[structure], 0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, np.nan])
def test_density_is_checked(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        nb.prune(np.ones((4, 8)), "unstructured", density)


def test_prune(rng: np.random.Generator) -> None:
    w = rng.standard_normal((30, 50))
    for density in (0.01, 0.1, 0.5, 1.0):
        out = nb.prune(w, "unstructured", density)
        kept = max(1, int(density * 50 + 0.5))
        assert ((out != 0).sum(1) == kept).all()
        for row, orig in zip(out, w, strict=True):
            assert np.abs(orig[row == 0]).max(initial=0) <= np.abs(row[row != 0]).min()
    two = nb.prune(w, "2:4")
    fours = np.pad(two != 0, ((0, 0), (0, 2))).reshape(30, -1, 4).sum(2)
    assert (fours == 2).all()
    groups = nb.prune(w, "group8", 0.5) != 0
    for g in range(7):
        part = groups[:, g * 8 : g * 8 + 8]
        assert (part.all(1) | ~part.any(1)).all()
    assert (groups[:, ::8].sum(1) == 4).all()
    blocks = nb.prune(w, "block16x20", 0.5) != 0
    units = [blocks[i : i + 16, j : j + 20] for i in (0, 16) for j in (0, 20, 40)]
    assert all(u.all() or not u.any() for u in units)
    assert sum(u.all() for u in units) == 3
    # Equal worth: the first stay.
    assert nb.prune(np.ones((1, 8)), "unstructured", 0.5).tolist() == [[1] * 4 + [0] * 4]
    x = np.ones((3, 50))
    x[:, 7] = 1000
    assert (nb.prune(w, "unstructured", 0.02, "wanda", x=x)[:, 7] == w[:, 7]).all()
    given = rng.random((30, 50))
    out = nb.prune(w, "unstructured", 0.02, given)
    assert (out.nonzero()[1] == given.argmax(1)).all()
    assert nb.prune(w.astype(np.float16), "2:4").dtype == np.float16
    assert (nb.prune(np.zeros((3, 8)), "2:4") == 0).all()
    assert nb.prune(np.zeros((0, 8)), "group4", 0.5).shape == (0, 8)


def test_prune_refuses(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 8))
    for bad in ("2:8", "group0", "block4", "block4x0", 3):
        with pytest.raises(ValueError, match="unknown pattern"):
            nb.prune(w, bad, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        nb.prune(np.full((2, 2), np.nan), "unstructured", 0.5)
    with pytest.raises(ValueError, match="expected 2"):
        nb.prune(w[0], "unstructured", 0.5)
    with pytest.raises(ValueError, match="keeps half"):
        nb.prune(w, "2:4", 0.25)
    with pytest.raises(ValueError, match="density"):
        nb.prune(w, "group4")
    with pytest.raises(ValueError, match="needs activations"):
        nb.prune(w, "group4", 0.5, "wanda")
    with pytest.raises(ValueError, match="score has shape"):
        nb.prune(w, "group4", 0.5, np.ones((4, 7)))
    with pytest.raises(ValueError, match="unknown score"):
        nb.prune(w, "group4", 0.5, "taylor")
    with pytest.raises(TypeError, match="real numbers"):
        nb.prune(w + 1j, "group4", 0.5)


def test_second_order_scores(rng: np.random.Generator) -> None:
    n, k, samples = 5, 12, 200
    mix = rng.standard_normal((k, k))
    x = rng.standard_normal((samples, k)) @ mix
    w = rng.standard_normal((n, k))
    scores = nb.quantizers.obs_scores(w, x, damping=1e-9)
    # By the definition: the least squared error of the outputs with weight (0, j) held at 0.
    for j in range(k):
        others = [i for i in range(k) if i != j]
        best, *_ = np.linalg.lstsq(x[:, others], x @ w[0], rcond=None)
        loss = ((x[:, others] @ best - x @ w[0]) ** 2).sum()
        np.testing.assert_allclose(2 * scores[0, j], loss, rtol=1e-4)
    blocks = nb.quantizers.obs_scores(w, x, block=4, damping=1e-9)
    part = nb.quantizers.obs_scores(w[:, 4:8], x[:, 4:8], damping=1e-9)
    np.testing.assert_allclose(blocks[:, 4:8], part, rtol=1e-4)
    for bad in ({"block": 0}, {"damping": 0}):
        with pytest.raises(ValueError, match=r"block|damping"):
            nb.quantizers.obs_scores(w, x, **bad)
    with pytest.raises(ValueError, match="x must have shape"):
        nb.quantizers.obs_scores(w, x[:, 1:])
    with pytest.raises(ValueError, match="finite"):
        nb.quantizers.obs_scores(w * np.nan, x)


@pytest.mark.parametrize("fmt", ["int8", "uint8", "int4", "uint3", "ternary", "bipolar2"])
@pytest.mark.parametrize("compute", ["f32", "int8"])
def test_skip_zeros_changes_nothing(fmt: str, compute: str, rng: np.random.Generator) -> None:
    for m, n, k in [(1, 70, 200), (3, 200, 300), (4, 64, 64), (5, 33, 40), (2, 1, 1)]:
        q = nb.quantize(rng.standard_normal((n, k)), fmt)
        bias = rng.standard_normal(n).astype(np.float32)
        for density in (0.0, 0.1, 0.4, 0.9):
            x = rng.standard_normal((m, k)).astype(np.float32)
            x[rng.random((m, k)) >= density] = 0
            want = nb.matmul(x, q.T, compute=compute, bias=bias)
            got = nb.matmul(x, q.T, compute=compute, bias=bias, skip_zeros=True)
            assert_same(got, want)
            for isa in levels():
                y = np.full((m, n), np.nan, np.float32)
                columns = q._storage.columns(1)
                if columns.matmul(x, y, compute, bias, 2, isa):
                    assert_same(y, want)
                else:
                    assert m > 4 or (x != 0).sum(1).max() > k // 2
        x = np.zeros((m, k), np.float32)
        x[0, 0] = np.inf
        np.testing.assert_array_equal(
            nb.matmul(x, q.T, compute=compute, skip_zeros=True),
            nb.matmul(x, q.T, compute=compute),
        )
    grouped = nb.quantize(rng.standard_normal((20, 64)), "int4_g16_bitmap")
    x = np.zeros(64)
    x[3] = 2.5
    assert_same(nb.matmul(x, grouped.T, skip_zeros=True), nb.matmul(x, grouped.T))


@pytest.mark.parametrize("fmt", ["int8", "uint8", "int8_bitmap", "int4", "bipolar3"])
def test_delta_equals_a_fresh_product(fmt: str, rng: np.random.Generator) -> None:
    n, k = 150, 96
    q = nb.quantize(rng.standard_normal((n, k)), fmt)
    bias = rng.standard_normal(n).astype(np.float32)
    layer = nb.DeltaLinear(q, bias=bias)
    x = rng.standard_normal((2, k)).astype(np.float32)
    x[:, 0] = 5  # the largest stays, so the scale does too
    for step in range(1000):
        moved = rng.random((2, k)) < 0.1
        moved[:, 0] = step % 97 == 96
        x = np.where(moved, rng.standard_normal((2, k)), x).astype(np.float32)
        if step % 31 == 30:
            x = -x
        assert_same(layer(x), nb.matmul(x, q.T, compute="int8", bias=bias))
        assert_same(layer(x), nb.matmul(x, q.T, compute="int8", bias=bias))
        assert layer.changed == 0
    layer.reset()
    assert_same(layer(x[0]), nb.matmul(x[0], q.T, compute="int8", bias=bias))


def test_delta_with_a_fixed_scale(rng: np.random.Generator) -> None:
    q = nb.quantize(rng.standard_normal((70, 64)), "int8")
    scale = np.float32(0.03)
    layer = nb.DeltaLinear(q, scale=scale)
    for _ in range(50):
        x = rng.standard_normal(64).astype(np.float32) * 2
        codes = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
        exact = q.codes().astype(np.int64) @ codes
        want = exact.astype(np.float32) * q.scales[:, 0] * scale
        assert_same(layer(x), want.astype(np.float32))
        assert_same(nb.DeltaLinear(q, scale=scale)(codes), layer(x))


def test_delta_never_leaves_its_bound(rng: np.random.Generator) -> None:
    n, k, threshold, scale = 60, 200, 0.2, np.float32(0.02)
    q = nb.quantize(rng.standard_normal((n, k)), "int8")
    w = np.abs(q.dequantize().astype(np.float64)).sum(1)
    lazy, exact = (
        nb.DeltaLinear(q, threshold=threshold, scale=scale),
        nb.DeltaLinear(q, scale=scale),
    )
    x = rng.standard_normal(k).astype(np.float32)
    visited, worst = 0, 0.0
    for _ in range(1000):
        x = (x + 0.02 * rng.standard_normal(k)).astype(np.float32)
        error = np.abs(lazy(x).astype(np.float64) - exact(x))
        assert (error <= threshold * w * (1 + 1e-5)).all()
        worst = max(worst, float((error / w).max()))
        visited += lazy.changed
    # It does skip, and the threshold is felt.
    assert visited < 0.3 * 1000 * k
    assert worst > 0.01


def test_delta_refuses(rng: np.random.Generator) -> None:
    q = nb.quantize(rng.standard_normal((10, 64)), "int8")
    layer = nb.DeltaLinear(q)
    assert layer.weight is q
    layer(np.ones((2, 64)))
    with pytest.raises(ValueError, match=r"reset\(\)"):
        layer(np.ones((3, 64)))
    with pytest.raises(ValueError, match=r"reset\(\)"):
        layer(np.ones(64))
    with pytest.raises(ValueError, match="expected an input of shape"):
        layer(np.ones((2, 63)))
    layer.reset()
    assert layer(np.ones(64)).shape == (10,)
    with pytest.raises(ValueError, match="grouped"):
        nb.DeltaLinear(nb.quantize(np.ones((4, 64)), "int4_g16"))
    with pytest.raises(ValueError, match="integers"):
        nb.DeltaLinear(nb.quantize(np.ones((4, 64)), "nf4"))
    for bad in ({"threshold": -1}, {"threshold": np.nan}, {"scale": 0}, {"scale": np.inf}):
        with pytest.raises(ValueError, match=r"threshold|scale"):
            nb.DeltaLinear(q, **bad)
    with pytest.raises(ValueError, match="transpose"):
        nb.DeltaLinear(q.T)
    with pytest.raises(TypeError, match="QTensor"):
        nb.DeltaLinear(np.ones((2, 2)))  # type: ignore[arg-type]


def test_delta_and_numbers_that_are_not_finite(rng: np.random.Generator) -> None:
    q = nb.quantize(rng.standard_normal((10, 64)), "int8")
    for scale in (None, 0.1):
        layer = nb.DeltaLinear(q, scale=scale)
        x = np.full(64, 0.5, np.float32)
        first = layer(x)
        x[3] = np.nan
        assert np.isnan(layer(x)).all()
        x[3] = 0.5
        assert_same(layer(x), first)
