"""ggml, the library under llama.cpp, through ctypes.

The shared libraries are taken from the folder named by `NIBBLAS_GGML`, else from the installed
`llama_cpp` package. Weights go to the first buffer type that repacks them (AMX, then the
interleaved layouts), as llama.cpp itself would place them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .base import Peer, Weights

F32 = 0
TYPES = {
    "q4_0": 2,
    "q8_0": 8,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "q6_K": 14,
    "tq1_0": 34,
    "tq2_0": 35,
}
BITS = {"q4_0": 4, "q8_0": 8, "q2_K": 2, "q3_K": 3, "q4_K": 4, "q6_K": 6, "tq1_0": 1.69, "tq2_0": 2}
GROUPS = {
    "q4_0": 32,
    "q8_0": 32,
    "q2_K": 16,
    "q3_K": 16,
    "q4_K": 32,
    "q6_K": 16,
    "tq1_0": 256,
    "tq2_0": 256,
}
CPU_DEVICE = 0


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def _folder() -> Path | None:
    named = os.environ.get("NIBBLAS_GGML")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "lib"


@cache
def library() -> Any:
    """The ggml functions that a product needs, typed; None when there is no library."""
    folder = _folder()
    if folder is None:
        return None
    parts = []
    try:
        for stem in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
            parts.append(ctypes.CDLL(str(folder / stem), mode=ctypes.RTLD_GLOBAL))
    except OSError:
        return None
    p, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (p, [_InitParams]),
        "ggml_log_set": (None, [p, p]),
        "ggml_free": (None, [p]),
        "ggml_new_tensor_2d": (p, [p, ctypes.c_int, i64, i64]),
        "ggml_mul_mat": (p, [p, p, p]),
        "ggml_new_graph": (p, [p]),
        "ggml_graph_overhead": (size, []),
        "ggml_tensor_overhead": (size, []),
        "ggml_build_forward_expand": (None, [p, p]),
        "ggml_row_size": (size, [ctypes.c_int, i64]),
        "ggml_quantize_chunk": (size, [ctypes.c_int, p, p, i64, i64, i64, p]),
        "ggml_get_type_traits": (ctypes.POINTER(_Traits), [ctypes.c_int]),
        "ggml_backend_cpu_init": (p, []),
        "ggml_backend_cpu_set_n_threads": (None, [p, ctypes.c_int]),
        "ggml_backend_cpu_buffer_type": (p, []),
        "ggml_backend_alloc_ctx_tensors_from_buft": (p, [p, p]),
        "ggml_backend_buffer_free": (None, [p]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [p]),
        "ggml_backend_tensor_set": (None, [p, p, size, size]),
        "ggml_backend_tensor_get": (None, [p, p, size, size]),
        "ggml_backend_graph_compute": (ctypes.c_int, [p, p]),
        "ggml_backend_free": (None, [p]),
        "ggml_backend_dev_by_type": (p, [ctypes.c_int]),
        "ggml_backend_dev_backend_reg": (p, [p]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [p, p]),
        "ggml_backend_reg_get_proc_address": (p, [p, ctypes.c_char_p]),
    }
    functions = {}
    for name, (result, arguments) in signatures.items():
        function = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
        functions[name.removeprefix("ggml_")] = function
    # A null callback would mean stderr: one line per tensor.
    functions["log_set"](_SILENT, None)
    return type("Ggml", (), {k: staticmethod(v) for k, v in functions.items()})


def _repacking_buffers() -> list[int]:
    """Buffer types of the CPU device that rearrange weights, best first."""
    lib = library()
    device = lib.backend_dev_by_type(CPU_DEVICE)
    registry = lib.backend_dev_backend_reg(device)
    address = lib.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    found, types = [], get(device)
    while types and types[len(found)]:
        found.append(types[len(found)])
    return found


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "ggml")


@cache
def _crash() -> str:
    """Why a small product dies here, or an empty string.

    Some compilers drop the stores of ggml's AMX tile configuration, and the process with them:
    find out in a process of its own.
    """
    trial = (
        "import numpy as np\n"
        "from peers.base import random_weights\n"
        "from peers.ggml import Ggml\n"
        "peer = Ggml('q4_0')\n"
        "peer.prepare(random_weights('int', 4, 256, 256, 32), 1, 1)\n"
        "peer.feed(np.ones((32, 256), np.float32))\n"
        "peer.run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", trial],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        check=False,
        timeout=60,
    )
    if done.returncode == 0:
        return ""
    return f"this build of ggml dies in a small product (status {done.returncode})"


class Ggml(Peer):
    """`ggml_mul_mat` of one ggml type; activations are quantised per 32 (or 256) values."""

    def __init__(self, kind: str):
        self.kind = kind
        self.name = f"ggml {kind}"
        wide = GROUPS[kind] == 256 or kind.endswith("K")
        self.activation = "int8 per 256" if wide else "int8 per 32"
        self.tolerance = 3e-2

    def _options(self) -> tuple[str, ...]:
        return ("kind",)

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        # ggml loads its tile configuration once per thread and takes it to stay: another
        # library's product in the same thread would leave it with none, and an illegal instruction.
        return _thread().submit(function, *arguments).result()

    def missing(self) -> str:
        if library() is None:
            return "no ggml library: set NIBBLAS_GGML or install llama-cpp-python"
        return _crash()

    def accepts(self, w: Weights) -> str:
        block = library().get_type_traits(TYPES[self.kind]).contents.block
        if w.k % block:
            return f"takes K in multiples of {block} only"
        if w.element == "bipolar" or w.bits != round(BITS[self.kind]):
            return f"takes {round(BITS[self.kind])} bits only"
        if self.kind in ("q4_0", "q8_0") and w.group % 32:
            return "takes groups of 32"
        if self.kind.startswith("tq") and w.element != "ternary":
            return "takes ternary weights only"
        return ""

    def group(self, w: Weights) -> int:
        return GROUPS[self.kind]

    def weight_bits(self, w: Weights) -> float:
        return BITS[self.kind]

    def _blocks(self, w: Weights) -> np.ndarray:
        """The matrix in ggml's own layout, one row of bytes per weight row."""
        if self.kind in ("q4_0", "q8_0"):
            per = w.k // 32
            scales = np.repeat(w.scales, per // w.scales.shape[1], axis=1).astype(np.float16)
            head = scales[:, :, None].view(np.uint8).reshape(w.n, per, 2)
            codes = w.codes.reshape(w.n, per, 32)
            if self.kind == "q4_0":
                u = (codes + 8).astype(np.uint8)
                body = u[:, :, :16] | (u[:, :, 16:] << 4)
            else:
                body = codes.view(np.uint8)
            return np.concatenate([head, body], axis=2).reshape(w.n, -1)
        lib, kind = library(), TYPES[self.kind]
        out = np.zeros((w.n, lib.row_size(kind, w.k)), np.uint8)
        dense = np.ascontiguousarray(w.dense)
        lib.quantize_chunk(kind, dense.ctypes.data, out.ctypes.data, 0, w.n, w.k, None)
        return out

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        lib, kind = library(), TYPES[self.kind]
        self.n, self.k = w.n, w.k
        self.raw = self._blocks(w)
        self.backend = lib.backend_cpu_init()
        lib.backend_cpu_set_n_threads(self.backend, threads)
        self.owned: list[int] = []
        self.buffers: list[int] = []
        for place in [*_repacking_buffers(), lib.backend_cpu_buffer_type()]:
            context = lib.init(_InitParams(lib.tensor_overhead() * (copies + 8) * 2, None, True))
            self.owned.append(context)
            tensors = [lib.new_tensor_2d(context, kind, w.k, w.n) for _ in range(copies)]
            buffer = lib.backend_alloc_ctx_tensors_from_buft(context, place)
            if not buffer:
                continue
            self.buffers.append(buffer)
            probe = lib.new_tensor_2d(context, F32, w.k, 64)
            device = lib.backend_dev_by_type(CPU_DEVICE)
            if lib.backend_dev_supports_op(device, lib.mul_mat(context, tensors[0], probe)):
                break
            lib.backend_buffer_free(self.buffers.pop())
        self.place = lib.backend_buft_name(place).decode()
        self.w = tensors
        for tensor in tensors:
            lib.backend_tensor_set(tensor, self.raw.ctypes.data, 0, self.raw.nbytes)
        self.fed: list[int] = []

    def feed(self, x: np.ndarray) -> None:
        lib = library()
        self._unfeed()
        x = np.ascontiguousarray(x)
        memory = (lib.tensor_overhead() * 2 + lib.graph_overhead()) * (len(self.w) + 2)
        context = lib.init(_InitParams(memory, None, True))
        source = lib.new_tensor_2d(context, F32, self.k, x.shape[0])
        target = [lib.mul_mat(context, tensor, source) for tensor in self.w]
        buffer = lib.backend_alloc_ctx_tensors_from_buft(context, lib.backend_cpu_buffer_type())
        self.fed = [context, buffer]
        lib.backend_tensor_set(source, x.ctypes.data, 0, x.nbytes)
        self.graphs = []
        for product in target:
            graph = lib.new_graph(context)
            lib.build_forward_expand(graph, product)
            self.graphs.append(graph)
        self.target, self.last = target, 0
        self.y = np.zeros((x.shape[0], self.n), np.float32)
        self.op = lib.backend_graph_compute

    def run(self, copy: int = 0) -> None:
        self.op(self.backend, self.graphs[copy])
        self.last = copy

    def result(self) -> np.ndarray:
        tensor = self.target[self.last]
        library().backend_tensor_get(tensor, self.y.ctypes.data, 0, self.y.nbytes)
        return self.y

    def weight_bytes(self) -> int:
        return self.raw.nbytes

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        # Its quantisers choose their own codes: judge it by the matrix it decodes to.
        dense = np.zeros((w.n, w.k), np.float32)
        to_float = library().get_type_traits(TYPES[self.kind]).contents.to_float
        to_float(self.raw.ctypes.data, dense.ctypes.data, dense.size)
        return x.astype(np.float64) @ dense.astype(np.float64).T

    def _unfeed(self) -> None:
        lib = library()
        if self.fed:
            context, buffer = self.fed
            lib.backend_buffer_free(buffer)
            lib.free(context)
            self.fed = []

    def close(self) -> None:
        if hasattr(self, "backend"):
            lib = library()
            if hasattr(self, "fed"):
                self._unfeed()
            for buffer in self.buffers:
                lib.backend_buffer_free(buffer)
            for context in self.owned:
                lib.free(context)
            lib.backend_free(self.backend)
        super().close()
