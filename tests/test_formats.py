"""The table, the names, and every code of every format."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import runpy
import statistics
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nibblas as nb

ELEMENTS = nb.formats.table()
NAMES = [e.name for e in ELEMENTS]


def test_the_table_holds_what_it_should() -> None:
    want = {f"int{b}" for b in range(2, 9)} | {f"uint{b}" for b in range(2, 9)}
    want |= {f"bipolar{b}" for b in range(1, 9)} | {"ternary"}
    want |= {"nf4", "nf3", "fp4_bnb", "af4", "dyn8", "udyn8"} | {f"bfp{b}" for b in range(4, 9)}
    want |= {"nvfp4", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"}
    want |= {"e2m1", "e3m2", "e2m3", "e4m3", "e5m2"} | {f"pow2_{b}" for b in range(3, 7)}
    want |= {f"{n}_{b}" for n in ("log2", "logsqrt2") for b in range(3, 7)}
    want |= {f"lut{b}" for b in range(2, 9)} | {f"bfp{b}" for b in range(9, 17)}
    want |= {"dfp8", "dfp16"} | {f"trellis{b}" for b in range(1, 9)}
    want |= {f"lut{b}_row" for b in (2, 3, 4)}
    want |= {f"trellis{b}_hyb" for b in (2, 3, 4)} | {"trellis2_1mad", "trellis2_3inst"}
    want |= {f"vq{b}" for b in range(1, 5)} | {"vq2_v6", "vq2_r8", "vq3_r4"}
    assert want <= set(NAMES)
    assert len(NAMES) == len(set(NAMES))
    for e in ELEMENTS:
        assert e.levels <= 2**e.bits
        assert {"f32", "bf16"} <= set(e.computes)
        assert len(e.values) == e.levels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", ["", "_g8", "_g32", "_g128", "_g100"])
@pytest.mark.parametrize("scale", ["", "_sf32", "_sf16", "_sbf16"])
def test_names_round_trip(name: str, group: str, scale: str) -> None:
    e = next(e for e in ELEMENTS if e.name == name)
    if scale and scale[2:] not in e.scales:
        with pytest.raises(ValueError, match="has scales of type"):
            nb.Format(name + group + scale)
        return
    f = nb.Format(name + group + scale)
    assert nb.Format(str(f)) == f == str(f)
    assert nb.Format(f) is f
    assert f.element.name == name
    assert f.bits == f.element.bits
    length = int(group[2:]) if group else e.group
    assert f.group == length
    default = e.scales[0] if len(e.scales) == 1 else "f16" if length else "f32"
    assert f.scale == (scale[2:] or default)
    shown = "" if length == e.group else group
    assert str(f) == name + shown + ("" if f.scale == default else scale)
    assert pickle.loads(pickle.dumps(f)) == f
    assert type(pickle.loads(pickle.dumps(f))) is nb.Format
    assert copy.deepcopy(f) == f
    assert repr(f) == f"Format({str(f)!r})"
    assert {f: 1}[str(f)] == 1


def legal_values(e: nb.formats.Element) -> np.ndarray:
    step = 2 if e.name.startswith("bipolar") else 1
    values = np.arange(e.minimum, e.maximum + 1, step)
    assert len(values) == e.levels
    return values


def some_values(e: nb.formats.Element) -> np.ndarray:
    """Return the legal values, or a few of them with both ends where they are many."""
    values = legal_values(e)
    return values if len(values) <= 256 else np.append(values[:: len(values) // 100], values[-1])


def formats_of(e: nb.formats.Element, *suffixes: str) -> list[nb.Format]:
    """Return the formats of an element, of the suffixes that it can have."""
    one = len(e.scales) == 1
    return [nb.Format(e.name + s) for s in suffixes if not (one and "_s" in s)]


CODED = [f for e in ELEMENTS for f in formats_of(e, "", "_g8", "_g24_sf32", "_g16_sbf16")]


@pytest.mark.parametrize("f", CODED, ids=str)
def test_every_code_round_trips(f: nb.Format) -> None:
    e = f.element
    values = some_values(e)
    worth = dict(zip(legal_values(e).tolist(), e.values, strict=True))
    rng = np.random.default_rng(5)
    for k in (len(values), len(values) + 1, 3 * len(values) + 5):
        codes = np.resize(values, (4, k))
        codes = rng.permuted(codes, axis=1)
        groups = f.groups(k)
        scales = np.exp2(rng.integers(-6, 6, (4, groups))).astype(np.float32)
        if e.shared:
            scales[:] = 0.25
        zeros = rng.integers(0, e.levels, (4, groups)) if e.zeros else None
        q = nb.QTensor.from_parts(f, codes, scales, zeros)
        np.testing.assert_array_equal(q.codes(), codes)
        further = {n: a for n, a in q.parts.items() if n not in ("codes", "scales", "zeros")}
        if "table" in further:
            shape = further["table"].shape
            further["table"] = rng.uniform(-1, 1, shape).astype(np.float32)
            worth = dict(enumerate(further["table"].ravel()))
            table = further["table"].reshape(-1, e.levels) if e.span == 1 else None
            q = nb.QTensor.from_parts(f, codes, scales, zeros, **further)
        assert q.codes().dtype == (
            np.uint8 if e.minimum >= 0 else np.int8 if e.maximum <= 127 else np.int16
        )
        length = f.group or k
        wide = np.repeat(scales, length, 1)[:, :k]
        shift = 0 if zeros is None else np.repeat(zeros, length, 1)[:, :k]
        numbers = np.vectorize(worth.get, otypes=[np.float32])(codes)
        if "table" in further and e.span == 1:
            # One for all rows, or one for each.
            numbers = np.take_along_axis(np.resize(table, (4, e.levels)), codes, 1)
        if e.span == 1:
            numbers = (numbers - shift).astype(np.float32)
            np.testing.assert_array_equal(q.dequantize(), numbers * wide)
        assert nb.QTensor.from_parts(f, q.codes(), q.scales, q.zeros, **further) == q


# The maps of dyn8 and udyn8 lack -1; means and zero points move.
LOOSE = ("uint", "ternary", "bipolar1", "dyn8", "udyn8", "log", "lut", "trellis", "vq", "nvfp4")
IDEMPOTENT = [
    f
    for e in ELEMENTS
    if not e.name.startswith(LOOSE)
    for f in formats_of(e, "", "_g16", "_g16_sf32", "_g16_sbf16")
]


@pytest.mark.parametrize("fmt", IDEMPOTENT, ids=str)
def test_quantize_is_idempotent(fmt: nb.Format, rng: np.random.Generator) -> None:
    # Small weights would have subnormal float16 scales, of few bits.
    for scale in (1, 1e3) if fmt.scale == "f16" else (1, 1e-3, 1e3):
        w = (rng.standard_normal((8, 64)) * scale).astype(np.float32)
        q = nb.quantize(w, fmt)
        assert nb.quantize(q.dequantize(), q.format) == q


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_rule_of_int(bits: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((5, 40)).astype(np.float32)
    q = nb.quantize(w, f"int{bits}")
    top = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(1, keepdims=True) / np.float32(top)
    np.testing.assert_array_equal(q.scales, scale)
    np.testing.assert_array_equal(q.codes(), np.clip(np.rint(w / scale), -top, top))
    half = nb.quantize(w, f"int{bits}_g8")
    scale = (np.abs(w).reshape(5, 5, 8).max(2) / np.float32(top)).astype(np.float16)
    np.testing.assert_array_equal(half.scales, scale)
    wide = np.repeat(scale.astype(np.float32), 8, 1)
    np.testing.assert_array_equal(half.codes(), np.clip(np.rint(w / wide), -top, top))


def test_zero_groups_and_tiny_scales() -> None:
    for name in NAMES:
        q = nb.quantize(np.zeros((2, 16), np.float32), name + "_g8")
        assert q.format.group == 8
        if not (q.format.element.values == 0).any() and not q.format.has_zeros:
            # No code is worth 0: the smallest scale comes nearest.
            np.testing.assert_array_equal(q.scales, np.full((2, 2), np.float16(6e-8)))
            continue
        np.testing.assert_array_equal(q.scales, np.ones((2, 2)))
        np.testing.assert_array_equal(q.dequantize(), np.zeros((2, 16)))
    tiny = nb.quantize(np.full((1, 8), 1e-12, np.float32), "int4_g8")
    assert tiny.scales[0, 0] == np.float16(6e-8)
    with pytest.raises(ValueError, match="scale"):
        nb.quantize(np.full((1, 8), 1e8, np.float32), "int4_g8")


def test_a_group_longer_than_the_row_is_one_short_group(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 20)).astype(np.float32)
    q = nb.quantize(w, "int4_g128_sf32")
    assert q.scales.shape == (4, 1)
    np.testing.assert_array_equal(q.dequantize(), nb.quantize(w, "int4").dequantize())
    last = nb.quantize(w, "int4_g16")
    assert last.scales.shape == (4, 2)


def test_adding_bits_never_hurts(rng: np.random.Generator) -> None:
    w = rng.standard_normal((16, 128)).astype(np.float32)
    for family, low in (("int", 2), ("uint", 2), ("bipolar", 2)):
        errors = [
            float(np.square(nb.quantize(w, f"{family}{b}_g32").dequantize() - w).mean())
            for b in range(low, 9)
        ]
        assert errors == sorted(errors, reverse=True), family


def test_small_floats_decode_as_ml_dtypes_does() -> None:
    pairs = {
        "e2m1": ml_dtypes.float4_e2m1fn,
        "e2m3": ml_dtypes.float6_e2m3fn,
        "e3m2": ml_dtypes.float6_e3m2fn,
        "e3m4": ml_dtypes.float8_e3m4,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
    }
    for name, dtype in pairs.items():
        e = nb.Format(name).element
        want = np.arange(e.levels, dtype=np.uint8).view(dtype).astype(np.float32)
        np.testing.assert_array_equal(e.values, want)
        np.testing.assert_array_equal(np.signbit(e.values), np.signbit(want))
        # Rounding too: a row whose largest value is the type's own has the scale 1.
        finite = e.values[np.isfinite(e.values)]
        middles = np.unique(finite)[:-1] + np.diff(np.unique(finite)) / 2
        grid = np.linspace(-1, 1, 4001, dtype=np.float32) * finite.max()
        x = np.concatenate([grid, finite, middles])
        q = nb.quantize(x[None], f"{name}_sf32")
        np.testing.assert_array_equal(q.scales, [[1]])
        np.testing.assert_array_equal(q.codes()[0], x.astype(dtype).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mxfp4", ml_dtypes.float4_e2m1fn),
        ("mxfp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("mxfp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("mxfp8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_mx_decodes_as_ml_dtypes_does(name: str, dtype: type) -> None:
    levels = nb.Format(name).element.levels
    codes = np.tile(np.resize(np.arange(levels), (256,)), (256, 1)).astype(np.uint8)
    scale = np.arange(256, dtype=np.uint8)[:, None].repeat(8, 1)
    scales = scale.view(ml_dtypes.float8_e8m0fnu)
    q = nb.QTensor.from_parts(name, codes, scales)
    assert q.scales.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(q.scales.view(np.uint8), scale)
    with np.errstate(over="ignore", invalid="ignore"):
        values = codes.view(dtype).astype(np.float32)
        want = values * scales.astype(np.float32).repeat(32, 1)
    np.testing.assert_array_equal(q.dequantize(), want)


def test_mxint8_is_an_integer_in_units_of_a_64th() -> None:
    codes = np.resize(np.arange(-128, 128), (1, 256)).astype(np.int8)
    for e in (1.0, 2.0**-127, 2.0**100):
        q = nb.QTensor.from_parts("mxint8", codes, np.full((1, 8), e, np.float32))
        np.testing.assert_array_equal(q.dequantize(), codes * np.float64(e) / 64)


@pytest.mark.parametrize(
    ("largest", "mode", "scale", "decoded"),
    [
        (5.9, "floor", 1, 6),
        (6.1, "floor", 1, 6),
        (6.1, "rceil", 2, 6),
        (7, "floor", 1, 6),
        (7, "rceil", 2, 8),
        (7, "ceil", 2, 8),
        (7.9, "floor", 1, 6),
        (7.9, "rceil", 2, 8),
        (0.9, "floor", 0.125, 0.75),
        (0.9, "rceil", 0.25, 1),
    ],
)
def test_scale_modes(largest: float, mode: str, scale: float, decoded: float) -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, 5] = -largest
    q = nb.quantize(w, f"mxfp4_{mode}")
    assert float(q.scales[0, 0]) == scale
    assert q.dequantize()[0, 5] == -decoded
    assert str(q.format) == ("mxfp4" if mode == "floor" else f"mxfp4_{mode}")


def test_ties_of_e2m1() -> None:
    w = np.array([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5]], np.float32)
    want = [6, 0, 1, 1, 2, 2, 4, 4, -0.0, -4]
    np.testing.assert_array_equal(nb.quantize(w, "mxfp4").dequantize()[0], want)
    assert np.signbit(nb.quantize(w, "mxfp4").dequantize()[0, 8])


def test_a_block_that_is_not_finite_is_nan_in_mx_alone(rng: np.random.Generator) -> None:
    w = rng.standard_normal((3, 96)).astype(np.float32)
    w[1, 40] = np.inf
    x = rng.standard_normal((2, 96)).astype(np.float32)
    for e in ELEMENTS:
        if not e.nan:
            with pytest.raises(ValueError, match="row 1, column 40"):
                nb.quantize(w, e.name)
            continue
        q = nb.quantize(w, e.name)
        assert np.isnan(q.dequantize()[1, 32:64]).all()
        assert np.isfinite(np.delete(q.dequantize(), np.s_[32:64], 1)).all()
        assert np.isfinite(q.error_bound).all()
        for compute in q.format.computes:
            y = nb.matmul(x, q.T, compute=compute)
            assert np.isnan(y[:, 1]).all()
            assert np.isfinite(y[:, [0, 2]]).all()
        assert pickle.loads(pickle.dumps(q)) == q


def test_blocks_at_the_ends_of_the_range() -> None:
    top = np.finfo(np.float32).max
    tiny = np.float32(1e-45)
    for name in ("mxfp4", "mxfp8_e4m3", "mxint8", "bfp8", "mxfp4_ceil", "mxint8_ceil"):
        w = np.array([[top, -top] * 16, [tiny, 0] * 16, [2.0**-127, 0] * 16], np.float32)
        q = nb.quantize(w, name)
        assert np.isfinite(q.dequantize()).all(), name
        scales = np.asarray(q.scales, np.float32)[:, 0]
        assert scales[1] == 2.0**-127, name


@pytest.mark.parametrize("bits", range(4, 17))
def test_the_rule_of_bfp(bits: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((5, 64)).astype(np.float32)
    q = nb.quantize(w, f"bfp{bits}_g16")
    exponent = np.floor(np.log2(np.abs(w).reshape(5, 4, 16).max(2)))
    np.testing.assert_array_equal(np.asarray(q.scales, np.float32), np.exp2(exponent))
    step = np.exp2(exponent - (bits - 2)).repeat(16, 1)
    top = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(q.codes(), np.clip(np.rint(w / step), -top, top))
    np.testing.assert_array_equal(q.dequantize(), q.codes() * step)


def test_dynamic_maps() -> None:
    signed, unsigned = nb.Format("dyn8").element.values, nb.Format("udyn8").element.values
    for values in (signed, unsigned):
        assert len(values) == 256
        assert (np.diff(values) > 0).all()
        assert values[-1] == 1
    near = {"rtol": 1e-6}
    np.testing.assert_allclose(
        signed[[0, -4, -3, -2]], [-0.99296875, 0.96484375, 0.97890625, 0.99296875], **near
    )
    assert signed[127] == 0
    np.testing.assert_allclose(signed[128:132], [5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5], **near)
    np.testing.assert_allclose(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], **near)
    np.testing.assert_allclose(unsigned[-3:], [0.98945, 0.99648, 1], rtol=1e-5)


@pytest.mark.parametrize("bits", range(3, 7))
def test_logarithmic_levels(bits: int) -> None:
    top = 2**bits - 1
    exponent = np.arange(1, top + 1) - top
    for name, steps in (("log2", 1), ("logsqrt2", 2)):
        values = nb.Format(f"{name}_{bits}").element.values
        assert values[0] == 0
        np.testing.assert_allclose(values[1:], np.exp2(exponent / steps), rtol=1e-7)
        # What softmax gives, and what it never does.
        x = np.array([[1, 0.8, 0.4, 1e-12, 0, -0.5]], np.float32)
        got = nb.quantize(x, f"{name}_{bits}").dequantize()[0].astype(np.float64)
        levels = values.astype(np.float64)
        best = np.abs(levels[None] - x.T.astype(np.float64)).min(1)
        np.testing.assert_array_equal(np.abs(got - x[0].astype(np.float64)), best)


NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1,
]  # fmt: skip
NF4_CUTS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
FP4_CUTS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]


def test_four_bit_codebooks() -> None:
    np.testing.assert_array_equal(nb.Format("nf4").element.values, np.float32(NF4))
    x = np.linspace(-1, 1, 20001, dtype=np.float32)
    np.testing.assert_array_equal(
        nb.quantize(x[None], "nf4").codes()[0], np.searchsorted(np.float32(NF4_CUTS), x)
    )
    twelfths = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)
    np.testing.assert_array_equal(
        nb.Format("fp4_bnb").element.values, np.concatenate([twelfths, -twelfths])
    )
    order = np.argsort(twelfths)
    place = np.searchsorted(np.float32(FP4_CUTS), np.abs(x))
    # The published thresholds are rounded: not within that of one.
    clear = np.abs(np.abs(x)[:, None] - np.float32(FP4_CUTS)).min(1) > 1e-6
    got = nb.quantize(x[None], "fp4_bnb").codes()[0]
    np.testing.assert_array_equal((got & 7)[clear], order[place][clear])
    np.testing.assert_array_equal((got >> 3)[x != 0], np.signbit(x)[x != 0])
    af4 = nb.Format("af4").element.values
    assert af4[[0, 7, 15]].tolist() == [-1, 0, 1]
    np.testing.assert_allclose(af4[[1, 8, 14]], [-0.69441008, 0.04273164, 0.72424863], rtol=1e-7)


def test_nf3_is_made_of_quantiles() -> None:
    normal = statistics.NormalDist()
    d = (1 / 32 + 1 / 30) / 2
    low = [normal.inv_cdf(d + (0.5 - d) * i / 3) for i in range(4)]
    high = [normal.inv_cdf(0.5 + (0.5 - d) * i / 4) for i in range(1, 5)]
    want = np.array(low + high) / normal.inv_cdf(1 - d)
    np.testing.assert_allclose(nb.Format("nf3").element.values, want, rtol=2e-6, atol=1e-7)


def test_nvfp4_follows_its_rule(rng: np.random.Generator, tmp_path: Path) -> None:
    w = rng.standard_normal((9, 80)).astype(np.float32)
    w[3, 16:32] = 0
    w[4, :16] = 1e-6
    q = nb.quantize(w, "nvfp4")
    g = np.float32(np.abs(w).max() / np.float32(448 * 6))
    assert q.tensor_scale == g
    assert q.scales.dtype == ml_dtypes.float8_e4m3fn
    top = np.abs(w).reshape(9, 5, 16).max(2)
    want = (top / np.float32(6) / g).astype(ml_dtypes.float8_e4m3fn)
    want[3, 1] = 1  # a group of zeros
    want[4, 0] = 2.0**-9  # rounds to 0
    np.testing.assert_array_equal(q.scales, want)
    assert float(q.scales.max()) == 448
    full = (want.astype(np.float32) * g).repeat(16, 1)
    codes = np.clip(w / full, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(q.codes(), codes.view(np.uint8))
    np.testing.assert_array_equal(q.dequantize(), codes.astype(np.float32) * full)
    assert q.bits_per_weight == pytest.approx(4.5 + 32 / w.size)
    # The number of the tensor goes wherever the tensor goes.
    part = q[2:5]
    np.testing.assert_array_equal(part.dequantize(), q.dequantize()[2:5])
    other = nb.QTensor.from_parts("nvfp4", q.codes(), q.scales, tensor_scale=1.0)
    assert other != q
    np.testing.assert_array_equal(other.scales, q.scales)
    nb.save(tmp_path / "f", {"w": q, "t": q.T})
    assert nb.load(tmp_path / "f")["w"] == q
    assert pickle.loads(pickle.dumps(q)) == q
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="scale of the tensor"):
            nb.QTensor.from_parts("nvfp4", q.codes(), q.scales, tensor_scale=bad)
    with pytest.raises(ValueError, match="int4 has no tensor_scale"):
        nb.QTensor.from_parts("int4", q.codes() % 8, np.ones(9), tensor_scale=2.0)
    with pytest.raises(ValueError, match=r"\[0, 448\]"):
        nb.QTensor.from_parts("nvfp4", q.codes(), np.full((9, 5), 500.0))


PUBLISHED = {
    "nf4_g32_sf32": 0.00759, "nf4_g64_sf32": 0.00847, "nf4_g128_sf32": 0.00915,
    "int4_g32_sf32": 0.00944, "int4_g64_sf32": 0.01158, "int4_g128_sf32": 0.01383,
    "e2m1_g32_sf32": 0.01028, "e2m1_g64_sf32": 0.01119, "e2m1_g128_sf32": 0.01191,
    "fp4_bnb_g32_sf32": 0.01306, "fp4_bnb_g64_sf32": 0.01489, "fp4_bnb_g128_sf32": 0.01657,
    "mxfp4": 0.01326, "mxfp4_rceil": 0.01340, "mxfp4_ceil": 0.02077, "mxfp4_even": 0.01253,
    "mxint8": 6.8e-5, "nvfp4": 0.00907,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_errors_on_normal_numbers(name: str) -> None:
    w = np.random.default_rng(14).standard_normal((1024, 1024)).astype(np.float32)
    error = np.square(nb.quantize(w, name).dequantize() - w, dtype=np.float64).sum()
    assert error / np.square(w, dtype=np.float64).sum() == pytest.approx(PUBLISHED[name], rel=0.02)


def test_values_of_a_table_are_integers_where_products_are_exact(rng: np.random.Generator) -> None:
    x = rng.integers(-127, 128, (3, 64)).astype(np.int8)
    for e in ELEMENTS:
        if "int8" not in e.computes or e.zeros:
            continue
        q = nb.quantize(rng.standard_normal((5, 64)).astype(np.float32), e.name)
        y = nb.matmul(x, q.T, compute="int8").astype(np.float64)
        exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
        a = np.abs(x.astype(np.float64))
        size = a.sum(1)[:, None] * q.scales.astype(np.float64).max(1)
        bound = e.rounding * size + 1e-6 * (a @ np.abs(q.dequantize().astype(np.float64)).T)
        assert (np.abs(y - exact) <= bound).all(), e.name
        rounded = e.name in ("nf4", "nf3", "af4", "fp4_bnb") or e.name.startswith("lut")
        assert (e.rounding > 0) == rounded
        assert e.rounding <= 0.5 / 127 * 1.001


def test_tables_are_learned(rng: np.random.Generator, tmp_path: Path) -> None:
    w = rng.standard_normal((256, 512)).astype(np.float32)
    for bits, limit in ((2, 0.125), (3, 0.035), (4, 0.0088), (5, 0.0026), (6, 0.0006)):
        q = nb.quantize(w, f"lut{bits}_g64")
        table = q.parts["table"]
        assert table.shape == (2**bits,)
        assert (np.diff(table) > 0).all()
        error = np.square(q.dequantize() - w).sum() / np.square(w).sum()
        assert 0.6 * limit < error < limit, (bits, error)
        # Each value is the mean of what it stands for, weighted by the squares of the scales.
        scale = q.scales.astype(np.float64).repeat(64, 1)
        for u in range(2**bits):
            mine = q.codes() == u
            mean = (w * scale)[mine].sum() / np.square(scale)[mine].sum()
            assert table[u] == pytest.approx(mean, abs=6e-3 / 2**bits)
        # The nearest, a tie the lower one.
        near = np.abs((w / scale.astype(np.float32))[..., None] - table).argmin(-1)
        assert (q.codes() == near).mean() > 0.9999
    # A learned table beats the best one for normal weights in large groups where they are not.
    heavy = rng.standard_t(3, (256, 512)).astype(np.float32)
    errors = [
        float(np.square(nb.quantize(heavy, f).dequantize() - heavy).sum())
        for f in ("lut4_g64", "nf4_g64")
    ]
    assert errors[0] < 0.95 * errors[1]
    nb.save(tmp_path / "f", {"w": q})
    assert nb.load(tmp_path / "f")["w"] == q
    assert pickle.loads(pickle.dumps(q)) == q
    x = rng.standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_array_equal(x @ q[8:24].T, (x @ q.T)[:, 8:24])


def test_tables_follow_importance(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 256)).astype(np.float32)
    w[:, 200:] = np.abs(w[:, 200:]) ** 0.2
    h = np.ones(256)
    h[200:] = 1000
    plain, weighed = (nb.quantize(w, "lut3", importance=i) for i in (None, h))

    def error(q: nb.QTensor) -> float:
        return float((np.square(q.dequantize() - w) * h).sum())

    assert error(weighed) < 0.7 * error(plain)
    assert nb.quantize(w, "lut3", importance=np.ones(256)) == plain
    for bad, says in (
        (h[1:], "shape"),
        (-h, "importance -1"),
        (h * np.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            nb.quantize(w, "lut3", importance=bad)
    with pytest.raises(ValueError, match="no table"):
        nb.quantize(w, "nf4", importance=h)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_have_tables_of_their_own(bits: int, rng: np.random.Generator, tmp_path: Path) -> None:
    w = rng.standard_normal((21, 320)).astype(np.float32)
    w[::2] = np.sign(w[::2]) * np.abs(w[::2]) ** 0.1  # two heaps
    w[1] = 0
    name = f"lut{bits}_row_g64"
    q = nb.quantize(w, name)
    assert q.parts["table"].shape == (21, 2**bits)
    # Each row is what it would be as a matrix of its own.
    for n in range(21):
        alone = nb.quantize(w[n : n + 1], f"lut{bits}_g64")
        np.testing.assert_array_equal(q.parts["table"][n], alone.parts["table"])
        np.testing.assert_array_equal(q[n : n + 1].dequantize(), alone.dequantize())
        np.testing.assert_array_equal(q.codes()[n], alone.codes()[0])
    shared = nb.quantize(w, f"lut{bits}_g64")
    errors = [float(np.square(t.dequantize() - w).sum()) for t in (q, shared)]
    assert errors[0] < 0.9 * errors[1]
    assert q.bits_per_weight == pytest.approx(bits + 16 / 64 + 32 * 2**bits / 320)
    x = rng.standard_normal((70, 320)).astype(np.float32)
    for m in (1, 3, 70):
        np.testing.assert_allclose(x[:m] @ q.T, x[:m] @ q.dequantize().T, rtol=2e-4, atol=2e-4)
    # Tables go with their rows.
    np.testing.assert_array_equal(x @ q[3:20:5].T, (x @ q.T)[:, 3:20:5])
    np.testing.assert_array_equal(q[:, 64:192].dequantize(), q.dequantize()[:, 64:192])
    nb.save(tmp_path / "f", {"w": q})
    assert nb.load(tmp_path / "f")["w"] == q
    assert pickle.loads(pickle.dumps(q)) == q
    h = np.where(np.arange(320) < 100, 100.0, 1)
    weighed = nb.quantize(w, name, importance=h)
    cost = [float((np.square(t.dequantize() - w) * h).sum()) for t in (weighed, q)]
    assert cost[0] < cost[1]
    with pytest.raises(ValueError, match="table must have shape"):
        nb.QTensor.from_parts(name, q.codes(), q.scales, table=q.parts["table"][:20])
    assert nb.quantize(w[:, :0], name).dequantize().shape == (21, 0)
    assert nb.quantize(w[:0], name).dequantize().shape == (0, 320)
    with pytest.raises(ValueError, match="row 4"):
        nb.quantize(np.where(np.arange(21)[:, None] == 4, np.nan, w), name)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_of_other_quantisers_fit(bits: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**bits, (24, 256)).astype(np.uint8)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    # FLUTE: any float16 table of the tensor, a float16 scale for each group. NFL is the same with
    # learned scales.
    table = rng.standard_normal(2**bits).astype(np.float16)
    for group in (32, 64, 128, 256):
        scales = rng.uniform(0.5, 2, (24, 256 // group)).astype(np.float16)
        q = nb.QTensor.from_parts(f"lut{bits}_g{group}", codes, scales, table=table)
        want = table.astype(np.float32)[codes] * scales.astype(np.float32).repeat(group, 1)
        np.testing.assert_array_equal(q.dequantize(), want)
        np.testing.assert_allclose(x @ q.T, x @ want.T, rtol=1e-4, atol=1e-4)
    # eDKM: centroids of the weights themselves, in any order and of any size, and no scale.
    table = (3.7 * rng.permutation(np.linspace(-1, 1, 2**bits))).astype(np.float32)
    q = nb.QTensor.from_parts(f"lut{bits}", codes, np.ones(24, np.float32), table=table)
    np.testing.assert_array_equal(q.dequantize(), table[codes])
    y = nb.matmul(x, q.T, compute="int8")
    a = np.abs(x).max(1, keepdims=True) / 127
    far = 3.7 / 254 * np.abs(x).sum(1, keepdims=True) + a / 2 * np.abs(table[codes]).sum(1)
    assert (np.abs(y - x @ table[codes].T) <= 1.01 * far + 256 * a * 3.7 / 254).all()


def test_bad_tables_are_refused() -> None:
    codes, scales = np.zeros((2, 8), np.uint8), np.ones(2)
    good = np.linspace(-1, 1, 16)
    assert nb.QTensor.from_parts("lut4", codes, scales, table=good).dequantize()[0, 0] == -1
    # Equal values are legal: the first code of them is what encoding gives.
    twice = nb.QTensor.from_parts("lut4", codes + 5, scales, table=np.ones(16))
    assert (twice.dequantize() == 1).all()
    for bad in (good[:15], np.ones(17), np.append(good[:15], np.nan), np.append(good[:15], np.inf)):
        with pytest.raises(ValueError, match="table"):
            nb.QTensor.from_parts("lut4", codes, scales, table=bad)
    with pytest.raises(ValueError, match="no table"):
        nb.QTensor.from_parts("nf4", codes, scales, table=good)


def test_nested_scales(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 256)).astype(np.float32)
    for name in ("nf4", "lut4"):
        q, plain = nb.quantize(w, f"{name}_g64_se4m3"), nb.quantize(w, f"{name}_g64")
        assert q.tensor_scale == np.abs(w).max() / np.float32(448)
        assert float(q.scales.max()) == 448
        assert q.bits_per_weight == pytest.approx(plain.bits_per_weight - 0.125, abs=0.003)
        errors = [float(np.square(t.dequantize() - w).sum()) for t in (q, plain)]
        assert errors[0] < 1.06 * errors[1]
        x = rng.standard_normal((5, 256)).astype(np.float32)
        y = nb.matmul(x, q.T, compute="int8")
        np.testing.assert_allclose(y, x @ q.dequantize().T, atol=0.7, rtol=0)


def test_dynamic_fixed_point(rng: np.random.Generator) -> None:
    for bits in (8, 16):
        w = (rng.standard_normal((6, 40)) * 1e-3).astype(np.float32)
        w[4] = 0
        q = nb.quantize(w, f"dfp{bits}", method="mse")
        step = np.exp2(np.floor(np.log2(np.abs(w).max())) - (bits - 2))
        top = 2 ** (bits - 1) - 1
        np.testing.assert_array_equal(q.codes(), np.clip(np.rint(w / step), -top, top))
        np.testing.assert_array_equal(q.dequantize(), q.codes() * step)
        assert len(set(np.asarray(q.scales, np.float32).ravel())) == 1
        with pytest.raises(ValueError, match="one scale"):
            nb.QTensor.from_parts(q.format, q.codes(), [1, 1, 1, 2, 1, 1])
        assert (nb.quantize(np.zeros((3, 4), np.float32), q.format).dequantize() == 0).all()
        with pytest.raises(ValueError, match="not finite"):
            nb.quantize(np.where(w == w.max(), np.inf, w), q.format)


def lanes16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products of 16-bit integers as the core adds them: 16 lanes of pairs, spilled when unsafe."""
    k = -(-a.shape[1] // 32) * 32
    a, b = (np.pad(m.astype(np.int64), ((0, 0), (0, k - m.shape[1]))) for m in (a, b))
    chain = (2**31 - 1) // (np.abs(a).max() * np.abs(b).max())
    pairs = np.einsum("mij,nij->mnij", a.reshape(len(a), -1, 2), b.reshape(len(b), -1, 2)).sum(-1)
    steps = pairs.reshape(len(a), len(b), -1, 16)
    acc = np.zeros((len(a), len(b), 16), np.float32)
    for i in range(0, steps.shape[2], max(chain // 2, 1)):
        acc += steps[:, :, i : i + max(chain // 2, 1)].sum(2).astype(np.float32)
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half : 2 * half]
    return acc[..., 0]


@pytest.mark.parametrize("shrink", [1, 40, 5000])
def test_products_of_16_bits(rng: np.random.Generator, shrink: int) -> None:
    m, n, k = 9, 70, 333
    x, w, d = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (n, k), (m, n)))
    qx, qw, qd = (nb.quantize(a, "dfp16") for a in (x, w, d))
    if shrink > 1:
        # Small integers, whose chains are longer.
        qx = nb.QTensor.from_parts("dfp16", qx.codes() // shrink, qx.scales)
    # Forward, and both products of the way back.
    for a, b in ((qx, qw.T), (qd, qw), (qd.T, qx)):
        u, v = (q.codes().astype(np.int64) for q in (a, b))
        scale = np.float32(np.asarray(a.scales, np.float64).flat[0] * 2.0**-14)
        scale *= np.float32(np.asarray(b.scales, np.float64).flat[0] * 2.0**-14)
        got = a @ b
        np.testing.assert_array_equal(got, lanes16(u, v.T) * scale)
        exact = (u @ v) * float(scale)
        size = (np.abs(u) @ np.abs(v)) * float(scale)
        assert (np.abs(got - exact) <= 2.0**-20 * size).all()
        bias = rng.standard_normal(b.shape[1]).astype(np.float32)
        np.testing.assert_array_equal(nb.matmul(a, b, bias=bias), got + bias)
        for threads in (1, 3):
            np.testing.assert_array_equal(nb.matmul(a, b, threads=threads), got)
    # The same three with floats on one side, of any type.
    for dtype in (np.float32, np.float16):
        for a, b, q in (
            (x, qw.dequantize().T, qw.T),
            (d, qw.dequantize(), qw),
            (d.T, qx.dequantize(), qx),
        ):
            a = a.astype(dtype)
            got = a @ q
            assert got.dtype == dtype
            want = a.astype(np.float64) @ b.astype(np.float64)
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    np.testing.assert_array_equal(qw.T.dequantize(), qw.dequantize().T)
    with pytest.raises(ValueError, match="integers of a byte"):
        nb.matmul(qx, qw.T, dtype=np.int64)


def test_products_of_float16(rng: np.random.Generator) -> None:
    # Learning in reduced precision: forward, and both products of the way back.
    m, n, k = 9, 70, 333
    x, w, d = (rng.standard_normal(s).astype(np.float16) for s in ((m, k), (n, k), (m, n)))
    qx, qw, qd = (nb.quantize(a, "f16") for a in (x, w, d))
    for a, b, u, v in ((qx, qw.T, x, w.T), (qd, qw, d, w), (qd.T, qx, d.T, x)):
        exact = u.astype(np.float64) @ v.astype(np.float64)
        size = np.abs(u).astype(np.float64) @ np.abs(v).astype(np.float64)
        # One side as it is, or both as matrices: sums are float32 either way, and rounded once.
        sums = [nb.matmul(u, b, dtype=np.float32), a @ b]
        for got in sums:
            assert got.dtype == np.float32
            assert (np.abs(got - exact) <= u.shape[1] * 2.0**-24 * size).all()
        assert (u @ b).dtype == np.float16
        np.testing.assert_array_equal(u @ b, sums[0].astype(np.float16))
    # Sums of float16 would stop at 2048.
    ones = nb.quantize(np.ones((1, 5000), np.float16), "f16")
    assert (ones @ ones.T).tolist() == [[5000]]
    assert (ones.dequantize().astype(np.float16) @ ones.T).tolist() == [[5000]]


def test_sums_of_the_lowest_code_do_not_overflow() -> None:
    q = nb.QTensor.from_parts("dfp16", np.full((2, 64), -32768, np.int16), [1.0, 1.0])
    assert ((q @ q.T) == 64 * 4.0).all()


def trellis_states(codes: np.ndarray, bits: int) -> np.ndarray:
    """The last 16 bits of a circle of codes, up to each."""
    flat = (codes[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    circle = np.resize(flat.ravel(), flat.size * (2 + 16 // flat.size))
    circle = np.concatenate([flat.ravel()] * (1 + -(-16 // flat.size)) + [flat.ravel()])
    start = len(circle) - flat.size
    ends = start + bits * (1 + np.arange(len(codes)))
    windows = circle[ends[:, None] - 16 + np.arange(16)]
    return windows @ (1 << np.arange(15, -1, -1))


HYB = Path(__file__).resolve().parent.parent / "rust/core/src/trellis/hyb.rs"


@functools.cache
def hyb_table() -> np.ndarray:
    """The pairs of the hybrid code, float32 of shape (512, 2), as the source spells them."""
    words = re.findall(r"0x([0-9A-F]{4})_([0-9A-F]{4}),", HYB.read_text())
    bits = np.array([(int(low, 16) << 16, int(high, 16) << 16) for high, low in words], np.uint32)
    return bits.view(np.float32)


def hybrid(codes: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of the hybrid code: a state is worth two."""
    two = np.append(codes, 0)[: len(codes) + len(codes) % 2].reshape(-1, 2)
    x = trellis_states(two[:, 0] << bits | two[:, 1], 2 * bits)
    h = (x * x + x) % 2**32
    pairs = hyb_table()[h >> 6 & 511]
    pairs[:, 0] *= np.where(h >> 15 & 1, np.float32(-1), np.float32(1))
    return pairs.ravel()[: len(codes)]


def test_the_pairs_of_the_hybrid_code_are_centres() -> None:
    table = hyb_table()
    assert table.shape == (512, 2)
    made = runpy.run_path(str(HYB.with_suffix(".py")))
    x = made["points"](1 << 15)
    near = np.argmin((table**2).sum(1) - 2 * x @ table.T, axis=1)
    means = np.array([x[near == i].mean(axis=0) for i in range(512)])
    spread = np.sqrt(np.square(x - table[near]).sum(1).mean())
    # Cells far out hold few of these points.
    assert np.median(np.hypot(*(means - table).T)) < 0.05 * spread
    assert 0.0022 < spread**2 / 2 < 0.0025
    # Every entry belongs to 128 states.
    h = np.arange(1 << 16, dtype=np.int64)
    assert (np.bincount(h * (h + 1) >> 6 & 511, minlength=512) == 128).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("trellis")])
def test_trellis_codes_decode_by_their_hash(name: str, rng: np.random.Generator) -> None:
    f = nb.Format(name)
    for k, group in ((300, 256), (40, 40), (7, 7)):
        codes = rng.integers(0, 2**f.bits, (3, k)).astype(np.uint8)
        scales = np.exp2(rng.integers(-4, 4, (3, -(-k // 256)))).astype(np.float32)
        q = nb.QTensor.from_parts(f, codes, scales)
        for n in range(3):
            for g in range(0, k, group):
                own = codes[n, g : g + group].astype(np.int64)
                if name.endswith("hyb"):
                    numbers = hybrid(own, f.bits)
                    want = numbers * scales[n, g // 256]
                    np.testing.assert_array_equal(q.dequantize()[n, g : g + group], want)
                    continue
                x = trellis_states(own, f.bits)
                if name.endswith("3inst"):
                    y = (x * 89226354 + 64248484) % 2**32
                    z = ((y & 0x8FFF8FFF) ^ 0x3B603B60).astype(np.uint32)
                    halves = z.view(np.uint16).reshape(-1, 2).view(np.float16)
                    numbers = (halves[:, 0] + halves[:, 1]).astype(np.float32)
                else:
                    one_mad = name.endswith("1mad")
                    y = (x * 34038481 + 76625530 if one_mad else x * 0x83DCD12D) % 2**32
                    parts = y.astype(np.uint32).view(np.uint8).reshape(-1, 4)
                    numbers = parts.astype(np.int32).sum(1).astype(np.float32) - 510
                want = numbers * scales[n, g // 256]
                np.testing.assert_array_equal(q.dequantize()[n, g : g + group], want)
        x8 = rng.integers(-127, 128, (6, k)).astype(np.int8)
        if "int8" in f.computes:
            y8 = nb.matmul(x8, q.T, compute="int8")
            np.testing.assert_allclose(
                y8,
                x8.astype(np.float64) @ q.dequantize().T.astype(np.float64),
                rtol=1e-6,
                atol=1e-3,
            )


def all_states(name: str) -> np.ndarray:
    """The numbers of all 65536 states: the last weight of a circle of 16 bits has all of them."""
    bits = nb.Format(name).bits
    digits = np.arange(16 - bits, -1, -bits)
    codes = (np.arange(1 << 16)[:, None] >> digits & (2**bits - 1)).astype(np.uint8)
    q = nb.QTensor.from_parts(name, codes, np.ones(1 << 16, np.float32))
    last: np.ndarray = q.dequantize()[:, -1]
    return last


def test_trellis_codes_are_the_published_ones(rng: np.random.Generator) -> None:
    # QTIP: 1MAD is divided by this and has variance 1 then, 3INST is what it is.
    one_mad = all_states("trellis2_1mad") / 147.800537109375
    assert one_mad.std() == pytest.approx(1, abs=1e-3)
    assert len(np.unique(one_mad)) == 908
    assert (one_mad.min(), one_mad.max()) == pytest.approx((-3.27, 3.17), abs=5e-3)
    three = all_states("trellis2_3inst")
    assert three.std() == pytest.approx(1.2437, abs=1e-4)
    assert np.abs(three).max() == pytest.approx(3.97, abs=5e-3)
    # EXL3 scales mul1 in float16, which moves the centre by a quarter.
    mul1 = all_states("trellis4")
    sums = np.arange(1021) - 510
    factor, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
    half = (0x6400 + sums + 510).astype(np.uint16).view(np.float16).astype(np.float64)
    theirs = (half * factor + shift).astype(np.float16).astype(np.float64)
    assert np.abs(theirs - factor * sums).max() < 0.3 * factor + 2.0**-10
    assert (mul1 == np.rint(mul1)).all()
    assert np.abs(mul1).max() <= 510
    assert (mul1 * factor).std() == pytest.approx(1, abs=3e-3)
    # One string of bits in the order of QTIP, where a state begins with its weight, and of EXL3,
    # where it ends with it: the same circle, turned by what a state has more than a weight.
    for bits in (2, 4):
        string = rng.integers(0, 2, 256 * bits)
        start = bits * np.arange(256)[:, None] + np.arange(16)
        begins = np.take(string, start, mode="wrap") @ (1 << np.arange(15, -1, -1))
        codes = string.reshape(256, bits) @ (1 << np.arange(bits - 1, -1, -1))
        name = f"trellis{bits}"
        q = nb.QTensor.from_parts(name, codes[None].astype(np.uint8), np.ones((1, 1), np.float32))
        turned = np.roll(q.dequantize()[0], 1 - 16 // bits)
        np.testing.assert_array_equal(turned, all_states(name)[begins])


def test_trellis_codes_are_good(rng: np.random.Generator) -> None:
    w = rng.standard_normal((12, 1024)).astype(np.float32)
    square = np.square(w).sum()
    for name, limit in (
        ("trellis1", 0.285),
        ("trellis2", 0.070),
        ("trellis2_1mad", 0.071),
        ("trellis2_3inst", 0.071),
        ("trellis3", 0.018),
        ("trellis4", 0.0046),
        ("trellis6", 0.00034),
        ("trellis2_hyb", 0.071),
        ("trellis3_hyb", 0.019),
        ("trellis4_hyb", 0.0065),
    ):
        q = nb.quantize(w, name)
        error = np.square(q.dequantize() - w).sum() / square
        assert 0.7 * limit < error < limit, (name, error)
        assert q.bits_per_weight == q.format.bits + 16 / 256
    # Rotated outliers are normal weights again.
    w[:, ::64] *= 20
    turned = nb.quantize(nb.hadamard(w), "trellis2")
    plain = nb.quantize(w, "trellis2")
    errors = [
        np.square(turned.dequantize() - nb.hadamard(w)).sum(),
        np.square(plain.dequantize() - w).sum(),
    ]
    assert errors[0] < 0.5 * errors[1]
    with pytest.raises(ValueError, match="at most 256"):
        nb.Format("trellis2_g512")
    w[3, 5] = np.nan
    with pytest.raises(ValueError, match="row 3, column 5"):
        nb.quantize(w, "trellis2")
