"""MKL from pip, through ctypes: sgemm, bf16 and s8u8s32 products with weights packed ahead."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .base import Peer, Weights, quantize_int8, to_bfloat16_bits

ROW_MAJOR, NO_TRANS, TRANS, PACKED, B_MATRIX, FIX_OFFSET = 101, 111, 112, 151, 162, 173
INTEL_THREADS, NO_THREADS = 0, 1


def places() -> list[Path]:
    """Where the single dynamic library is."""
    named = os.environ.get("MKL_RT")
    folders = [Path(sys.prefix) / "lib", Path(sys.prefix) / "Library" / "bin"]
    installed = [f for p in folders for f in sorted(p.glob("libmkl_rt.so*"))]
    found = [Path(named)] if named else installed
    return [path for path in found if path.exists()]


@cache
def library(threads: int) -> Any:
    """The single dynamic library, loaded when the number of threads is known.

    Its threading layer is chosen once per process, by the first who asks it anything (threadpoolctl
    does); one thread needs no runtime at all.
    """
    lib = ctypes.CDLL(str(places()[0]), mode=ctypes.RTLD_LOCAL)
    lib.MKL_Set_Threading_Layer(NO_THREADS if threads == 1 else INTEL_THREADS)
    return lib


def _aligned(size: int) -> np.ndarray:
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


class Gemm(Peer):
    """One of MKL's packed products, named as MKL names it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.name = f"mkl {kind}"
        if kind == "s8u8s32":
            self.activation = "int8 given"
            self.skips = "activation quantisation and all scales"
            self.tolerance = 0.0
        elif kind == "bf16":
            self.activation = "bfloat16"
            self.skips = "conversion of the activations; weights stored as bfloat16"
            self.tolerance = 6e-3
        else:
            self.skips = "weights stored as float32"

    def _options(self) -> tuple[str, ...]:
        return ("kind",)

    def missing(self) -> str:
        return "" if places() else "libmkl_rt was not found"

    def accepts(self, w: Weights) -> str:
        return "has no groups" if self.kind == "s8u8s32" and not w.per_row else ""

    def group(self, w: Weights) -> int:
        return 0 if self.kind == "s8u8s32" else w.group

    def weight_bits(self, w: Weights) -> float:
        return {"s8u8s32": 8, "bf16": 16, "sgemm": 32}[self.kind]

    def _function(self, suffix: str) -> Any:
        stem = {
            "sgemm": "cblas_sgemm",
            "bf16": "cblas_gemm_bf16bf16f32",
            "s8u8s32": "cblas_gemm_s8u8s32",
        }[self.kind]
        function = getattr(library(self.threads), stem + suffix)
        function.restype = ctypes.c_size_t if suffix == "_pack_get_size" else None
        return function

    def prepare(self, w: Weights, copies: int, threads: int) -> None:
        self.threads = threads
        library(threads).MKL_Set_Num_Threads_Local(threads)
        self.n, self.k, self.copies = w.n, w.k, copies
        if self.kind == "s8u8s32":
            self.source = w.codes
        elif self.kind == "bf16":
            self.source = to_bfloat16_bits(w.dense)
        else:
            self.source = w.dense

    def feed(self, x: np.ndarray) -> None:
        m = x.shape[0]
        dims = [ctypes.c_int(v) for v in (m, self.n, self.k)]
        size = self._function("_pack_get_size")(B_MATRIX, *dims)
        pack = self._function("_pack")
        self.packed = []
        for _ in range(self.copies):
            target = _aligned(size)
            alpha = [ctypes.c_float(1)] if self.kind == "sgemm" else []
            source = ctypes.c_void_p(self.source.ctypes.data)
            to = ctypes.c_void_p(target.ctypes.data)
            pack(ROW_MAJOR, B_MATRIX, TRANS, *dims, *alpha, source, self.k, to)
            self.packed.append(target)
        if self.kind == "s8u8s32":
            self.x: np.ndarray = (quantize_int8(x)[0].astype(np.int16) + 128).astype(np.uint8)
        else:
            self.x = to_bfloat16_bits(x) if self.kind == "bf16" else x
        self.y = np.zeros((m, self.n), np.int32 if self.kind == "s8u8s32" else np.float32)
        a, c = (ctypes.c_void_p(v.ctypes.data) for v in (self.x, self.y))
        zero, one = ctypes.c_float(0), ctypes.c_float(1)
        self.offset = np.zeros(1, np.int32)
        byte = ctypes.c_byte(0)
        self.calls = []
        for target in self.packed:
            b = ctypes.c_void_p(target.ctypes.data)
            if self.kind == "s8u8s32":
                co = ctypes.c_void_p(self.offset.ctypes.data)
                call = (
                    ROW_MAJOR,
                    NO_TRANS,
                    PACKED,
                    FIX_OFFSET,
                    *dims,
                    one,
                    a,
                    self.k,
                    byte,
                    b,
                    self.k,
                    byte,
                    zero,
                    c,
                    self.n,
                    co,
                )
            elif self.kind == "bf16":
                call = (
                    ROW_MAJOR,
                    NO_TRANS,
                    PACKED,
                    *dims,
                    one,
                    a,
                    self.k,
                    b,
                    self.k,
                    zero,
                    c,
                    self.n,
                )
            else:
                call = (ROW_MAJOR, NO_TRANS, PACKED, *dims, a, self.k, b, self.k, zero, c, self.n)
            self.calls.append(call)
        self.op = self._function("_compute")

    def run(self, copy: int = 0) -> None:
        self.op(*self.calls[copy])

    def result(self) -> np.ndarray:
        return self.y

    def weight_bytes(self) -> int:
        return self.source.nbytes

    def expected(self, x: np.ndarray, w: Weights) -> np.ndarray:
        if self.kind != "s8u8s32":
            return super().expected(x, w)
        codes = quantize_int8(x)[0].astype(np.float64) + 128
        return codes @ w.codes.astype(np.float64).T
