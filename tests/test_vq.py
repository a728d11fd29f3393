"""Vector codes: what indices mean, how a codebook is learned, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import nibblas as nb

NAMES = [e.name for e in nb.formats.table() if e.name.startswith("vq")]


def indices(codes: np.ndarray, bits: int) -> np.ndarray:
    """One number for each vector, of its codes along the last axis; the first is the lowest."""
    return (codes.astype(np.int64) << (bits * np.arange(codes.shape[-1]))).sum(-1)


#: Of the variance of normal numbers that a codebook of them leaves.
LIMITS = {"vq1": 0.32, "vq2": 0.105, "vq2_r8": 0.095, "vq3_r4": 0.031, "vq4": 0.0092}


#: Bits of an index that are the place in a second codebook.
SECOND = {"vq2_r8": 8, "vq3_r4": 4}


def decode(q: nb.QTensor) -> np.ndarray:
    """What a matrix of vector codes is worth, one vector at a time."""
    codes, table, v = q.codes(), q.parts["table"], q.format.element.span
    rows, cols = codes.shape
    out = np.full((rows, cols), np.nan, np.float32)
    length = q.format.group or cols
    second = SECOND.get(q.format.element.name, 0)
    first = len(table) - 2**second if second else len(table)
    for n in range(rows):
        for g, k0 in enumerate(range(0, cols, length)):
            for k in range(k0, min(k0 + length, cols), v):
                end = min(k + v, k0 + length, cols)
                index = indices(codes[n, k:end], q.format.bits)
                entry = table[index % first]
                if second:
                    entry = entry + table[first + index // first]
                out[n, k:end] = entry[: end - k] * np.float32(q.scales[n, g])
    return out


def test_names() -> None:
    assert nb.Format("vq") == "vq2"
    assert nb.Format("vq_g128") == "vq2_g128"
    assert nb.Format("vq_sf16").scale == "f16"
    assert nb.Format("vq2_v6_g96").element.name == "vq2_v6"
    assert nb.Format("vq2").group is None
    shapes = {n: {p.name: p.shape for p in nb.Format(n).parts(8, 48)}["table"] for n in NAMES}
    assert shapes == {
        "vq1": (256, 8),
        "vq2": (256, 4),
        "vq3": (4096, 4),
        "vq4": (256, 2),
        "vq2_v6": (4096, 6),
        "vq2_r8": (512, 8),
        "vq3_r4": (272, 4),
    }
    for bad in ("vq5", "vq2_v8", "vq2_r4", "vq2_g4", "vq2_se4m3", "vq2_bitmap"):
        with pytest.raises(ValueError, match=bad.partition("_")[0]):
            nb.Format(bad)


@pytest.mark.parametrize("name", NAMES)
def test_codes_decode_by_the_codebook(name: str, rng: np.random.Generator) -> None:
    # Short vectors at the end of rows and groups, and none.
    for group, k in (("", 48), ("", 47), ("", 1), ("_g8", 40), ("_g13", 61), ("_g120", 481)):
        f = nb.Format(name + group)
        codes = rng.integers(0, 2**f.bits, (5, k)).astype(np.uint8)
        shape = next(p.shape for p in f.parts(5, k) if p.name == "table")
        table = rng.standard_normal(shape).astype(np.float32)
        scales = rng.uniform(0.5, 2, (5, f.groups(k))).astype(np.float32)
        q = nb.QTensor.from_parts(f, codes, scales, table=table)
        np.testing.assert_array_equal(q.dequantize(), decode(q))
        x = rng.standard_normal((4, k)).astype(np.float32)
        want = x.astype(np.float64) @ decode(q).astype(np.float64).T
        np.testing.assert_allclose(x @ q.T, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(nb.matmul(x[:1], q.T), (x @ q.T)[:1])


def test_indices_are_numbers_of_the_stream(rng: np.random.Generator) -> None:
    for name in ("vq1", "vq2", "vq4"):
        f = nb.Format(name)
        codes = rng.integers(0, 2**f.bits, (3, 64)).astype(np.uint8)
        q = nb.QTensor.from_parts(f, codes, np.ones(3))
        whole = codes.reshape(3, -1, f.element.span)
        np.testing.assert_array_equal(q.parts["codes"], indices(whole, f.bits))
    codes = rng.integers(0, 8, (3, 64)).astype(np.uint8)
    b = nb.QTensor.from_parts("vq3", codes, np.ones(3)).parts["codes"].astype(int)
    first, second = b[:, ::3] | (b[:, 1::3] & 15) << 8, b[:, 1::3] >> 4 | b[:, 2::3] << 4
    want = indices(codes.reshape(3, -1, 4), 3)
    np.testing.assert_array_equal(np.stack([first, second], 2).reshape(3, -1), want)


def distances(w: np.ndarray, table: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Weighted squares of the distances of vectors from every entry."""
    return (h * np.square(w[:, None] - table)).sum(-1, dtype=np.float64)


