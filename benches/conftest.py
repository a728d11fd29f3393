"""Fixtures of the benchmarks: `pytest benches --benchmark-only`."""

from __future__ import annotations

import os
from functools import partial

# Both would make NumPy's BLAS another one than its users have.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)
os.environ.setdefault("KMP_BLOCKTIME", "1")
# The peers run on one thread here, and some read their number of threads only while they load.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
from harness import copies_for, rotating, verify  # noqa: E402
from peers import Peer, Weights, random_weights  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", type=int, default=4096, help="rows and columns of the weights (default 4096)"
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--size"))


class Stage:
    """Keeps the last prepared contender, so that neighbouring benchmarks share its weights."""

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.weights_key: tuple[object, ...] = ()
        self.peer: Peer | None = None

    def weights(self, *key: object) -> Weights:
        if self.weights_key != key:
            self.drawn = random_weights(*key)  # type: ignore[arg-type]
            self.weights_key = key
        return self.drawn

    def set(self, peer: Peer, w: Weights, cold: bool, threads: int) -> tuple[Peer, int]:
        key = (peer.name, w.element, w.bits, w.group, w.n, w.k, cold, threads)
        if self.key != key:
            self.clear()
            self.copies = 1
            peer.within(peer.prepare, w, 1, threads)
            if cold:
                self.copies = copies_for(peer.weight_bytes(), cold)
                peer.within(peer.close)
                peer.within(peer.prepare, w, self.copies, threads)
            self.key, self.peer = key, peer
        assert self.peer is not None
        return self.peer, self.copies

    def clear(self) -> None:
        if self.peer is not None:
            self.peer.within(self.peer.close)
        self.key, self.peer = (), None


@pytest.fixture(scope="session")
def stage():
    made = Stage()
    yield made
    made.clear()


@pytest.fixture
def time_product(benchmark, stage, size):
    """Checks one contender against float64, then times it."""

    def run(peer: Peer, weights: tuple[str, int, int], m: int, *, cold: bool, threads: int) -> None:
        import numpy as np

        reason = peer.missing()
        if reason:
            pytest.skip(reason)
        element, bits, group = weights
        w = stage.weights(element, bits, size, size, group)
        reason = peer.accepts(w)
        if reason:
            pytest.skip(f"{peer.name} {reason}")
        peer, copies = stage.set(peer, w, cold, threads)
        x = np.random.default_rng(m).standard_normal((m, w.k), dtype=np.float32)
        peer.within(peer.feed, x)
        error = peer.within(verify, peer, x, w, copies)
        benchmark.extra_info.update(
            contender=peer.name,
            m=m,
            n=w.n,
            k=w.k,
            threads=threads,
            cold=cold,
            gop=2e-9 * m * w.n * w.k,
            weight_bytes=peer.weight_bytes(),
            relative_error=error,
            activation=peer.activation,
            skips=peer.skips,
        )
        rounds = max(7, min(2 * copies, 60))
        call = partial(peer.within, rotating(peer, copies))
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return run
