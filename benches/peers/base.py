"""What every contender of the race looks like, and the matrix they are all fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Weights:
    """One quantised matrix in the plainest form there is: codes and scales.

    Every contender packs the same codes, so that all of them do the same product.
    The scales are exact in float16, because some contenders store them so.
    """

    element: str  # "int", "ternary" or "bipolar"
    bits: int
    codes: np.ndarray  # int8 (N, K)
    scales: np.ndarray  # float32 (N, K / group)

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        return int(self.codes.shape[1])

    @property
    def group(self) -> int:
        return self.k // int(self.scales.shape[1])

    @property
    def per_row(self) -> bool:
        return self.scales.shape[1] == 1

    @cached_property
    def dense(self) -> np.ndarray:
        """The decoded matrix in float32."""
        grouped = self.codes.reshape(self.n, -1, self.group).astype(np.float32)
        return (grouped * self.scales[:, :, None]).reshape(self.n, self.k)

    def product(self, x: np.ndarray) -> np.ndarray:
        """`x @ dense.T` in float64; that of the last `x` is kept, since all contenders ask."""
        if self._last.get("x") is not x:
            exact = x.astype(np.float64) @ self.dense.astype(np.float64).T
            self._last.update(x=x, exact=exact)
        return self._last["exact"]

    @cached_property
    def _last(self) -> dict[str, np.ndarray]:
        return {}


def random_weights(
    element: str, bits: int, n: int, k: int, group: int = 0, seed: int = 0
) -> Weights:
    """Uniform codes of `element` with one scale per `group` values (0: per row)."""
    rng = np.random.default_rng(seed)
    if element == "int":
        top = 2 ** (bits - 1) - 1
        codes = rng.integers(-top, top + 1, (n, k), dtype=np.int8)
    elif element == "ternary":
        codes = rng.integers(-1, 2, (n, k), dtype=np.int8)
    elif element == "bipolar":
        codes = (2 * rng.integers(0, 2**bits, (n, k), dtype=np.int16) - (2**bits - 1)).astype(
            np.int8
        )
    else:
        raise ValueError(f"no such element: {element}")
    spread = float(np.sqrt(np.mean(np.square(codes[: min(n, 256)], dtype=np.float32))))
    shape = (n, k // group if group else 1)
    scales = rng.uniform(0.75, 1.25, shape) / (spread * np.sqrt(k))
    return Weights(element, bits, codes, scales.astype(np.float16).astype(np.float32))


class Peer(ABC):
    """One way to compute `x @ w.T`.

    The life of a contender: `prepare` once per matrix, `feed` once per batch, then `run` is
    what the clock sees. Whatever the interface lets a user do once is done in the first two.
    """

    name: str
    #: How the activations are represented inside: "float32", "bfloat16", "int8 per row",
    #: "int8 per 128", "int8 per tensor", or "int8 given" where the caller must supply codes.
    activation: str = "float32"
    #: The work this contender leaves out, in words; empty when it does all of it.
    skips: str = ""
    #: Allowed relative error in the Frobenius norm against float64 of `expected`.
    tolerance: float = 1e-5

    @abstractmethod
    def missing(self) -> str:
        """Why this contender cannot run here; empty when it can."""

    def accepts(self, w: Weights) -> str:
        """Why this contender cannot take `w`; empty when it can."""
        return ""

    @abstractmethod
    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        """Packs `copies` separate copies of `w`."""

    @abstractmethod
    def feed(self, x: np.ndarray) -> None:
        """Takes the float32 batch `x` and gets the output's memory ready."""

    @abstractmethod
    def run(self, copy: int = 0) -> None:
        """Computes the product with one of the copies: the only timed part."""

    @abstractmethod
    def result(self) -> np.ndarray:
        """The product that the last `run` computed."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of one packed copy, as they stream from memory."""

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        """What `result` should be, in float64."""
        return w.product(x)

    def group(self, w: Weights) -> int:
        """Weights that share a scale here (0: none are scaled)."""
        return w.group

    def weight_bits(self, w: Weights) -> float:
        """Bits of one stored weight code."""
        return w.bits

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `function` in the thread that this contender must be used from."""
        return function(*arguments)

    def close(self) -> None:
        """Drops everything that `prepare` and `feed` made."""
        keep = {"name", "activation", "skips", "tolerance", *self._options()}
        for key in [k for k in vars(self) if k not in keep]:
            delattr(self, key)

    def _options(self) -> tuple[str, ...]:
        """Attributes that are settings, not state."""
        return ()


def quantize_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes of `x` and one scale per row, for contenders that want codes."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale


def to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """The bfloat16 bit patterns of a finite float32 array, ties to even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16_bits(u: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return (u.astype(np.uint32) << 16).view(np.float32)


def pack_low_first(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes packed along the last axis, the first one in the lowest bits of a byte."""
    per_byte = 8 // bits
    split = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(split << shifts, axis=-1)


def import_error(module: str) -> str:
    """Why `module` cannot be imported, or an empty string."""
    import importlib

    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install must not stop the others
        return f"{module}: {error}".splitlines()[0]
    return ""
