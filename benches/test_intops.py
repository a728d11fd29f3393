"""The race of integer operators and of products without multipliers: small, once."""

from __future__ import annotations

import json
import time

import intops
import numpy as np


def test_emulations_equal_the_products() -> None:
    """Which `products` asserts, bit for bit, before anything is timed."""
    assert len(intops.products(3, 70, 256)) == 3


def test_every_case_gives_its_type() -> None:
    x = np.random.default_rng(0).integers(-20000, 20000, (4, 64))
    for case in intops.cases(64):
        codes, scale = case.call(x.astype(case.input))
        assert codes.dtype == case.output
        assert codes.shape == x.shape
        assert scale > 0


def test_turns_compare_medians() -> None:
    found = intops.turns({"slow": lambda: time.sleep(0.02), "fast": int}, 3, time.perf_counter)
    assert found["slow"] > 10 * found["fast"]


def test_command(tmp_path, capsys, monkeypatch) -> None:
    row = {"name": "f", "threads": 1, "ms": 2.0, "theirs_ms": 1.0, "ratio": 0.5, "goal": 1.0}
    monkeypatch.setattr(intops, "race_operators", lambda *_: [row])
    monkeypatch.setattr(intops, "race_products", lambda *_: [])
    file = tmp_path / "figures.json"
    assert intops.main(["--threads", "1", "--out", str(file)]) == 0
    assert intops.main(["--threads", "1", "--check"]) == 1
    assert "| f | 2 | 1 | 0.50x |" in capsys.readouterr().out
    assert json.loads(file.read_text())["operators"] == [row]
