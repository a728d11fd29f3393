"""NumPy: dense float32 through its own BLAS."""

from __future__ import annotations

import numpy as np

from .base import Peer, Weights


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