@pytest.mark.parametrize("name", ["vq1", "vq2", "vq4"])
def test_codebooks_are_a_fixpoint_of_k_means(name: str, rng: np.random.Generator) -> None:
    w = rng.laplace(size=(24, 480)).astype(np.float32) * np.exp(rng.normal(size=(24, 1)))
    h = np.repeat(rng.uniform(0.1, 1, 60), 8)
    q = nb.quantize(w.astype(np.float32), name, importance=h)
    v, table = q.format.element.span, q.parts["table"].astype(np.float64)
    scale = q.scales.astype(np.float64)
    rms = np.sqrt(np.square(w).mean(1, keepdims=True))
    np.testing.assert_allclose(scale, rms, rtol=1e-6)
    vectors = (w / scale).reshape(-1, v)
    weights = np.tile(h, 24).reshape(-1, v)
    mass = np.repeat(np.square(scale), 480 // v)
    codes = indices(q.codes().reshape(-1, v), q.format.bits)
    error = least = 0.0
    for start in range(0, len(vectors), 500):
        some = slice(start, start + 500)
        far = distances(vectors[some], table, weights[some][:, None])
        own = far[np.arange(len(far)), codes[some]]
        np.testing.assert_allclose(own, far.min(1), rtol=1e-4, atol=1e-6)
        error += (mass[some] * own).sum()
    for u in np.unique(codes):
        share = mass[codes == u, None] * weights[codes == u]
        mean = (share * vectors[codes == u]).sum(0) / share.sum(0)
        least += (share * np.square(vectors[codes == u] - mean)).sum()
    # The rounds end when one gains less than a thousandth.
    assert 0.997 * error < least <= error * (1 + 1e-6)


def relative(q: nb.QTensor, w: np.ndarray) -> float:
    return float(np.square(q.dequantize() - w).sum() / np.square(w).sum())


def test_vector_codes_are_good(rng: np.random.Generator) -> None:
    w = rng.standard_normal((256, 512)).astype(np.float32)
    # What the best scalar of as many bits leaves of the variance of normal numbers (Max, 1960).
    scalar = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
    for name in LIMITS:
        q = nb.quantize(w, name)
        assert relative(q, w) < LIMITS[name] < scalar[q.format.bits], name
        table = q.parts["table"]
        assert q.bits_per_weight == q.format.bits + 8 * (table.nbytes + q.scales.nbytes) / w.size
    # Numbers that go together are what vectors are for.
    pairs = np.repeat(w[:, ::2], 2, 1)
    vectors, table = (relative(nb.quantize(pairs, f), pairs) for f in ("vq2", "lut2"))
    assert vectors < 0.15 * table


def test_importance_lowers_the_weighted_error(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 512)).astype(np.float32)
    h = np.ones(512)
    h[::4] = 50

    def weighted(q: nb.QTensor) -> float:
        return float((np.square(q.dequantize() - w) * h).sum())

    plain, weighed = (nb.quantize(w, "vq2", importance=i) for i in (None, h))
    assert weighted(weighed) < 0.6 * weighted(plain)
    assert relative(weighed, w) > relative(plain, w)
    # What counts is how columns compare.
    assert nb.quantize(w, "vq2", importance=np.full(512, 8.0)) == plain
    assert nb.quantize(w, "vq2", importance=np.zeros(512)) == plain
    assert nb.quantize(w, "vq2", importance=4 * h) == weighed
    for bad, says in ((h[1:], "shape"), (-h, "importance -50"), (h * np.nan, "NaN")):
        with pytest.raises(ValueError, match=says):
            nb.quantize(w, "vq2", importance=bad)


