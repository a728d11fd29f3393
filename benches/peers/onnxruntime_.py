"""onnxruntime: MatMulNBits, MatMulInteger and DynamicQuantizeMatMul, one node per session."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Peer, Weights, import_error, pack_low_first


class _Session(Peer):
    """A model of one node whose weights are initialisers, run through an I/O binding."""

    out_type = np.float32

    def missing(self) -> str:
        return import_error("onnxruntime") or import_error("onnx")

    def _node(self, w: Weights) -> tuple[Any, dict[str, np.ndarray]]:
        """The node, and its constant inputs by name."""
        raise NotImplementedError

    def _input(self, x: np.ndarray) -> np.ndarray:
        return x

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        import onnx
        import onnxruntime as ort
        from onnx import helper, numpy_helper

        node, constants = self._node(w)
        sample = self._input(np.zeros((1, w.k), np.float32))
        element = helper.np_dtype_to_tensor_dtype
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("A", element(sample.dtype), ["M", w.k])],
            [helper.make_tensor_value_info("Y", element(np.dtype(self.out_type)), ["M", w.n])],
            [numpy_helper.from_array(v, k) for k, v in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, check_custom_domain=False)
        blob = model.SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.n = w.n
        self.bytes = sum(v.nbytes for v in constants.values())
        self.sessions = [
            ort.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
            for _ in range(copies)
        ]

    def feed(self, x: np.ndarray) -> None:
        import onnxruntime as ort

        self.x = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(self._input(x)))
        shape = [x.shape[0], self.n]
        self.y = ort.OrtValue.ortvalue_from_shape_and_type(shape, self.out_type)
        self.bindings = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("A", self.x)
            binding.bind_ortvalue_output("Y", self.y)
            self.bindings.append(binding)

    def run(self, copy: int = 0) -> None:
        self.sessions[copy].run_with_iobinding(self.bindings[copy])

    def result(self) -> np.ndarray:
        return np.asarray(self.y.numpy())

    def weight_bytes(self) -> int:
        return self.bytes


class NBits(_Session):
    """MatMulNBits; `accuracy` 4 quantises activations per weight group, 0 stays in float32."""

    def __init__(self, accuracy: int):
        self.accuracy = accuracy
        self.name = f"onnxruntime MatMulNBits acc{accuracy}"
        self.activation = "int8 per group" if accuracy == 4 else "float32"
        self.tolerance = 3e-2 if accuracy == 4 else 1e-5

    def _options(self) -> tuple[str, ...]:
        return ("accuracy",)

    def accepts(self, w: Weights) -> str:
        if w.bits not in (2, 4, 8) or w.element == "bipolar":
            return "takes 2, 4 and 8 bits only"
        if w.group < 16 or w.group > 256 or w.group & (w.group - 1):
            return "takes groups of 16 to 256 only"
        return ""

    def _node(self, w: Weights) -> tuple[Any, dict[str, np.ndarray]]:
        from onnx import helper

        unsigned = w.codes.astype(np.int16) + 2 ** (w.bits - 1)
        blocks = unsigned.reshape(w.n, w.k // w.group, w.group)
        attributes = {"K": w.k, "N": w.n, "bits": w.bits, "block_size": w.group}
        if self.accuracy:
            attributes["accuracy_level"] = self.accuracy
        node = helper.make_node(
            "MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", **attributes
        )
        return node, {"B": pack_low_first(blocks, w.bits), "S": w.scales.reshape(-1)}


class MatMulInteger(_Session):
    name = "onnxruntime MatMulInteger"
    activation = "int8 given"
    skips = "activation quantisation and all scales"
    tolerance = 0.0
    out_type = np.int32

    def accepts(self, w: Weights) -> str:
        return "" if w.per_row else "has no groups"

    def group(self, w: Weights) -> int:
        return 0

    def weight_bits(self, w: Weights) -> float:
        return 8

    def _node(self, w: Weights) -> tuple[Any, dict[str, np.ndarray]]:
        from onnx import helper

        node = helper.make_node("MatMulInteger", ["A", "B"], ["Y"])
        return node, {"B": np.ascontiguousarray(w.codes.T)}

    def _input(self, x: np.ndarray) -> np.ndarray:
        top = max(float(np.abs(x).max()), 1e-30)
        return np.clip(np.rint(x / top * 127) + 128, 0, 255).astype(np.uint8)

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        return self._input(x).astype(np.float64) @ w.codes.astype(np.float64).T


class DynamicQuantizeMatMul(_Session):
    name = "onnxruntime DynamicQuantizeMatMul"
    activation = "int8 per tensor"
    tolerance = 5e-2

    def accepts(self, w: Weights) -> str:
        return "" if w.per_row else "has no groups"

    def weight_bits(self, w: Weights) -> float:
        return 8

    def _node(self, w: Weights) -> tuple[Any, dict[str, np.ndarray]]:
        from onnx import helper

        node = helper.make_node(
            "DynamicQuantizeMatMul", ["A", "B", "S"], ["Y"], domain="com.microsoft"
        )
        return node, {"B": np.ascontiguousarray(w.codes.T), "S": w.scales.reshape(-1)}
