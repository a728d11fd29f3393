"""info, explain, and the report of the self-test."""

from __future__ import annotations

import json

import numpy as np
import pytest

import nibblas as nb
from nibblas import testing


def test_info() -> None:
    info = nb.info()
    assert json.loads(json.dumps(info)) == info
    assert info["nibblas"] == nb.__version__
    assert info["numpy"] == np.__version__
    levels = info["isa"]["levels"]
    assert list(levels) == ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"]
    assert levels["scalar"]["available"]
    for level in levels.values():
        assert level["available"] == (level["reason"] is None)
    assert levels[info["isa"]["active"]]["available"]
    assert info["amx"]["available"] == levels["amx"]["available"]
    assert info["threads"]["num_threads"] == nb.get_num_threads()
    assert info["cuda"]["available"] is False
    assert info["cuda"]["reason"]


def test_explain() -> None:
    q = nb.quantize(testing.values((96, 256), 1), "int4_g32")
    for x in (np.ones(256), np.ones((7, 256)), np.ones((3, 5, 256)), [[1] * 256]):
        for compute in q.format.computes:
            plan = nb.explain(x, q.T, compute=compute, threads=2)
            fields = plan.fields()
            assert fields["compute"] == compute
            assert fields["isa"] == nb.info()["isa"]["active"]
            assert int(fields["m"]) == np.asarray(x).size // 256
            assert (fields["n"], fields["k"]) == ("96", "256")
            assert fields["kernel"] in str(plan)
            assert 0 < float(fields["floor_us"]) <= float(fields["predicted_us"])
            m = int(fields["m"])
            assert int(fields["operations"]) == 2 * m * 96 * 256
            assert int(fields["bytes"]) == int(fields["weight_bytes"]) + 4 * m * (96 + 256)
    few = nb.prune(testing.values((96, 256), 1), "unstructured", 0.125)
    for fmt, share in (("f32", 1), ("f32_bitmap", 0.125), ("int8_bitmap", 1)):
        fields = nb.explain(np.ones((40, 256)), nb.quantize(few, fmt).T).fields()
        assert int(fields["operations"]) == 2 * 40 * 96 * 256 * share
        assert 0 < float(fields["floor_us"]) <= float(fields["predicted_us"])
    left = nb.explain(q, np.ones((2, 256, 9)))
    assert left.fields()["m"] == "18"
    assert nb.explain(q, np.ones(256)).fields()["m"] == "1"
    other = nb.quantize(testing.values((5, 256), 2), "int8")
    assert nb.explain(other, q.T).fields()["m"] == "5"
    with pytest.raises(ValueError, match="mismatch"):
        nb.explain(np.ones(255), q.T)
    with pytest.raises(ValueError, match="dimensions"):
        nb.explain(1.0, q.T)


def test_the_bounds_are_not_idle() -> None:
    """Each bound holds, and a result twice as wrong as it allows is told apart."""
    x, q = testing.values((5, 128), 1), nb.quantize(testing.values((9, 128), 2), "int4_g32")
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    for compute in ("f32", "bf16", "int8"):
        bound = testing.matmul_bound(x, q, compute)
        error = np.abs(nb.matmul(x, q.T, compute=compute) - exact)
        assert (error <= bound).all()
        assert (bound < np.abs(x) @ np.abs(q.dequantize()).T).all()
    with pytest.raises(ValueError, match="int8_g32"):
        testing.matmul_bound(x, q, "int8_g32")


def test_report() -> None:
    good = testing.Report({"scalar": "a" * 64, "avx2": "a" * 64}, 10)
    assert good
    assert good.hash == "a" * 64
    assert "passed" in str(good)
    assert good.as_dict()["ok"] is True
    assert not testing.Report({"scalar": "a", "avx2": "b"}, 10)
    bad = testing.Report({"scalar": "a"}, 10, [f"line {i}" for i in range(30)])
    assert not bad
    assert "line 19" in str(bad)
    assert "10 more" in str(bad)
    assert "FAILED" in str(bad)


def test_corpus_covers_every_format() -> None:
    cases = list(testing.cases())
    assert len({c.name for c in cases}) == len(cases)
    assert {c.weight.format.element.name for c in cases} == {e.name for e in nb.formats.table()}
    assert len([c for c in cases if c.compute != "bf16"]) >= 500
