"""The contenders: `OURS` and `PEERS` make each of them by name."""

from __future__ import annotations

from collections.abc import Callable

from .ark import Ark
from .base import Peer, Weights, random_weights
from .ggml import TYPES, Ggml
from .mkl import Gemm
from .nibblas_ import ACTIVATION, Nibblas, NibblasCodes, NibblasFormat, NibblasPair
from .numkong_ import Dots
from .numpy_ import NumpyDequantized, NumpyFloat32
from .onnxruntime_ import DynamicQuantizeMatMul, MatMulInteger, NBits
from .openvino_ import OpenVino
from .torch_ import Dense, DynamicLinear, Int4Pack, IntMM

__all__ = ["OURS", "PEERS", "Peer", "Weights", "make", "random_weights"]


def _by_name(*kinds: Callable[[], Peer]) -> dict[str, Callable[[], Peer]]:
    return {kind().name: kind for kind in kinds}


OURS = _by_name(
    *(lambda c=c: Nibblas(c) for c in ACTIVATION),
    NibblasCodes,
    NibblasPair,
    lambda: NibblasFormat("si8", "int8"),
)

PEERS = _by_name(
    NumpyFloat32,
    NumpyDequantized,
    lambda: NBits(0),
    lambda: NBits(4),
    MatMulInteger,
    DynamicQuantizeMatMul,
    lambda: Dense("float32"),
    lambda: Dense("bfloat16"),
    IntMM,
    DynamicLinear,
    Int4Pack,
    lambda: Ark("auto"),
    lambda: Ark("bf16"),
    lambda: Dots("int8"),
    lambda: Dots("int4"),
    lambda: Dots("uint1"),
    lambda: OpenVino("bf16"),
    lambda: OpenVino("f32"),
    *(lambda kind=kind: Ggml(kind) for kind in TYPES),
    lambda: Gemm("sgemm"),
    lambda: Gemm("bf16"),
    lambda: Gemm("s8u8s32"),
)


def make(name: str) -> Peer:
    """The contender called `name`."""
    return (OURS | PEERS)[name]()
