"""nibblas itself, in the same coat as the others."""

from __future__ import annotations

import copy as copying
from typing import Any

import numpy as np

from .base import Peer, Weights, import_error, quantize_int8

#: How each compute class represents activations, and the error that goes with it.
ACTIVATION = {
    "f32": ("float32", 1e-5),
    "bf16": ("bfloat16", 1e-2),
    "int8": ("int8 per row", 3e-2),
    "int8_g32": ("int8 per 32", 3e-2),
    "int8_g128": ("int8 per 128", 3e-2),
}


def format_name(w: Weights) -> str:
    """The name of the format that holds `w`."""
    element = "ternary" if w.element == "ternary" else f"{w.element}{w.bits}"
    return element if w.per_row else f"{element}_g{w.group}"


class Nibblas(Peer):
    """`nb.matmul(x, qw.T, compute=...)`."""

    def __init__(self, compute: str):
        self.compute = compute
        self.name = f"nibblas {compute}"
        self.activation, self.tolerance = ACTIVATION[compute]

    def _options(self) -> tuple[str, ...]:
        return ("compute",)

    def missing(self) -> str:
        return import_error("nibblas")

    def accepts(self, w: Weights) -> str:
        import nibblas as nb

        if self.compute == "f32":
            return ""
        try:
            probe = nb.quantize(np.ones((1, w.group), np.float32), format_name(w))
            nb.matmul(np.ones((1, w.group), np.float32), probe.T, compute=self.compute)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return ""

    def _pack(self, w: Weights) -> Any:
        import nibblas as nb

        scales = w.scales.astype(np.float32 if w.per_row else np.float16)
        return nb.QTensor.from_parts(format_name(w), w.codes, scales)

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        import nibblas as nb

        self.threads = threads
        first = self._pack(w)
        self.qw = [first, *(copying.deepcopy(first) for _ in range(copies - 1))]
        for qw in self.qw:
            qw.pack()
        self.wt = [qw.T for qw in self.qw]
        self.op = nb.matmul

    def feed(self, x: np.ndarray) -> None:
        self.x = x
        self.y = np.zeros((x.shape[0], self.qw[0].shape[0]), np.float32)

    def run(self, copy: int = 0) -> None:
        self.op(self.x, self.wt[copy], compute=self.compute, threads=self.threads, out=self.y)

    def result(self) -> np.ndarray:
        return self.y

    def weight_bytes(self) -> int:
        return int(self.qw[0].nbytes)


class NibblasCodes(Nibblas):
    """int8 codes given by the caller, as the raw integer products of others take them."""

    activation = "int8 given"
    skips = "activation quantisation"

    def __init__(self) -> None:
        super().__init__("int8")
        self.name = "nibblas int8 (codes given)"
        self.activation = "int8 given"
        self.tolerance = 1e-6

    def feed(self, x: np.ndarray) -> None:
        super().feed(x)
        self.x = quantize_int8(x)[0]

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        return quantize_int8(x)[0].astype(np.float64) @ w.dense.astype(np.float64).T


class NibblasFormat(Nibblas):
    """A format that other contenders have no codes for: quantised from the same float matrix."""

    def __init__(self, suffix: str, compute: str):
        super().__init__(compute)
        self.suffix = suffix
        self.name = f"nibblas {compute} {suffix}"

    def _options(self) -> tuple[str, ...]:
        return ("compute", "suffix")

    def _format(self, w: Weights) -> str:
        return f"{format_name(w)}_{self.suffix}"

    def accepts(self, w: Weights) -> str:
        import nibblas as nb

        try:
            probe = nb.quantize(np.ones((1, w.group), np.float32), self._format(w))
            nb.matmul(np.ones((1, w.group), np.float32), probe.T, compute=self.compute)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return ""

    def _pack(self, w: Weights) -> Any:
        import nibblas as nb

        return nb.quantize(w.dense, self._format(w))

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        return x.astype(np.float64) @ self.qw[0].dequantize().astype(np.float64).T


class NibblasPair(Nibblas):
    """The raw sums of two QTensors of the same format, such as single bits on both sides."""

    skips = "activation quantisation and all scales"

    def __init__(self) -> None:
        super().__init__("f32")
        self.name = "nibblas codes x codes"
        self.activation = "codes given"
        self.tolerance = 0.0

    def accepts(self, w: Weights) -> str:
        import nibblas as nb

        try:
            probe = nb.quantize(np.ones((1, w.group), np.float32), format_name(w))
            nb.matmul(probe, probe.T, dtype=np.int32)
        except (ValueError, TypeError, NotImplementedError) as error:
            return str(error)
        return ""

    def group(self, w: Weights) -> int:
        return 0

    def feed(self, x: np.ndarray) -> None:
        import nibblas as nb

        self.codes = nb.quantize(x, str(self.qw[0].format))
        self.y = np.zeros((x.shape[0], self.qw[0].shape[0]), np.int32)

    def run(self, copy: int = 0) -> None:
        self.op(self.codes, self.wt[copy], dtype=np.int32, threads=self.threads, out=self.y)

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        return self.codes.codes().astype(np.float64) @ w.codes.astype(np.float64).T
