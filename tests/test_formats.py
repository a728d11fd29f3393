"""The table, the names, and every code of every format."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import nibblas as nb

ELEMENTS = nb.formats.table()
NAMES = [e.name for e in ELEMENTS]


def test_the_table_holds_what_it_should() -> None:
    want = {f"int{b}" for b in range(2, 9)} | {f"uint{b}" for b in range(2, 9)}
    want |= {f"bipolar{b}" for b in range(1, 9)} | {"ternary"}
    assert want <= set(NAMES)
    assert len(NAMES) == len(set(NAMES))
    for e in ELEMENTS:
        assert e.levels <= 2**e.bits
        assert {"f32", "int8"} <= set(e.computes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", ["", "_g8", "_g32", "_g128", "_g100"])
@pytest.mark.parametrize("scale", ["", "_sf32", "_sf16", "_sbf16"])
def test_names_round_trip(name: str, group: str, scale: str) -> None:
    f = nb.Format(name + group + scale)
    assert nb.Format(str(f)) == f == str(f)
    assert nb.Format(f) is f
    assert f.element.name == name
    assert f.bits == f.element.bits
    assert f.group == (int(group[2:]) if group else None)
    assert f.scale == (scale[2:] or ("f16" if group else "f32"))
    default = "_sf16" if group else "_sf32"
    assert str(f) == name + group + ("" if scale == default else scale)
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


@pytest.mark.parametrize("e", ELEMENTS, ids=NAMES)
@pytest.mark.parametrize("suffix", ["", "_g8", "_g24_sf32", "_g16_sbf16"])
def test_every_code_round_trips(e: nb.formats.Element, suffix: str) -> None:
    values = legal_values(e)
    rng = np.random.default_rng(5)
    for k in (len(values), len(values) + 1, 3 * len(values) + 5):
        codes = np.resize(values, (4, k))
        codes = rng.permuted(codes, axis=1)
        f = nb.Format(e.name + suffix)
        groups = f.groups(k)
        scales = np.exp2(rng.integers(-6, 6, (4, groups))).astype(np.float32)
        zeros = rng.integers(0, e.levels, (4, groups)) if e.zeros else None
        q = nb.QTensor.from_parts(f, codes, scales, zeros)
        np.testing.assert_array_equal(q.codes(), codes)
        assert q.codes().dtype == (
            np.uint8 if e.minimum >= 0 else np.int8 if e.maximum <= 127 else np.int16
        )
        length = f.group or k
        wide = np.repeat(scales, length, 1)[:, :k]
        shift = 0 if zeros is None else np.repeat(zeros, length, 1)[:, :k]
        np.testing.assert_array_equal(q.dequantize(), (codes - shift) * wide)
        assert nb.QTensor.from_parts(f, q.codes(), q.scales, q.zeros) == q


IDEMPOTENT = [
    n for n in NAMES if n.startswith("int") or (n.startswith("bipolar") and n != "bipolar1")
]


@pytest.mark.parametrize("name", IDEMPOTENT)
@pytest.mark.parametrize("suffix", ["", "_g16", "_g16_sf32", "_g16_sbf16"])
def test_quantize_is_idempotent(name: str, suffix: str, rng: np.random.Generator) -> None:
    # Small weights would have subnormal float16 scales, of few bits.
    for scale in (1, 1e3) if nb.Format(name + suffix).scale == "f16" else (1, 1e-3, 1e3):
        w = (rng.standard_normal((8, 64)) * scale).astype(np.float32)
        q = nb.quantize(w, name + suffix)
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
        if name.startswith("bipolar"):  # no code is worth 0: the smallest scale comes nearest
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
