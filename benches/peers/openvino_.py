"""OpenVINO: a compressed-weight product, compiled for its CPU plugin."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Peer, Weights, import_error, pack_low_first


class OpenVino(Peer):
    """i4 or i8 weights with f16 scales; `precision` "bf16" is what it picks by itself on AMX."""

    def __init__(self, precision: str = "bf16"):
        self.precision = precision
        self.name = f"openvino {precision}"
        self.activation = {"bf16": "bfloat16", "f32": "float32"}[precision]
        self.tolerance = 3e-2

    def _options(self) -> tuple[str, ...]:
        return ("precision",)

    def missing(self) -> str:
        return import_error("openvino")

    def accepts(self, w: Weights) -> str:
        return "" if w.bits in (4, 8) and w.element == "int" else "takes 4 and 8 bits only"

    def _model(self, w: Weights) -> tuple[Any, np.ndarray]:
        import openvino as ov
        from openvino import opset13 as op

        groups = w.k // w.group
        shape = [w.n, w.k] if w.per_row else [w.n, groups, w.group]
        raw = w.codes.copy() if w.bits == 8 else pack_low_first(w.codes & 15, 4)
        kind = ov.Type.i8 if w.bits == 8 else ov.Type.i4
        # The tensor borrows the array: the caller keeps it alive.
        codes = op.constant(ov.Tensor(raw, ov.Shape(shape), kind))
        scales = w.scales.astype(np.float16)
        if not w.per_row:
            scales = scales[:, :, None]
        decoded = op.multiply(op.convert(codes, np.float16), op.constant(scales))
        if not w.per_row:
            decoded = op.reshape(decoded, op.constant(np.array([w.n, w.k], np.int64)), False)
        x = op.parameter([-1, w.k], np.float32)
        product = op.matmul(x, op.convert(decoded, np.float32), False, True)
        return ov.Model([product], [x]), raw

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        if self.precision == "f32":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        self.models = [self._model(w) for _ in range(copies)]
        self.requests = [
            core.compile_model(model, "CPU", settings).create_infer_request()
            for model, _ in self.models
        ]
        self.bytes = w.n * w.k * w.bits // 8 + w.scales.size * 2

    def feed(self, x: np.ndarray) -> None:
        import openvino as ov

        self.x = x
        self.inputs = [ov.Tensor(x, shared_memory=True)]

    def run(self, copy: int = 0) -> None:
        self.y = self.requests[copy].infer(self.inputs, share_inputs=True, share_outputs=True)

    def result(self) -> np.ndarray:
        return np.array(self.y[0])

    def weight_bytes(self) -> int:
        return self.bytes
