"""The compiled core: private; everything here is reached through the package's own functions."""

from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LARGE",
    "Columns",
    "Delta",
    "Packed",
    "Plan",
    "SafetensorsReader",
    "SafetensorsWriter",
    "__version__",
    "check",
    "check_compute",
    "code_values",
    "decode_codes",
    "dequantize",
    "encode",
    "explain",
    "format_parts",
    "format_table",
    "get_num_threads",
    "isa_active",
    "isa_detected",
    "isa_report",
    "isa_warning",
    "matmul",
    "matmul_plain",
    "matmul_q",
    "matmul_raw",
    "ops_add",
    "ops_apply",
    "ops_compat",
    "ops_dyadic",
    "ops_lmul",
    "ops_lmul_matmul",
    "ops_norm",
    "ops_norm_codes",
    "ops_requantize",
    "ops_shift_add",
    "ops_softmax",
    "ops_sqrt",
    "pack",
    "parse_format",
    "part_names",
    "quantize",
    "reference",
    "set_num_threads",
    "sparse_pack",
    "sparse_unpack",
]

__version__: str
LARGE: int

_Row: TypeAlias = tuple[
    str,
    int,
    int,
    int,
    int,
    bool,
    tuple[str, ...],
    int | None,
    tuple[str, ...],
    bool,
    bool,
    float,
    bool,
    int,
]
_Parts: TypeAlias = tuple[str, int, int, dict[str, NDArray[Any]]]

@final
class Packed:
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def restore(self, part: str, out: NDArray[Any], threads: int, /) -> None: ...

@final
class Plan:
    def fields(self) -> dict[str, str]: ...

@final
class Columns:
    def __new__(cls, parts: _Parts, threads: int, /) -> Columns: ...
    @property
    def nbytes(self) -> int: ...
    def matmul(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        compute: str,
        bias: NDArray[np.float32] | None,
        threads: int,
        isa: str | None,
        /,
    ) -> bool: ...

@final
class Delta:
    def __new__(cls, weight: Columns, rows: int, /) -> Delta: ...
    def step(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        scale: float | None,
        threshold: float,
        bias: NDArray[np.float32] | None,
        threads: int,
        /,
    ) -> int: ...

def sparse_pack(parts: _Parts, format: str, /) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...
def sparse_unpack(parts: _Parts, /) -> NDArray[np.uint8]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def parse_format(
    name: str, /
) -> tuple[str, _Row, int | None, str, tuple[str, ...], str | None]: ...
def format_parts(
    name: str, rows: int, cols: int, /
) -> list[tuple[str, tuple[str, ...], tuple[int, ...], str]]: ...
def part_names() -> list[str]: ...
def format_table() -> list[_Row]: ...
def code_values(name: str, /) -> list[float]: ...
def quantize(
    x: NDArray[Any],
    format: str,
    method: str,
    importance: NDArray[Any] | None,
    arrays: dict[str, NDArray[Any]],
    bounds: NDArray[Any],
    threads: int,
    /,
) -> None: ...
def dequantize(parts: _Parts, out: NDArray[Any], threads: int, /) -> None: ...
def decode_codes(parts: _Parts, out: NDArray[Any], threads: int, /) -> None: ...
def encode(format: str, values: NDArray[Any], out: NDArray[Any], /) -> None: ...
def check(parts: _Parts, /) -> None: ...
def pack(parts: _Parts, threads: int, /) -> Packed: ...
def check_compute(compute: str, format: str, /) -> None: ...
def matmul(
    x: NDArray[Any],
    packed: Packed,
    y: NDArray[Any],
    compute: str,
    bias: NDArray[Any] | None,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def matmul_plain(x: Any, packed: Packed, threads: int, /) -> NDArray[Any] | None: ...
def matmul_q(
    parts: _Parts,
    packed: Packed,
    y: NDArray[Any],
    bias: NDArray[Any] | None,
    threads: int,
    isa: str | None,
    /,
) -> bool: ...
def matmul_raw(
    parts: _Parts, packed: Packed, y: NDArray[Any], threads: int, isa: str | None, /
) -> None: ...
def reference(
    x: NDArray[Any], parts: _Parts, y: NDArray[Any], compute: str, bias: NDArray[Any] | None, /
) -> None: ...
def explain(m: int, packed: Packed, compute: str, threads: int, /) -> Plan: ...
def ops_shift_add(
    by: str,
    a: NDArray[Any],
    parts: _Parts,
    y: NDArray[Any],
    bias: NDArray[Any] | None,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_lmul(
    a: NDArray[Any],
    b: NDArray[Any],
    y: NDArray[Any],
    numbers: tuple[int, int, int, int],
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_lmul_matmul(
    a: NDArray[Any],
    b: NDArray[Any],
    y: NDArray[Any],
    n: int,
    k: int,
    numbers: tuple[int, int, int, int],
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_dyadic(scale: float, /) -> tuple[int, int]: ...
def ops_requantize(
    x: NDArray[Any],
    y: NDArray[Any],
    multipliers: list[int],
    shifts: list[int],
    inner: int,
    zero: int,
    rounding: str,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_add(
    a: NDArray[Any],
    a_scale: float,
    b: NDArray[Any],
    b_scale: float,
    out_scale: float,
    each: bool,
    y: NDArray[Any],
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_apply(
    function: str,
    x: NDArray[Any],
    scale: float,
    out_scale: float,
    y: NDArray[Any],
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_softmax(
    x: NDArray[Any],
    y: NDArray[Any],
    cols: int,
    scale: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_norm(
    x: NDArray[Any],
    y: NDArray[Any],
    centre: bool,
    scale: float,
    weight: NDArray[Any],
    bias: NDArray[Any] | None,
    eps: float,
    out_scale: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_norm_codes(
    x: NDArray[Any],
    y: NDArray[Any],
    scales: NDArray[Any],
    scale: float,
    weight: NDArray[Any],
    eps: float,
    threads: int,
    isa: str | None,
    /,
) -> None: ...
def ops_sqrt(
    x: NDArray[Any], y: NDArray[Any], ivit: bool, threads: int, isa: str | None, /
) -> None: ...
def ops_compat(
    function: str,
    family: str,
    x: NDArray[Any],
    cols: int,
    scale: float,
    bias: NDArray[Any] | None,
    y: NDArray[Any],
    threads: int,
    /,
) -> None: ...
def isa_report() -> tuple[tuple[str, str | None], ...]: ...
def isa_detected() -> str: ...
def isa_active() -> str: ...
def isa_warning() -> str | None: ...

@final
class SafetensorsReader:
    def __new__(cls, path: str) -> SafetensorsReader: ...
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int]]: ...
    def metadata(self) -> list[tuple[str, str]]: ...
    def read_into(self, name: str, offset: int, out: NDArray[Any], /) -> None: ...

@final
class SafetensorsWriter:
    def __new__(
        cls,
        path: str,
        specs: list[tuple[str, str, tuple[int, ...]]],
        metadata: list[tuple[str, str]],
    ) -> SafetensorsWriter: ...
    def append(self, name: str, data: NDArray[Any], /) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...
