"""The measuring itself: what is packed, timed, judged and written."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import race
import report
from harness import Lane, copies_for, interleave, relative_error, rotating, verify
from peers import OURS, PEERS, Peer, make, random_weights
from peers.base import from_bfloat16_bits, pack_low_first, to_bfloat16_bits
from rows import ROWS, Goal


class Exact(Peer):
    """A contender that knows the answer, and can be told to spoil it or to be slow."""

    name = "exact"

    def __init__(self, delay: float = 0.0, spoil: float = 0.0):
        self.delay, self.spoil, self.calls = delay, spoil, []

    def missing(self):
        return ""

    def prepare(self, w, copies, threads):
        self.w, self.copies = w, copies

    def feed(self, x):
        self.x = x

    def run(self, copy=0):
        self.calls.append(copy)
        time.sleep(self.delay)

    def result(self):
        return self.w.product(self.x) * (1 + self.spoil)

    def weight_bytes(self):
        return self.w.codes.nbytes


@pytest.fixture
def case():
    w = random_weights("int", 4, 48, 64, 32)
    return w, np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)


@pytest.mark.parametrize(
    ("element", "bits"), [("int", 2), ("int", 8), ("ternary", 2), ("bipolar", 1)]
)
def test_random_weights_use_every_code_and_scales_exact_in_float16(element, bits):
    w = random_weights(element, bits, 256, 128, 32)
    top = 2 ** (bits - 1) - 1
    codes = {"int": range(-top, top + 1), "ternary": (-1, 0, 1), "bipolar": (-1, 1)}[element]
    assert set(np.unique(w.codes)) == set(codes)
    np.testing.assert_array_equal(w.scales, w.scales.astype(np.float16))
    assert w.group == 32
    np.testing.assert_array_equal(w.dense[:, 32:64], w.codes[:, 32:64] * w.scales[:, 1:2])


def test_product_follows_its_argument(case):
    w, x = case
    assert w.product(x) is w.product(x)
    np.testing.assert_array_equal(w.product(2 * x), 2 * w.product(x))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pack_low_first_puts_the_first_code_in_the_lowest_bits(bits):
    codes = np.arange(32).reshape(2, 16) % 2**bits
    packed = pack_low_first(codes, bits)
    per_byte = 8 // bits
    for i in range(16):
        byte = packed[:, i // per_byte] >> (bits * (i % per_byte))
        np.testing.assert_array_equal(byte & (2**bits - 1), codes[:, i])


def test_bfloat16_rounds_to_even():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    x[:4] = np.float32([1.00390625, 1.01171875, -0.0, 3e38])
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(from_bfloat16_bits(to_bfloat16_bits(x)), want)


def test_verify_accepts_the_answer_and_refuses_another(case):
    w, x = case
    for spoil, good in ((0.0, True), (1e-3, False), (np.nan, False)):
        peer = Exact(spoil=spoil)
        peer.prepare(w, 2, 1)
        peer.feed(x)
        if good:
            assert verify(peer, x, w, 2) == 0
            assert set(peer.calls) == {0, 1}
        else:
            with pytest.raises(AssertionError, match="relative error"):
                verify(peer, x, w)


def test_rotation_visits_every_copy_and_cold_copies_exceed_the_caches(case):
    peer = Exact()
    peer.prepare(case[0], 3, 1)
    call = rotating(peer, 3)
    for _ in range(6):
        call()
    assert peer.calls == [1, 2, 0, 1, 2, 0]
    assert copies_for(8 << 20, cold=True) * (8 << 20) >= 512 << 20
    assert copies_for(8 << 20, cold=False) == 1


def test_interleave_alternates_and_sees_the_slower_one(case):
    lanes = []
    for delay in (0.0005, 0.002):
        peer = Exact(delay)
        peer.prepare(case[0], 1, 1)
        lanes.append(Lane(peer, rotating(peer, 1)))
    interleave(lanes, fewest=3, most=5, burst=1e-4, pause=0.0, budget=0.0)
    assert [len(lane.seconds) for lane in lanes] == [3, 3]
    assert lanes[1].median() > 1.5 * lanes[0].median() > 0
    goal = Goal("slow", ("fast",), reach=0.1, aim=5.0)
    named = {"fast": lanes[0], "slow": lanes[1]}
    judged = race.judge(goal, 1, named, {"slow": 1.0}, 1.0)
    assert judged["verdict"] == "reach"
    assert race.judge(Goal("slow", ("fast",), 0.9, 5.0), 1, named, {}, 1.0)["verdict"] == "missed"
    assert race.judge(Goal("fast", ("slow",), 0.9, 1.1), 1, named, {}, 1.0)["verdict"] == "aim"
    assert race.judge(Goal("absent", ("slow",), 1, 1), 1, named, {}, 1.0) is None
    assert race.judge(Goal("fast", ("slow",), 1, 1, ms=(4,)), 1, named, {}, 1.0) is None


def test_rows_name_contenders_that_exist():
    assert len({row.id for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert set(row.ours()) <= set(OURS)
        assert set(row.peers()) <= set(PEERS)
        assert any(goal.like for goal in row.goals)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_gives_the_product(name):
    """A small product of each installed peer, with the first weights that it takes."""
    peer = make(name)
    if peer.missing():
        pytest.skip(peer.missing())
    drawn = [
        ("int", 4, 128),
        ("int", 4, 0),
        ("int", 8, 0),
        ("int", 2, 32),
        ("int", 3, 32),
        ("int", 6, 32),
        ("ternary", 2, 32),
        ("bipolar", 1, 0),
    ]
    w = next(
        w for w in (random_weights(e, b, 128, 256, g) for e, b, g in drawn) if not peer.accepts(w)
    )
    if "auto-round" in name:
        pytest.skip("the race starts it in a process of its own thread count")
    peer.within(peer.prepare, w, 2, 1)
    try:
        for m in (1, 3, 17):
            x = np.random.default_rng(m).standard_normal((m, 256), dtype=np.float32)
            peer.within(peer.feed, x)
            assert peer.within(verify, peer, x, w, 2) <= peer.tolerance
    finally:
        peer.within(peer.close)


def test_relative_error_is_a_ratio_of_norms():
    want = np.array([[3.0, 4.0]])
    assert relative_error(want, want) == 0
    assert relative_error(np.array([[3.0, 4.5]]), want) == pytest.approx(0.1)


def test_report_writes_what_was_measured(tmp_path):
    def entry(name, median):
        return {
            "name": name, "seconds": {"median": median, "p10": median, "p90": median},
            "spread": 0.0, "rounds": 15, "gops": 2 / median, "weight_bytes": 8,
            "gb_per_s": 1.5, "copies": 1, "relative_error": 0.0, "bits": 4, "group": 128,
            "activation": "int8 per row", "skips": "",
        }  # fmt: skip

    cases = [
        {
            "row": "int4_g128", "title": "int4_g128, compute int8", "m": m, "n": 4096, "k": 4096,
            "cold": False, "contenders": [entry("nibblas int8", 0.5), entry("other", 1.0)],
            "goals": [
                {
                    "ours": "nibblas int8", "best": "other", "like": True, "reach": 3.0, "aim": 4.0,
                    "ratio": {"median": 2.0, "p10": 1.9, "p90": 2.1}, "verdict": "missed",
                }
            ],
        }
        for m in (16, 64)
    ]  # fmt: skip
    result = {
        "machine": {"cores": 2, "python": "3.11"}, "versions": {"numpy": "2"}, "quick": False,
        "started": "now",
        "runs": [
            {
                "threads": 1, "bandwidth": {"hot": 3e10, "cold": 1.5e10}, "cases": cases,
                "skipped": {"torch": "not here"}, "wrong": ["a wrong one"],
            }
        ],
    }  # fmt: skip
    path = tmp_path / "race.json"
    path.write_text(json.dumps(result))
    written = report.write(result, path)
    assert all(file.exists() for file in written)
    text = path.with_suffix(".md").read_text()
    line = next(line for line in text.splitlines() if "2.00x (1.90 to 2.10)" in line)
    assert "nibblas int8 *" in line
    assert "**missed**" in line
    for part in ("torch: not here", "a wrong one", "30.0 GB/s", "15.0 GB/s"):
        assert part in text
