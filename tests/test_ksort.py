"""Orders of channels: products stay, blocks get better."""

from __future__ import annotations

import numpy as np
import pytest

import nibblas as nb
from nibblas.quantizers import cluster, ksort

HEADS, SHARE, WIDTH, WIDE = 3, 2, 64, 48


def projections(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keys with a few loud channels in each head, and queries of twice as many heads."""
    k = rng.standard_normal((HEADS * WIDTH, WIDE))
    k[rng.choice(HEADS * WIDTH, 12, replace=False)] *= 20
    return k, rng.standard_normal((HEADS * SHARE * WIDTH, WIDE))


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rope: str | None) -> np.ndarray:
    """Rotary embedding of heads (..., heads, width); angles (heads or 1, width / 2)."""
    if rope is None:
        return x
    half = x.shape[-1] // 2
    a, b = (x[..., :half], x[..., half:]) if rope == "half" else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, a * sin + b * cos
    if rope == "half":
        return np.concatenate(turned, -1)
    return np.stack(turned, -1).reshape(x.shape)


@pytest.mark.parametrize("rope", [None, "half", "interleaved"])
def test_products_of_keys_and_queries_stay(rope: str | None, rng: np.random.Generator) -> None:
    wk, wq = projections(rng)
    bias = rng.standard_normal(len(wk))
    angle = rng.uniform(0, 6, (5, 1, WIDTH // 2))  # one for each place
    x = rng.standard_normal((5, WIDE))
    order = ksort(wk, heads=HEADS, block=16, rope=rope)
    assert (order.index != np.arange(WIDTH)).any()

    def logits(
        wk: np.ndarray, bias: np.ndarray, wq: np.ndarray, cos: np.ndarray, sin: np.ndarray
    ) -> np.ndarray:
        k = turn((x @ wk.T + bias).reshape(5, HEADS, WIDTH), cos, sin, rope)
        q = (x @ wq.T).reshape(5, HEADS, SHARE, WIDTH)
        q = np.stack([turn(q[:, :, i], cos, sin, rope) for i in range(SHARE)], 2)
        return np.einsum("ihsd,jhd->hsij", q, k)

    cos, sin = np.cos(angle), np.sin(angle)
    want = logits(wk, bias, wq, cos, sin)
    moved = (
        [cos, sin]
        if rope is None
        else [order.angles(t)[:, :, 0].swapaxes(0, 1) for t in (cos, sin)]
    )
    got = logits(order.keys(wk), order.keys(bias), order.queries(wq), *moved)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-9 * np.abs(want).max())
    if rope is not None:
        plain = logits(order.keys(wk), order.keys(bias), order.queries(wq), cos, sin)
        assert np.abs(plain - want).max() > 1  # the angles matter
        with pytest.raises(ValueError, match="entries"):
            order.angles(cos[..., 1:])
    # Keys themselves, which stand in columns.
    np.testing.assert_array_equal(order.keys((x @ wk.T), axis=1), x @ order.keys(wk).T)


def peaks(w: np.ndarray, block: int) -> float:
    norms = np.square(w).sum(1).reshape(-1, block)
    return float(norms.max(1).sum())


@pytest.mark.parametrize("rope", [None, "half", "interleaved"])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_are_never_worse(block: int, rope: str | None) -> None:
    better = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        wk, _ = projections(rng)
        moved = ksort(wk, heads=HEADS, block=block, rope=rope).keys(wk)
        assert peaks(moved, block) <= peaks(wk, block)
        better += peaks(moved, block) < peaks(wk, block)
        assert sorted(moved[:, 0]) == sorted(wk[:, 0])
    # A block that is the whole head has nothing to gain, nor has one that is a half of all pairs.
    whole = block == WIDTH or (block == WIDTH // 2 and rope == "half")
    assert better == (0 if whole else 40)


def test_quantised_keys_get_better(rng: np.random.Generator) -> None:
    wk, _ = projections(rng)
    x = rng.standard_normal((400, WIDE))
    order = ksort(wk, heads=HEADS, block=32)

    def error(keys: np.ndarray) -> float:
        # Heads are whole numbers of blocks, so that blocks of a row are blocks of a head.
        q = nb.quantize(keys.astype(np.float32), "bfp4_g32")
        return float((np.square(q.dequantize() - keys).sum(0) / np.square(keys).sum(0)).mean())

    # Loud channels keep their error; those that are no longer beside one lose most of theirs.
    assert error(x @ order.keys(wk).T) < 0.75 * error(x @ wk.T)


def test_outlier_channels_gather_in_few_blocks(rng: np.random.Generator) -> None:
    x = rng.standard_normal((64, 1000))
    loud = rng.choice(1000, 30, replace=False)
    x[:, loud] *= 40
    order = cluster(x, block=64)
    assert order.tags == ("int8",) + ("int4",) * 15
    assert set(loud) <= set(order.index[:64])
    assert sorted(order.index) == list(range(1000))
    w = rng.standard_normal((7, 1000))
    np.testing.assert_allclose(order.apply(x) @ order.apply(w).T, x @ w.T, rtol=1e-9, atol=1e-8)
    np.testing.assert_array_equal(order.undo(order.apply(x)), x)
    # Quiet activations need no wide block, and the limit holds.
    assert set(cluster(rng.standard_normal((64, 256)), block=64).tags) == {"int4"}
    x[:, :300] *= 1000
    assert cluster(x, block=64, limit=0.2).tags.count("int8") == 3


def test_bad_orders_are_refused() -> None:
    good = np.ones((8, 4))
    for bad, kind in [
        (lambda: ksort(good, heads=3), "3 heads"),
        (lambda: ksort(good[0]), "channels"),
        (lambda: ksort(good, heads=0), "heads"),
        (lambda: ksort(good, rope="full"), "rope"),
        (lambda: ksort(good[:6], heads=2, rope="half"), "odd"),
        (lambda: ksort(good * np.nan), "finite"),
        (lambda: ksort(good).angles(np.ones(4)), "without rotary"),
        (lambda: ksort(good).keys(np.ones(7)), "do not fit"),
        (lambda: ksort(good).queries(np.ones(12)), "not a multiple"),
        (lambda: cluster(np.ones((3, 0))), "shape"),
        (lambda: cluster(np.float64(3)), "shape"),
        (lambda: cluster([[1, np.inf]]), "finite"),
    ]:
        with pytest.raises(ValueError, match=kind):
            bad()
