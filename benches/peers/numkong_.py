"""numkong: raw dot products of packed integers, without any scale."""

from __future__ import annotations

import numpy as np

from .base import Peer, Weights, import_error, pack_low_first, quantize_int8


class Dots(Peer):
    """`dots_packed` of int8, int4 or single bits."""

    activation = "int8 given"
    skips = "activation quantisation and all scales"
    tolerance = 0.0

    def __init__(self, kind: str):
        self.kind = kind
        self.name = f"numkong {kind}"
        if kind != "int8":
            self.activation = f"{kind} given"

    def _options(self) -> tuple[str, ...]:
        return ("kind",)

    def missing(self) -> str:
        return import_error("numkong")

    def accepts(self, w: Weights) -> str:
        if (self.kind == "uint1") != (w.element == "bipolar" and w.bits == 1):
            return "another element"
        if self.kind == "int4" and w.bits > 4:
            return "takes 4 bits only"
        return "" if w.per_row else "has no groups"

    def group(self, w: Weights) -> int:
        return 0

    def weight_bits(self, w: Weights) -> float:
        return {"int8": 8, "int4": 4, "uint1": 1}[self.kind]

    def _codes(self, x: np.ndarray) -> np.ndarray:
        """The activation codes as plain int8."""
        if self.kind == "uint1":
            return (x > 0).astype(np.int8)
        codes, _ = quantize_int8(x)
        return codes if self.kind == "int8" else codes >> 4

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        if self.kind == "int8":
            return codes
        if self.kind == "int4":
            return pack_low_first(codes & 15, 4)
        return np.packbits(codes.astype(np.uint8), axis=1, bitorder="little")

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        import numkong

        self.threads = threads
        self.n = w.n
        codes = w.codes if self.kind != "uint1" else (w.codes > 0).astype(np.int8)
        raw = numkong.Tensor(self._pack(codes))
        self.packed = [numkong.dots_pack(raw, dtype=self.kind) for _ in range(copies)]
        self.op = numkong.dots_packed

    def feed(self, x: np.ndarray) -> None:
        import numkong

        raw = self._pack(self._codes(x))
        self.x = raw if self.kind == "int8" else numkong.Tensor(raw, dtype=self.kind)

    def run(self, copy: int = 0) -> None:
        self.y = self.op(self.x, self.packed[copy], threads=self.threads)

    def result(self) -> np.ndarray:
        return np.asarray(self.y).astype(np.int64)

    def weight_bytes(self) -> int:
        return int(self.packed[0].nbytes)

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        codes = w.codes if self.kind != "uint1" else (w.codes > 0).astype(np.int8)
        return self._codes(x).astype(np.float64) @ codes.astype(np.float64).T
