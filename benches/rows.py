"""What is raced: each row, the contenders that do the same work, and the ratios wanted."""

from __future__ import annotations

from dataclasses import dataclass

#: The big square matrix that most rows use.
SQUARE = ((4096, 4096),)

NUMPY = "numpy f32 dense"
DEQUANTIZED = "numpy x @ qw.dequantize().T"
TORCH_F32 = "torch float32 dense"
TORCH_BF16 = "torch bfloat16 dense"
INT_MM = "torch _int_mm"
TORCH_DYNAMIC = "torch dynamic linear (oneDNN)"
INT4PACK = "torch int4pack bf16"
ORT_F32 = "onnxruntime MatMulNBits acc0"
ORT_INT8 = "onnxruntime MatMulNBits acc4"
ORT_INTEGER = "onnxruntime MatMulInteger"
ORT_DYNAMIC = "onnxruntime DynamicQuantizeMatMul"
ARK = "auto-round-lib auto"
ARK_BF16 = "auto-round-lib bf16"
OV = "openvino bf16"
OV_F32 = "openvino f32"
MKL_F32, MKL_BF16, MKL_INT8 = "mkl sgemm", "mkl bf16", "mkl s8u8s32"
KONG_INT8, KONG_BIT = "numkong int8", "numkong uint1"

F32, BF16, INT8, G32, G128 = (
    f"nibblas {c}" for c in ("f32", "bf16", "int8", "int8_g32", "int8_g128")
)
GIVEN = "nibblas int8 (codes given)"
PAIR = "nibblas codes x codes"
TWO_LEVEL = "nibblas int8 si8"


@dataclass(frozen=True)
class Goal:
    """`ours` should be `reach` times as fast as the best of `against`, and aims at `aim`.

    `like` marks the contender of ours whose work matches the peers' most closely: the same
    bits, weight groups and activation groups. An `aim` of "bandwidth" is the speed at which the
    bytes of the weights can be read at all.
    """

    ours: str
    against: tuple[str, ...]
    reach: float
    aim: float | str
    like: bool = False
    ms: tuple[int, ...] = ()  # empty: all of the row's


@dataclass(frozen=True)
class Row:
    """Cases that share a format and a list of contenders."""

    id: str
    title: str
    element: str
    bits: int
    group: int
    ms: tuple[int, ...]
    goals: tuple[Goal, ...]
    beside: tuple[str, ...] = ()  # contenders that no goal names
    shapes: tuple[tuple[int, int], ...] = SQUARE
    cold: bool = False
    limit: str = ""  # what bounds it from 16 rows of activations on: a kind of limits.py

    def ours(self) -> list[str]:
        return list(dict.fromkeys(goal.ours for goal in self.goals))

    def peers(self) -> list[str]:
        named = [name for goal in self.goals for name in goal.against]
        return list(dict.fromkeys([*named, *self.beside]))


def _gemv(cold: bool) -> list[Row]:
    """M = 1 with four bits: limited by the bytes of the weights."""
    rows = []
    heat = "cold" if cold else "hot"
    for group, like, reach in ((128, G128, 1.15), (32, G32, 1.1 if cold else 1.05)):
        against = (ARK, ORT_INT8, "ggml q4_0")
        goals = (
            Goal(like, against, reach, "bandwidth", like=True),
            Goal(INT8, against, reach, "bandwidth"),
        )
        rows.append(
            Row(
                f"int4_g{group}-gemv-{heat}",
                f"int4_g{group}, M = 1, {heat} weights",
                "int",
                4,
                group,
                (1,),
                goals,
                beside=() if cold else ("ggml q4_K", INT4PACK, OV, NUMPY),
                cold=cold,
            )
        )
    return rows


def _few(group: int, like: str) -> Row:
    against = (ARK, ORT_INT8, "ggml q4_0", OV, INT4PACK)
    goals = (Goal(like, against, 1.8, 2.2, like=True), Goal(INT8, against, 1.8, 2.2))
    title = f"int4_g{group}, a few activations"
    return Row(f"int4_g{group}-few", title, "int", 4, group, (4, 8), goals)


def _narrow(element: str, bits: int, group: int, gguf: tuple[str, ...]) -> Row:
    name = "ternary" if element == "ternary" else f"{element}{bits}"
    against = (ARK, *((ORT_INT8,) if bits == 2 else ()), *gguf)
    like = G32 if group == 32 else G128
    one = (1.8, 2.6) if bits == 3 else (1.5, 2.1)
    goals = tuple(
        Goal(ours, against, reach, aim, like=ours == like, ms=ms)
        for ours in (like, INT8)
        for ms, (reach, aim) in (((1,), one), ((16, 64, 256), (2.5, 5.0)))
    )
    title = f"{name}_g{group}, compute int8, hot weights"
    limit = "int8 tiles of 32" if group == 32 else "int8 tiles"
    ms = (1, 16, 64, 256)
    return Row(f"{name}_g{group}", title, element, bits, group, ms, goals, limit=limit)


