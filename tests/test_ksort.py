"""Orders of channels: products stay, blocks get better."""

from __future__ import annotations

import numpy as np
import pytest

import nibblas as nb
from nibblas.quantizers import ChannelOrder, MixedLinear, cluster, ksort

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


def loud(rng: np.random.Generator, rows: int, cols: int, count: int) -> np.ndarray:
    """Activations of which some channels are forty times as large."""
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x[:, rng.choice(cols, count, replace=False)] *= 40
    return x


def test_blocks_have_the_format_of_their_tag(rng: np.random.Generator) -> None:
    w = rng.standard_normal((30, 500)).astype(np.float32)
    x = loud(rng, 9, 500, 20)
    order = cluster(x, block=64)
    bias = rng.standard_normal(30).astype(np.float32)
    layer = MixedLinear(w, order, bias=bias)
    assert [(str(p.format), p.shape[1]) for p in layer.parts] == [
        ("int8_g128", 64),
        ("int4_g128", 436),
    ]
    assert layer.nbytes == sum(p.nbytes for p in layer.parts) + 1000
    # Each channel is worth what quantising its own run makes of it.
    want = np.empty_like(w)
    for part, index in zip(layer.parts, np.split(order.index, [64]), strict=True):
        assert part == nb.quantize(w[:, index], part.format)
        want[:, index] = part.dequantize()
    np.testing.assert_array_equal(layer.dequantize(), want)
    exact = x.astype(np.float64) @ want.T + bias
    size = np.abs(x).astype(np.float64) @ np.abs(want).T + np.abs(bias)
    assert (np.abs(layer(x) - exact) <= 1e-6 * size).all()
    np.testing.assert_allclose(layer(x, compute="bf16"), exact, atol=0.01 * size.max())
    np.testing.assert_array_equal(layer(x.reshape(3, 3, 500)), layer(x).reshape(3, 3, 30))
    np.testing.assert_array_equal(layer(x[0]), layer(x[:1])[0])
    assert layer(x.astype(np.float16)).dtype == np.float16
    assert layer(np.ones((2, 500), int)).dtype == np.float32
    assert layer(x, dtype=np.float64).dtype == np.float64


def test_outliers_spoil_only_one_another(rng: np.random.Generator) -> None:
    w = rng.standard_normal((64, 512)).astype(np.float32)
    x = loud(rng, 32, 512, 12)
    exact = x.astype(np.float64) @ w.astype(np.float64).T

    def error(y: np.ndarray) -> float:
        return float(np.square(y - exact).sum() / np.square(exact).sum())

    plain = error(nb.matmul(x, nb.quantize(w, "int4_g128").T, compute="int8"))
    layer = MixedLinear(w, cluster(x, block=64))
    assert error(layer(x, compute="int8")) < 0.2 * plain
    # Codes of the activations too have a scale for each run: the quiet ones keep theirs.
    order = cluster(x, block=64)
    wide = MixedLinear(w, order, {"int8": "int8_g128", "int4": "int8_g128"})
    whole = nb.matmul(x, nb.quantize(w, "int8_g128").T, compute="int8")
    assert error(wide(x, compute="int8")) < 0.5 * error(whole)


def test_important_channels_have_a_codebook_of_their_own(rng: np.random.Generator) -> None:
    # Outlier columns of vector quantisation (VPTQ): few columns carry most of the error.
    w = rng.standard_normal((64, 512)).astype(np.float32)
    h = np.ones(512)
    h[rng.choice(512, 48, replace=False)] = 100
    order = cluster(np.sqrt(h)[None], block=64)
    formats = {"int8": "vq4", "int4": "vq2"}
    layer = MixedLinear(w, order, formats, importance=h)
    assert [p.format.element.name for p in layer.parts] == ["vq4", "vq2"]

    def error(decoded: np.ndarray) -> float:
        return float((np.square(decoded - w) * h).sum() / (np.square(w) * h).sum())

    # An eighth of the channels has twice the bits.
    assert error(layer.dequantize()) < 0.8 * error(nb.quantize(w, "vq2", importance=h).dequantize())
    x = rng.standard_normal((3, 512)).astype(np.float32)
    np.testing.assert_allclose(layer(x), x @ layer.dequantize().T, atol=1e-3)


def test_mixed_layers_of_odd_shapes(rng: np.random.Generator) -> None:
    w = rng.standard_normal((3, 70)).astype(np.float32)
    tags = ("int8", "int4", "int4", "int8", "int8")
    layer = MixedLinear(w, ChannelOrder(rng.permutation(70), tags, 16))
    assert [p.shape for p in layer.parts] == [(3, 16), (3, 32), (3, 22)]
    x = rng.standard_normal((2, 70)).astype(np.float32)
    np.testing.assert_allclose(layer(x), x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
    assert layer(x[:0]).shape == (0, 3)
    none = MixedLinear(np.zeros((3, 0)), ChannelOrder(np.arange(0), (), 16), bias=[1, 2, 3])
    assert none(np.zeros((2, 0))).tolist() == [[1, 2, 3]] * 2
    order = ChannelOrder(np.arange(70), tags, 16)
    for bad, says in [
        (lambda: MixedLinear(w[:, 1:], order), "order of 70"),
        (lambda: MixedLinear(w, ChannelOrder(np.arange(70), tags[1:], 16)), "4 tags"),
        (lambda: MixedLinear(w, order, {"int8": "int8"}), "'int4'"),
        (lambda: MixedLinear(w, order, bias=np.ones(4)), "bias"),
        (lambda: MixedLinear(w, order, importance=np.ones(4)), "importance"),
        (lambda: MixedLinear(w, order, {"int8": "int8", "int4": "nonesuch"}), "nonesuch"),
        (lambda: layer(x[:, 1:]), "expected an input"),
        (lambda: layer(np.float32(1)), "expected an input"),
        (
            lambda: MixedLinear(w, order, {"int8": "e4m3", "int4": "int4"})(x, compute="int8"),
            "e4m3",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            bad()
