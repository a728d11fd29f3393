"""A BERT sentence encoder in NumPy whose every linear product is a parameter.

``x -> x @ w.T + b`` appears 24 times in the six-layer model (query, key and
value as one product) and holds nearly all of its arithmetic. `Encoder` builds
each of them with a function of the caller, so that the same encoder runs on
float32 matrices and on quantised ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

Array = np.ndarray
Linear = Callable[[Array], Array]
MakeLinear = Callable[[str, Array, Array], Linear]


def numpy_linear(name: str, weight: Array, bias: Array) -> Linear:
    """``x @ weight.T + bias`` in float32; the name is not needed."""

    def apply(x: Array) -> Array:
        # One large product: over a stack NumPy makes many small ones, five times slower.
        y = x.reshape(-1, x.shape[-1]) @ weight.T
        y += bias
        return y.reshape(*x.shape[:-1], -1)

    return apply


class Encoder:
    """BERT with mean pooling and L2 normalisation.

    Parameters
    ----------
    config : mapping
        The model's ``config.json``.
    weights : mapping of str to ndarray
        Float32 tensors under their checkpoint names.
    make_linear : callable
        Given a name, a weight ``(out, in)`` and a bias, returns the product.

    Raises
    ------
    ValueError
        If the configuration asks for another architecture than this one.
    """

    def __init__(
        self, config: Mapping, weights: Mapping[str, Array], make_linear: MakeLinear = numpy_linear
    ) -> None:
        for name, needed in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if config.get(name) != needed:
                raise ValueError(
                    f"config.json: {name} is {config.get(name)!r}, expected {needed!r}"
                )
        self.heads = int(config["num_attention_heads"])
        self.eps = float(config["layer_norm_eps"])
        self.words = weights["embeddings.word_embeddings.weight"]
        # Every sentence is segment 0, so its vector joins the positions.
        self.positions = (
            weights["embeddings.position_embeddings.weight"]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self.norm = _pair(weights, "embeddings.LayerNorm")
        self.layers = []
        for i in range(int(config["num_hidden_layers"])):
            at = f"encoder.layer.{i}"
            heads = [_pair(weights, f"{at}.attention.self.{n}") for n in ("query", "key", "value")]
            qkv = [np.concatenate(parts) for parts in zip(*heads, strict=True)]
            mixing, up, down = (
                _pair(weights, f"{at}.{n}.dense")
                for n in ("attention.output", "intermediate", "output")
            )
            self.layers.append(
                {
                    "qkv": make_linear(f"{i}.qkv", *qkv),
                    "mixing": make_linear(f"{i}.mixing", *mixing),
                    "norm1": _pair(weights, f"{at}.attention.output.LayerNorm"),
                    "up": make_linear(f"{i}.up", *up),
                    "down": make_linear(f"{i}.down", *down),
                    "norm2": _pair(weights, f"{at}.output.LayerNorm"),
                }
            )

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Unit vectors of a padded batch.

        Parameters
        ----------
        ids : (B, L) int array
            Token ids.
        mask : (B, L) bool array
            True where there is a token, False where there is padding.

        Returns
        -------
        (B, hidden) float32 array
        """
        batch, length = ids.shape
        x = self.words[ids] + self.positions[:length]
        x = layer_norm(x, *self.norm, self.eps)
        # Added to the scores, so that padding gets no attention.
        hide = np.where(mask, np.float32(0), np.float32(-1e9))[:, None, None, :]
        for layer in self.layers:
            qkv = layer["qkv"](x).reshape(batch, length, 3, self.heads, -1)
            q, k, v = qkv.transpose(2, 0, 3, 1, 4)
            scores = q @ k.swapaxes(-1, -2)
            scores *= np.float32(1 / math.sqrt(q.shape[-1]))
            scores += hide
            mixed = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, -1)
            x = layer_norm(x + layer["mixing"](mixed), *layer["norm1"], self.eps)
            x = layer_norm(x + layer["down"](gelu(layer["up"](x))), *layer["norm2"], self.eps)
        keep = mask[:, :, None].astype(np.float32)
        pooled = (x * keep).sum(axis=1) / keep.sum(axis=1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def encode(self, tokens: Sequence[Sequence[int]], *, batch: int = 16, pad: int = 0) -> Array:
        """Unit vectors of token sequences, in their order."""
        out = np.empty((len(tokens), self.words.shape[1]), np.float32)
        for chosen, ids, mask in padded_batches(tokens, batch, pad):
            out[chosen] = self(ids, mask)
        return out


def padded_batches(
    tokens: Sequence[Sequence[int]], batch: int, pad: int
) -> Iterator[tuple[list[int], Array, Array]]:
    """Yield the places, the ids and the mask of batches of at most ``batch`` sequences.

    Sequences of like length share a batch: less padding is multiplied.
    """
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        length = len(tokens[chosen[-1]])
        ids = np.full((len(chosen), length), pad, np.intp)
        mask = np.zeros((len(chosen), length), bool)
        for row, i in enumerate(chosen):
            ids[row, : len(tokens[i])] = tokens[i]
            mask[row, : len(tokens[i])] = True
        yield chosen, ids, mask


def read_config(folder: str | Path, name: str) -> dict:
    """One JSON file of a model folder."""
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def layer_norm(x: Array, gain: Array, shift: Array, eps: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift; reuses ``x``."""
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    x *= 1 / np.sqrt(variance + np.float32(eps))
    x *= gain
    x += shift
    return x


def softmax(x: Array) -> Array:
    """Softmax over the last axis; reuses ``x``."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


# Abramowitz and Stegun, Handbook of Mathematical Functions, formula 7.1.26:
# erf(z) = 1 - (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), z >= 0, |error| <= 1.5e-7.
ERF_P = 0.3275911
ERF_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def erf(x: Array) -> Array:
    """Error function of a float array, within 1.5e-7 and the rounding of its type."""
    z = np.abs(x)
    t = 1 / (1 + x.dtype.type(ERF_P) * z)
    y = t * x.dtype.type(ERF_A[-1])
    for a in ERF_A[-2::-1]:
        y += x.dtype.type(a)
        y *= t
    z *= z
    np.negative(z, out=z)
    np.exp(z, out=z)
    y *= z
    np.subtract(1, y, out=y)
    return np.copysign(y, x, out=y)


def gelu(x: Array) -> Array:
    """``x / 2 * (1 + erf(x / sqrt(2)))``, the exact form of GELU; overwrites ``x``."""
    flat = x.reshape(-1)
    # Pieces that stay in the cache through all the passes of `erf`.
    for start in range(0, flat.size, 16384):
        part = flat[start : start + 16384]
        gate = erf(part * np.float32(math.sqrt(0.5)))
        gate += 1
        gate *= np.float32(0.5)
        part *= gate
    return flat.reshape(x.shape)


def _pair(weights: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