@pytest.mark.parametrize("name", NAMES)
def test_parts_travel(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    f = nb.Format(name + "_g24")
    w = rng.standard_normal((20, 99)).astype(np.float32)
    q = nb.quantize(w, f)
    for threads in (1, 3):
        assert nb.quantize(w, f, threads=threads) == q
    np.testing.assert_array_equal(q.dequantize(), decode(q))
    np.testing.assert_array_equal(q[3:9, 24:72].dequantize(), decode(q)[3:9, 24:72])
    np.testing.assert_array_equal(q.T.dequantize(), decode(q).T)
    nb.save(tmp_path / "f", {"w": q})
    assert nb.load(tmp_path / "f")["w"] == q
    assert pickle.loads(pickle.dumps(q)) == q
    again = nb.QTensor.from_parts(f, q.codes(), q.scales, table=q.parts["table"])
    assert again == q
    bound = np.repeat(q.error_bound, 24, 1)[:, :99]
    assert (np.abs(w - q.dequantize()) <= bound).all()


def test_odd_matrices(rng: np.random.Generator) -> None:
    for name in NAMES:
        # As many different vectors as entries, or fewer: nothing is lost but roundings.
        w = rng.standard_normal((6, 48)).astype(np.float32)
        np.testing.assert_allclose(nb.quantize(w, name).dequantize(), w, rtol=1e-5, atol=1e-6)
        # One column: the few bits of a short vector.
        few = np.sign(rng.standard_normal((40, 1))).astype(np.float32) * 3
        np.testing.assert_allclose(nb.quantize(few, name).dequantize(), few, rtol=1e-5)
        zero = nb.quantize(np.zeros((3, 21), np.float32), name)
        assert (zero.dequantize() == 0).all()
        assert (zero.scales > 0).all()
        for bad, says in ((np.nan, "nan"), (-np.inf, "-inf")):
            w[2, 5] = bad
            with pytest.raises(ValueError, match=f"(?i){says} at row 2, column 5"):
                nb.quantize(w, name)
        top = nb.quantize(np.array([[3.4e38, 1, 0, -3.4e38] * 3], np.float32), name).dequantize()
        assert np.isfinite(top).all()
        for shape in ((0, 8), (3, 0)):
            assert nb.quantize(np.zeros(shape, np.float32), name).dequantize().shape == shape
    # A row of zeros among others is as good as 0.
    w = rng.standard_normal((32, 64)).astype(np.float32)
    w[7] = 0
    assert np.abs(nb.quantize(w, "vq2").dequantize()[7]).max() < 1e-30


def test_bad_codebooks_are_refused() -> None:
    codes, scales = np.zeros((2, 8), np.uint8), np.ones(2)
    good = np.linspace(-1, 1, 1024).reshape(256, 4)
    assert nb.QTensor.from_parts("vq2", codes, scales, table=good).dequantize()[0, 0] == -1
    assert nb.QTensor.from_parts("vq2", codes, scales, table=np.ones((256, 4))) is not None
    holes = good.copy()
    holes[3, 2] = np.nan
    for bad in (
        good[:255],
        good[:, :3],
        np.ones((257, 4)),
        holes,
        np.where(good == 1, np.inf, good),
    ):
        with pytest.raises(ValueError, match="table"):
            nb.QTensor.from_parts("vq2", codes, scales, table=bad)
    with pytest.raises(ValueError, match="lie in"):
        nb.QTensor.from_parts("vq2", codes + 4, scales)
    q = nb.QTensor.from_parts("vq2", codes, scales, table=good)
    with pytest.raises(ValueError, match="f32, bf16"):
        nb.matmul(np.ones((1, 8), np.float32), q.T, compute="int8")
    state = list(q.__reduce__()[1])
    state[3] = {**state[3], "table": holes.astype(np.float32)}
    with pytest.raises(ValueError, match="table"):
        q.__reduce__()[0](*state)
    state[3] = {n: a for n, a in state[3].items() if n != "table"}
    with pytest.raises(ValueError, match="table"):
        q.__reduce__()[0](*state)
