"""PyTorch on the CPU: dense products, its integer product, and its own packed int4 and int8."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .base import (
    Peer,
    Weights,
    from_bfloat16_bits,
    import_error,
    quantize_int8,
    to_bfloat16_bits,
)


class _Torch(Peer):
    def missing(self) -> str:
        return import_error("torch")

    def _start(self, threads: int) -> Any:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        return torch

    def result(self) -> np.ndarray:
        return np.asarray(self.y.float().numpy())


class Dense(_Torch):
    """`torch.mm` on dense weights of one float type."""

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.name = f"torch {dtype} dense"
        self.activation = dtype
        self.skips = f"weights stored as {dtype}"
        if dtype == "bfloat16":
            self.skips = "conversion of the activations; " + self.skips
        self.tolerance = 1e-5 if dtype == "float32" else 6e-3

    def _options(self) -> tuple[str, ...]:
        return ("dtype",)

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        torch = self._start(threads)
        self.w = [
            torch.from_numpy(w.dense).to(getattr(torch, self.dtype)).clone() for _ in range(copies)
        ]
        self.wt = [v.t() for v in self.w]

    def feed(self, x: np.ndarray) -> None:
        import torch

        self.x = torch.from_numpy(x).to(self.w[0].dtype)
        self.y = torch.zeros(x.shape[0], self.w[0].shape[0], dtype=self.x.dtype)
        self.mm = torch.mm

    def run(self, copy: int = 0) -> None:
        self.mm(self.x, self.wt[copy], out=self.y)

    def weight_bytes(self) -> int:
        return int(self.w[0].numel() * self.w[0].element_size())

    def weight_bits(self, w: Weights) -> float:
        return 32 if self.dtype == "float32" else 16


class IntMM(_Torch):
    name = "torch _int_mm"
    activation = "int8 given"
    skips = "activation quantisation and all scales"
    tolerance = 0.0

    def accepts(self, w: Weights) -> str:
        return "" if w.per_row else "has no groups"

    def group(self, w: Weights) -> int:
        return 0

    def weight_bits(self, w: Weights) -> float:
        return 8

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        torch = self._start(threads)
        self.w = [torch.from_numpy(w.codes).clone() for _ in range(copies)]
        self.wt = [v.t() for v in self.w]

    def feed(self, x: np.ndarray) -> None:
        import torch

        self.x = torch.from_numpy(quantize_int8(x)[0])
        self.y = torch.zeros(x.shape[0], self.w[0].shape[0], dtype=torch.int32)
        self.mm = torch._int_mm

    def run(self, copy: int = 0) -> None:
        self.mm(self.x, self.wt[copy], out=self.y)

    def result(self) -> np.ndarray:
        return np.asarray(self.y.numpy())

    def weight_bytes(self) -> int:
        return int(self.w[0].numel())

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        return quantize_int8(x)[0].astype(np.float64) @ w.codes.astype(np.float64).T


class DynamicLinear(_Torch):
    """`quantized.linear_dynamic` with oneDNN: per-row weights, activations per tensor."""

    name = "torch dynamic linear (oneDNN)"
    activation = "int8 per tensor"
    tolerance = 5e-2

    def missing(self) -> str:
        reason = super().missing()
        if reason:
            return reason
        import torch

        engines = torch.backends.quantized.supported_engines
        return "" if "onednn" in engines else "this torch has no oneDNN engine"

    def accepts(self, w: Weights) -> str:
        return "" if w.per_row else "has no groups"

    def weight_bits(self, w: Weights) -> float:
        return 8

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        torch = self._start(threads)
        torch.backends.quantized.engine = "onednn"
        scale = torch.from_numpy(w.scales[:, 0].astype(np.float64))
        zero = torch.zeros(w.n, dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated, and still the fastest there
            coded = torch.quantize_per_channel(
                torch.from_numpy(w.dense), scale, zero, 0, torch.qint8
            )
        self.bytes = w.n * w.k
        self.packed = [torch.ops.quantized.linear_prepack(coded, None) for _ in range(copies)]
        self.op = torch.ops.quantized.linear_dynamic

    def feed(self, x: np.ndarray) -> None:
        import torch

        self.x = torch.from_numpy(x)

    def run(self, copy: int = 0) -> None:
        self.y = self.op(self.x, self.packed[copy], False)

    def weight_bytes(self) -> int:
        return self.bytes


class Int4Pack(_Torch):
    """`_weight_int4pack_mm_for_cpu` with bfloat16 activations."""

    name = "torch int4pack bf16"
    activation = "bfloat16"
    tolerance = 2e-2

    def accepts(self, w: Weights) -> str:
        if w.bits != 4 or w.element != "int":
            return "takes 4 bits only"
        return "" if w.group in (32, 64, 128, 256) else "takes groups of 32 to 256 only"

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        torch = self._start(threads)
        unsigned = torch.from_numpy(w.codes.astype(np.int32) + 8)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        # The decode is (u - 8) * scale + zero, with zero in the units of the result.
        pairs = np.zeros((w.k // w.group, w.n, 2), np.float32)
        pairs[:, :, 0] = w.scales.T
        pair = torch.from_numpy(pairs).bfloat16()
        self.size = w.group
        self.packed = [(packed.clone(), pair.clone()) for _ in range(copies)]
        self.op = torch.ops.aten._weight_int4pack_mm_for_cpu

    def feed(self, x: np.ndarray) -> None:
        import torch

        self.x = torch.from_numpy(x).bfloat16()

    def run(self, copy: int = 0) -> None:
        packed, pair = self.packed[copy]
        self.y = self.op(self.x, packed, self.size, pair)

    def weight_bytes(self) -> int:
        return sum(int(v.numel() * v.element_size()) for v in self.packed[0])

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        # Its scales are bfloat16: judge it by the matrix it was given.
        scales = from_bfloat16_bits(to_bfloat16_bits(w.scales)).astype(np.float64)
        codes = w.codes.reshape(w.n, -1, w.group) * scales[:, :, None]
        return x.astype(np.float64) @ codes.reshape(w.n, w.k).T
