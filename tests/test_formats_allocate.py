"""Bits for layers: the published vectors of HAWQ's integer program, and every choice tried."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from nibblas.quantizers import allocate

# 19 layers of ResNet18 as HAWQ's notebook has them, the first and the last left out. Mean traces of
# the Hessian; squared errors of 8 and of 4 bits; weights; operations; milliseconds of 4 and 8 bits.
TRACE = """0.06857826 0.03162379 0.03298575 0.01205663 0.02222431 0.00596336 0.06931772 0.00807129
0.00372905 0.00530698 0.00209011 0.00737569 0.00210454 0.00151197 0.00158041 0.00078146 0.00451841
0.00098745 0.00072944"""
WRONG8 = """0.0235 0.0125 0.0102 0.0082 0.0145 0.0344 0.0023 0.0287 0.0148 0.0333 0.0682 0.0027
0.0448 0.0336 0.0576 0.1130 0.0102 0.0947 0.0532"""
WRONG4 = """6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 0.6827 9.0942 4.8857 10.7599 21.7546 0.8603
14.5324 10.9651 18.7706 36.4044 3.1572 29.6994 17.4016"""
WEIGHTS = """36864 36864 36864 36864 73728 147456 8192 147456 147456 294912 589824 32768 589824
589824 1179648 2359296 131072 2359296 2359296"""
MACS = """115605504 115605504 115605504 115605504 57802752 115605504 6422528 115605504 115605504
57802752 115605504 6422528 115605504 115605504 57802752 115605504 6422528 115605504 115605504"""
MS4 = """0.21094404 0.21092674 0.21104113 0.21086851 0.13642465 0.19167506 0.02532183 0.19148203
0.19142914 0.11395316 0.20556011 0.01917474 0.20566918 0.20566509 0.13185102 0.22287786 0.01790088
0.22304611 0.22286099"""
MS8 = """0.36189111 0.36211718 0.31141909 0.30454471 0.19184896 0.38948934 0.0334169 0.38904905
0.3892859 0.19134735 0.34307431 0.02802354 0.34313329 0.34310756 0.21117103 0.37376585 0.02896843
0.37398187 0.37405185"""
TIED = [(4, 6), (9, 11), (14, 16)]


def numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


@pytest.mark.parametrize(
    ("cost4", "cost8", "bits", "objective", "cost", "limit"),
    [
        (
            numbers(WEIGHTS) / 2**21,
            numbers(WEIGHTS) / 2**20,
            "8888888888888884844",
            -1.233207,
            7.2656,
            7.9805,
        ),
        (
            numbers(MACS) / 64e6,
            numbers(MACS) / 16e6,
            "8884888848884444444",
            -1.092024,
            65.0281,
            66.2323,
        ),
        (numbers(MS4), numbers(MS8), "8888848848884484844", -1.105039, 4.2201, 4.2462),
    ],
    ids=["size", "operations", "latency"],
)
def test_hawq_vectors(
    cost4: np.ndarray, cost8: np.ndarray, bits: str, objective: float, cost: float, limit: float
) -> None:
    gain = numbers(TRACE) * (numbers(WRONG8) - numbers(WRONG4))
    losses, costs = np.stack([0 * gain, gain], 1), np.stack([cost4, cost8], 1)
    budget = (cost4.sum() + cost8.sum()) / 2
    assert budget == pytest.approx(limit, abs=5e-5)
    picked = allocate(losses, costs, budget, tied=TIED)
    assert "".join("48"[i] for i in picked) == bits
    rows = np.arange(19)
    assert losses[rows, picked].sum() == pytest.approx(objective, abs=5e-7)
    assert costs[rows, picked].sum() == pytest.approx(cost, abs=5e-5)


def test_no_choice_within_the_budget_is_better(rng: np.random.Generator) -> None:
    refused = 0
    for trial in range(200):
        layers, choices = rng.integers(1, 6), rng.integers(1, 4)
        losses = rng.standard_normal((layers, choices)).round(1)
        losses[rng.random(losses.shape) < 0.15] = np.inf
        costs = rng.standard_normal((layers, choices)).round(1) + trial % 2
        tied = [(0, layers - 1)] if trial % 3 == 0 else []
        budget = float(costs.mean(axis=1).sum() + rng.standard_normal())
        rows, best = np.arange(layers), np.inf
        for pick in itertools.product(range(choices), repeat=int(layers)):
            p = np.array(pick)
            if (not tied or p[0] == p[-1]) and costs[rows, p].sum() <= budget + 1e-9:
                best = min(best, losses[rows, p].sum())
        if np.isinf(best):
            refused += 1
            with pytest.raises(ValueError, match="the budget is"):
                allocate(losses, costs, budget, tied=tied)
            continue
        got = allocate(losses, costs, budget, tied=tied)
        assert losses[rows, got].sum() == pytest.approx(best)
        assert costs[rows, got].sum() <= budget + 1e-9
        assert not tied or got[0] == got[-1]
    assert 5 < refused < 150


def test_many_layers_take_little_time(rng: np.random.Generator) -> None:
    size = rng.lognormal(size=(300, 1))
    bits = np.array([2.0, 3.0, 4.0, 6.0, 8.0])
    losses = rng.lognormal(sigma=2, size=(300, 1)) * size * 4.0**-bits
    began = time.process_time()
    picked = allocate(losses, size * bits, 3.7 * float(size.sum()))
    assert time.process_time() - began < 20
    assert (size[:, 0] * bits[picked]).sum() <= 3.7 * size.sum() * (1 + 1e-9)
    assert len(set(picked.tolist())) == 5


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\)"):
        allocate(np.ones((2, 2)), np.ones((2, 3)), 5)
    with pytest.raises(ValueError, match="same shape"):
        allocate(np.ones((2, 0)), np.ones((2, 0)), 5)
    with pytest.raises(ValueError, match="losses must be numbers"):
        allocate([[np.nan]], [[1.0]], 5)
    with pytest.raises(ValueError, match="finite"):
        allocate([[1.0]], [[np.inf]], 5)
    with pytest.raises(ValueError, match="NaN"):
        allocate([[1.0]], [[1.0]], np.nan)
    with pytest.raises(ValueError, match="cost 2, the budget is 1"):
        allocate([[1.0]], [[2.0]], 1)
    with pytest.raises(IndexError, match=r"\[0, 1\] of 1 layers"):
        allocate([[1.0]], [[2.0]], 5, tied=[(0, 1)])
    assert allocate([[2.0, 1.0]], [[1.0, 9.0]], np.inf).tolist() == [1]
    assert allocate(np.ones((0, 2)), np.ones((0, 2)), 0).shape == (0,)
