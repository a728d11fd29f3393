"""Counts, bytes, floors and energy, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import nibblas as nb
from nibblas import cost
from nibblas.cli import main

MACHINE = cost.Machine(2039e9, {"int8": 624e12, "bf16": 312e12, "f32": 19.5e12})


def test_bytes_count_scales_and_zeros() -> None:
    parts = cost.weight_bytes(4096, 4096, "uint4_g128")
    assert parts == {"weights": 4096 * 2048, "scales": 4096 * 32 * 2, "zeros": 4096 * 32}
    for fmt in ("int4_g128", "uint4_g64", "int8", "ternary", "mxfp4", "bipolar3_g40", "int4_sbf16"):
        q = nb.quantize(np.ones((5, 300), np.float32), fmt)
        assert sum(cost.weight_bytes(5, 300, fmt).values()) == q.nbytes, fmt
    assert cost.weight_bytes(3, 5, None) == {"weights": 30}


def test_roofline() -> None:
    r = cost.roofline(1, 4096, 4096, "uint4_g128", machine=MACHINE)
    assert r.operations == 2 * 4096**2
    assert sum(r.bytes.values()) == 4096 * (2048 + 64 + 32) + 4096 + 4096 * 4
    assert r.bound == "memory"
    assert r.floor_seconds == pytest.approx(sum(r.bytes.values()) / 2039e9)
    assert r.achieved is None
    large = cost.roofline(4096, 4096, 4096, "int8", machine=MACHINE, seconds=1e-3)
    assert large.bound == "compute"
    assert large.floor_seconds == pytest.approx(2 * 4096**3 / 624e12)
    assert large.achieved == pytest.approx(large.floor_seconds / 1e-3)
    empty = cost.roofline(0, 4, 0, "int8", machine=MACHINE)
    assert empty.operations == empty.intensity == 0
    with pytest.raises(ValueError, match="no peak for compute='fp8'"):
        cost.roofline(1, 1, 1, "int8", compute="fp8", machine=MACHINE)
    with pytest.raises(ValueError, match="must not be negative"):
        cost.roofline(-1, 1, 1, "int8", machine=MACHINE)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="seconds must be positive and finite"):
            cost.roofline(1, 1, 1, "int8", machine=MACHINE, seconds=bad)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="digits must be finite and not negative"):
            cost.product(1, 1, 1, "w4a8_mixpe", digits=bad)


def test_products() -> None:
    m, n, k, groups = 3, 64, 256, 2
    macs, ends = m * n * k, m * n * groups
    assert cost.product(m, n, k, "fp16").operations == {"fp16_mul": macs, "fp32_add": macs}
    assert cost.product(m, n, k, "w4a8").operations == {
        "int8_mul": macs,
        "int32_add": macs,
        "fp32_mul": ends,
        "fp32_add": ends,
    }
    # Dequantising first multiplies each weight once more; after the group, each end of a group.
    first = cost.product(m, n, k, "w4a16").operations
    assert first["fp16_mul"] == macs + n * k
    mixpe = cost.product(m, n, k, "w4a8_mixpe").operations
    assert mixpe["int16_add"] == 2 * macs
    assert mixpe["shift"] == 4 * ends
    assert mixpe["fp32_mul"] == ends
    assert not any(kind.endswith("mul") and "int" in kind for kind in mixpe)
    assert cost.product(m, n, k, "w4a8_mixpe", digits=1.5).operations["int16_add"] == 1.5 * macs
    lmul = cost.product(m, n, k, "lmul").operations
    assert lmul == {"int16_add": 2 * macs, "fp32_add": macs}
    assert cost.product(m, n, k, "binary").operations["bit"] == macs
    shift = {"shift": macs, "int32_add": macs, "fp32_mul": ends, "fp32_add": ends}
    assert cost.product(m, n, k, "shift").operations == shift
    add = {"int16_add": macs, "fp32_mul": m * n, "fp32_add": m * n}
    assert cost.product(m, n, k, "matadd").operations == add
    zero = cost.product(m, n, k, "w4a8", format="uint4_g128")
    assert zero.operations["int32_mul"] == ends
    assert zero.bytes["zeros"] == n * groups
    with pytest.raises(ValueError, match="unknown scheme 'fp8'"):
        cost.product(1, 1, 1, "fp8")


def test_energy_is_counts_times_the_table() -> None:
    c = cost.product(2, 8, 16, "fp16")
    for name, table in cost.ENERGY.items():
        e = cost.energy(c, name)
        assert e["fp16_mul"] == 2 * 8 * 16 * table.operations["fp16_mul"]
        assert e["memory"] == pytest.approx(c.nbytes * table.dram)
        assert table.source
    assert cost.ENERGY["45nm"].operations["fp32_mul"] == 3.7
    assert cost.ENERGY["45nm"].operations["fp32_add"] == 0.9
    with pytest.raises(ValueError, match="unknown table '3nm'"):
        cost.energy(c, "3nm")
    with pytest.raises(ValueError, match="has no moon"):
        cost.energy(cost.Cost({"moon": 1.0}, {}))


def test_every_figure_has_a_source() -> None:
    for name, table in cost.ENERGY.items():
        assert set(table.sources) == {*table.operations, "sram", "dram"}
        published = {kind for kind, source in table.sources.items() if source == table.source}
        estimates = {kind for kind, source in table.sources.items() if "an estimate" in source}
        assert {"int8_mul", "fp32_add", "fp16_mul", "dram"} <= published
        # As the text of each estimate says.
        o = table.operations
        assert o["int16_add"] == o["int32_add"] / 2
        assert o["bit"] == o["int8_add"] / 8
        assert estimates == {"int16_add", "bit"} | ({"shift"} if name == "7nm" else set())
    older, newer = (cost.ENERGY[name].operations for name in ("45nm", "7nm"))
    ratio = newer["int32_add"] / older["int32_add"]
    assert newer["shift"] == pytest.approx(older["shift"] * ratio)
    assert "table 1" in cost.ENERGY["45nm"].sources["shift"]
    # Counted kinds are table entries, one for one.
    for scheme in cost.SCHEMES:
        assert set(cost.layer(scheme).operations) <= set(older)


def test_every_scheme_has_energies_and_the_order_that_papers_claim() -> None:
    for table in cost.ENERGY:
        spent = {}
        for name in cost.SCHEMES:
            e = cost.energy(cost.layer(name, tokens=8), table)
            spent[name] = sum(v for kind, v in e.items() if kind != "memory")
        assert spent["w4a8_mixpe"] < spent["w8a8"] < spent["fp16"]
        assert spent["lmul"] < spent["fp16"]
        assert spent["ternary"] < spent["w8a8"]
        assert spent["w4a16_mixpe"] < spent["w4a16"]
        assert spent["matadd"] < spent["shift"] < spent["w4a8"] < spent["fp16"]


def test_tables_give_what_papers_claim() -> None:
    """L-Mul's 95 % of an element-wise product; EcoFormer's 3.7 and 0.9 pJ."""
    table = cost.ENERGY["45nm"].operations
    # Two integer additions, of the bit patterns and of the offset, for a product of float32.
    assert 1 - 2 * table["int32_add"] / table["fp32_mul"] == pytest.approx(0.95, abs=0.005)
    product, dot = cost.product(1, 1, 4096, "lmul"), cost.product(1, 1, 4096, "fp16")
    assert set(product.operations) == {"int16_add", "fp32_add"}
    assert set(dot.operations) == {"fp16_mul", "fp32_add"}
    assert (table["fp32_mul"], table["fp32_add"]) == (3.7, 0.9)
    # What is published of both processes: operations became cheaper by 2 to 5 times.
    newer = cost.ENERGY["7nm"].operations
    assert set(newer) == set(table)
    assert all(2 < table[kind] / newer[kind] < 5 for kind in table)


def test_a_layer_is_its_parts() -> None:
    c = cost.layer("w8a8", hidden=64, ffn=96, heads=4, kv_heads=2, tokens=3, context=10)
    linear = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64
    assert c.operations["int8_mul"] == 3 * linear + 2 * 3 * 10 * 4 * 16
    assert c.bytes["weights"] == linear
    assert c.bytes["kv"] == 2 * 10 * 2 * 16
    assert cost.layer("binary", tokens=1).bytes["kv"] < cost.layer("fp16", tokens=1).bytes["kv"]
    with pytest.raises(ValueError, match="multiple of heads"):
        cost.layer("fp16", hidden=10, heads=4)
    with pytest.raises(ValueError, match="expected fp16, int8 or binary"):
        cost.attention(1, 1, 1, 1, "fp4")


def test_shift_add_counts_are_those_of_the_codes() -> None:
    codes = np.array([[-8, 7, 0, 1], [0, 0, -1, 3]])
    q = nb.QTensor.from_parts("int4", codes, np.ones(2))
    # Stored with 8 added: 0, 15, 8, 9 and 8, 8, 7, 11.
    ones = 0 + 4 + 1 + 2 + 1 + 1 + 3 + 3
    c = cost.shift_add_counts(5, q)
    assert c["adds"] == 5 * ones + 5 * 2 * 4 + 5 * 4
    assert c["shifts"] == 5 * 2 * 4
    assert c["multiplies"] == c["dequantisations"] == 5 * 2
    first = cost.shift_add_counts(5, q, order="first")
    assert first["dequantisations"] == 8
    assert first["multiplies"] == 5 * 8 + 8
    grouped = nb.quantize(np.ones((4, 256), np.float32), "uint4_g64")
    assert cost.shift_add_counts(1, grouped)["multiplies"] == 2 * 4 * 4
    signs = nb.quantize(np.array([[1.0, -1.0, 1.0]], np.float32), "bipolar1")
    assert cost.shift_add_counts(1, signs)["adds"] == 2 + 1 + 3
    with pytest.raises(ValueError, match="no binary digits"):
        cost.shift_add_counts(1, nb.quantize(np.ones((4, 64), np.float32), "nf4"))


def test_measure() -> None:
    found = cost.measure(seconds=0.01, size=64)
    assert found.bandwidth > 1e6
    assert set(found.peaks) == {"f32", "bf16", "int8"}
    assert all(p > 1e6 for p in found.peaks.values())
    with pytest.raises(ValueError, match="must be positive"):
        cost.measure(seconds=0)


def test_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    w = np.ones((32, 64), np.float32)
    nb.save(path, {"a": w, "b": nb.quantize(w, "int8"), "bias": w[0]})
    given = ["--bandwidth", "10", "--peak", "100"]
    assert main(["report", str(path), "--format", "int4_g32", *given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in report["matrices"]] == ["a", "b"]
    assert [r["format"] for r in report["matrices"]] == ["int4_g32", "int8"]
    want = [
        cost.roofline(1, 32, 64, f, machine=cost.Machine(1e10, {"int8": 1e11}))
        for f in ("int4_g32", "int8")
    ]
    assert [r["floor_seconds"] for r in report["matrices"]] == [w.floor_seconds for w in want]
    assert report["floor_seconds"] == pytest.approx(sum(w.floor_seconds for w in want))
    spent = [
        cost.energy(cost.product(1, 32, 64, "w4a8", format=f), "45nm") for f in ("int4_g32", "int8")
    ]
    assert [r["energy_pj"] for r in report["matrices"]] == spent
    assert report["memory_uj"] == pytest.approx(sum(e["memory"] for e in spent) / 1e6)
    assert report["table"]["sources"]["int8_mul"].startswith("M. Horowitz")
    assert main(["report", str(path), *given, "--energy", "7nm"]) == 0
    text = capsys.readouterr().out
    assert "2 matrices, M=1" in text
    assert "energy at 7nm: arithmetic" in text
    nb.save(path, {"bias": w[0]})
    assert main(["report", str(path), *given]) == 1
    assert "no matrix to report on" in capsys.readouterr().err


def test_report_of_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layer"]
    assert [r["scheme"] for r in rows] == list(cost.SCHEMES)
    e = cost.energy(cost.layer("lmul"))
    row = next(r for r in rows if r["scheme"] == "lmul")
    assert row["energy_pj"] == e
    assert main(["report"]) == 0
    assert "int16_add, 0.05 pJ: an estimate" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    picture = tmp_path / "layer.png"
    assert main(["report", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 1000
