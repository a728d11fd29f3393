"""auto-round-lib: the BesTLA kernels behind `auto_round_kernel`."""

from __future__ import annotations

import os

import numpy as np

from .base import Peer, Weights, import_error


class Ark(Peer):
    """Weight-only product; `compute` "auto" quantises activations per weight group."""

    def __init__(self, compute: str = "auto"):
        self.compute = compute
        self.name = f"auto-round-lib {compute}"
        self.activation = "int8 per group" if compute == "auto" else "bfloat16"
        self.tolerance = 3e-2

    def _options(self) -> tuple[str, ...]:
        return ("compute",)

    def missing(self) -> str:
        return import_error("torch") or import_error("auto_round_kernel")

    def accepts(self, w: Weights) -> str:
        if w.element == "bipolar":
            return "takes integers only"
        return "" if w.k % w.group == 0 and w.group >= 16 else "takes whole groups only"

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        import auto_round_kernel as ark
        import torch

        # Its pool takes its size when it loads; with another one from torch, results are wrong.
        if os.environ.get("OMP_NUM_THREADS") != str(threads):
            raise RuntimeError(f"start the process with OMP_NUM_THREADS={threads}")
        torch.set_num_threads(threads)
        self.kind = f"int{w.bits}"
        self.size = w.group
        self.n, self.k = w.n, w.k
        codes = torch.from_numpy(np.ascontiguousarray(w.codes.T))
        scales = torch.from_numpy(np.ascontiguousarray(w.scales.T))
        zeros = torch.zeros(scales.shape, dtype=torch.int8)
        blob = ark.repack_quantized_weight(
            codes, scales, zeros, self.size, self.compute, self.kind, "fp32", False
        )
        self.blobs = [blob.clone() for _ in range(copies)]
        self.bias = torch.zeros(w.n)
        self.op = ark.woqgemm

    def feed(self, x: np.ndarray) -> None:
        import torch

        self.x = torch.from_numpy(x)
        self.y = torch.zeros(x.shape[0], self.n)

    def run(self, copy: int = 0) -> None:
        self.op(
            self.x,
            self.blobs[copy],
            self.bias,
            self.n,
            self.k,
            self.size,
            self.compute,
            self.kind,
            "fp32",
            False,
            self.y,
        )

    def result(self) -> np.ndarray:
        return np.asarray(self.y.numpy())

    def weight_bytes(self) -> int:
        return int(self.blobs[0].numel() * self.blobs[0].element_size())