ROWS: tuple[Row, ...] = (
    Row(
        "int4_g128",
        "int4_g128, compute int8",
        "int",
        4,
        128,
        (16, 64, 256, 1024),
        (
            Goal(G128, (ARK, ORT_INT8, OV), 1.8, 2.7, like=True),
            Goal(INT8, (ARK, ORT_INT8, OV), 1.8, 2.7),
            Goal(TWO_LEVEL, (ARK, ORT_INT8, OV), 1.9, 2.5, ms=(64,)),
            Goal(TWO_LEVEL, (ARK, ORT_INT8, OV), 2.5, 3.7, ms=(256, 1024)),
        ),
        limit="int8 tiles",
    ),
    Row(
        "int4_g32",
        "int4_g32, compute int8",
        "int",
        4,
        32,
        (16, 64, 256, 1024),
        (
            Goal(G32, (ARK, ORT_INT8, "ggml q4_0"), 2.0, 3.0, like=True),
            Goal(G32, (OV,), 1.2, 2.0),
            Goal(INT8, (ARK, ORT_INT8, "ggml q4_0"), 2.0, 3.0),
            Goal(INT8, (OV,), 1.2, 2.0),
        ),
        limit="int8 tiles of 32",
    ),
    Row(
        "int8",
        "int8 x int8, one scale per row",
        "int",
        8,
        0,
        (64, 256, 1024),
        (
            Goal(GIVEN, (INT_MM, ORT_INTEGER, MKL_INT8, KONG_INT8), 1.3, 1.8, like=True),
            Goal(INT8, (TORCH_DYNAMIC, ORT_DYNAMIC), 1.3, 1.8),
        ),
        limit="int8 tiles",
    ),
    *_gemv(cold=True),
    *_gemv(cold=False),
    _few(128, G128),
    _few(32, G32),
    _narrow("int", 2, 32, ("ggml q2_K",)),
    _narrow("int", 2, 128, ("ggml q2_K",)),
    _narrow("ternary", 2, 128, ("ggml tq2_0", "ggml tq1_0")),
    _narrow("int", 3, 32, ("ggml q3_K",)),
    _narrow("int", 3, 128, ("ggml q3_K",)),
    Row(
        "bipolar1",
        "bipolar1 x bipolar1 (one bit on both sides)",
        "bipolar",
        1,
        0,
        (1, 16, 256),
        (
            Goal(PAIR, (KONG_BIT,), 1.0, 1.2, like=True, ms=(1,)),
            Goal(PAIR, (KONG_BIT,), 1.3, 2.0, like=True, ms=(16, 256)),
        ),
    ),
    Row(
        "f32",
        "int4_g128, compute f32",
        "int",
        4,
        128,
        (64, 256),
        (Goal(F32, (TORCH_F32, NUMPY, MKL_F32), 0.9, 1.05, like=True),),
        beside=(ORT_F32,),
        limit="f32 registers",
    ),
    Row(
        "f32-dequantized",
        "int4_g128, compute f32, beside decoding first",
        "int",
        4,
        128,
        (1, 16, 64, 256, 1024),
        (Goal(F32, (DEQUANTIZED,), 1.0, 1.0, like=True),),
    ),
    Row(
        "f32-gemv-cold",
        "int4_g128, compute f32, M = 1, cold weights",
        "int",
        4,
        128,
        (1,),
        (Goal(F32, (NUMPY,), 4.0, 6.0, like=True),),
        beside=(TORCH_F32, ORT_F32),
        cold=True,
    ),
    Row(
        "bf16",
        "int4_g128, compute bf16",
        "int",
        4,
        128,
        (64, 256, 1024),
        (Goal(BF16, (TORCH_BF16, MKL_BF16, OV, ARK_BF16), 0.9, 1.3, like=True),),
        limit="bf16 tiles",
    ),
    Row(
        "minilm",
        "int4_g32, compute int8, the shapes of MiniLM",
        "int",
        4,
        32,
        (128,),
        (
            Goal(G32, (ARK, ORT_INT8, "ggml q4_0", OV), 1.5, 3.0, like=True),
            Goal(INT8, (ARK, ORT_INT8, "ggml q4_0", OV), 1.5, 3.0),
        ),
        shapes=((1536, 384), (384, 1536)),
        limit="int8 tiles of 32",
    ),
)
