"""NumPy: dense float32 through its own BLAS, and the same after `qw.dequantize()` in each call."""

from __future__ import annotations

import numpy as np

from .base import Peer, Weights, import_error
from .nibblas_ import format_name


class NumpyFloat32(Peer):
    name = "numpy f32 dense"
    skips = "weights stored as float32"

    def missing(self) -> str:
        return ""

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        from threadpoolctl import threadpool_limits

        self.limit = threadpool_limits(threads, user_api="blas")
        self.w = [w.dense.copy() for _ in range(copies)]

    def feed(self, x: np.ndarray) -> None:
        self.x = x
        self.y = np.zeros((x.shape[0], self.w[0].shape[0]), np.float32)

    def run(self, copy: int = 0) -> None:
        np.matmul(self.x, self.w[copy].T, out=self.y)

    def result(self) -> np.ndarray:
        return self.y

    def weight_bytes(self) -> int:
        return self.w[0].nbytes

    def weight_bits(self, w: Weights) -> float:
        return 32

    def close(self) -> None:
        if hasattr(self, "limit"):
            self.limit.restore_original_limits()
        super().close()


class NumpyDequantized(NumpyFloat32):
    """What a user of NumPy does with a quantised matrix that has no product of its own."""

    name = "numpy x @ qw.dequantize().T"
    skips = ""

    def missing(self) -> str:
        return import_error("nibblas")

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        from threadpoolctl import threadpool_limits

        import nibblas as nb

        self.limit = threadpool_limits(threads)
        scales = w.scales.astype(np.float32 if w.per_row else np.float16)
        self.q = [nb.QTensor.from_parts(format_name(w), w.codes, scales) for _ in range(copies)]

    def run(self, copy: int = 0) -> None:
        np.matmul(self.x, self.q[copy].dequantize().T, out=self.y)

    def feed(self, x: np.ndarray) -> None:
        self.x = x
        self.y = np.zeros((x.shape[0], self.q[0].shape[0]), np.float32)

    def weight_bytes(self) -> int:
        return int(self.q[0].nbytes)

    def weight_bits(self, w: Weights) -> float:
        return Peer.weight_bits(self, w)

    def close(self) -> None:
        self.q = []
        super().close()
