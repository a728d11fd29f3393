"""Checks of the numeric contract on the machine at hand.

:func:`self_test` multiplies a fixed corpus at every ISA level that runs here and compares each
result with the slow reference: bit for bit for the float32 and int8 computes, within the bound for
bfloat16.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core, _threads
from ._api import quantize
from .formats import Format, table
from .qtensor import QTensor

__all__ = ["Case", "Report", "cases", "matmul_bound", "self_test", "values"]

_EXACT = ("f32", "int8", "int8_g32", "int8_g128")
_SHAPES = (
    ("tile_aligned", 32, 32, 128),
    ("unaligned_m", 19, 16, 64),
    ("deep", 3, 17, 517),
    ("shallow", 5, 33, 7),
    ("narrow", 33, 1, 70),
    ("gemv", 1, 50, 200),
)
_GROUPS = ("", "_g32", "_g128", "_g8_sf32", "_g48_sbf16")


class Case(NamedTuple):
    """One product of the corpus."""

    name: str
    x: NDArray[Any]
    weight: QTensor
    compute: str
    bias: NDArray[np.float32] | None


def values(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Return fixed pseudo-random float32 values between -4 and 4, most of them small.

    Made with integer arithmetic alone: the same bits everywhere and for ever.
    """
    n = int(np.prod(shape))
    h = np.arange(n, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    h ^= h >> np.uint64(31)
    fraction = (h >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    exponent = (h & np.uint64(3)).astype(np.int32)
    result: NDArray[np.float32] = np.ldexp(fraction, 2 - exponent).astype(np.float32)
    return result.reshape(shape)


def _weights(w: NDArray[np.float32], name: str) -> QTensor:
    """Return `w` in a format. Where codes take a long search they come from the bits of `w`."""
    fmt = Format(name)
    if fmt.element.span == 1:
        return quantize(w, fmt)
    codes = w.view(np.uint32) >> np.uint32(7) & np.uint32((1 << fmt.element.bits) - 1)
    shape = (len(w), fmt.groups(w.shape[1]))
    scales = np.exp2(np.arange(shape[0] * shape[1]) % 5 - 6).reshape(shape)
    tables: dict[str, Any] = {
        p.name: values(p.shape, 1) for p in fmt.parts(*w.shape) if p.name == "table"
    }
    return QTensor.from_parts(fmt, codes, scales, **tables)


def cases() -> Iterator[Case]:
    """Yield the corpus: every element, group lengths, shapes and computes in turn."""
    seed = 0
    for e, element in enumerate(table()):
        own = len(element.scales) == 1
        for g, group in enumerate(_GROUPS):
            if own and "_s" in group:
                continue
            # Tables share their kernels: half of the corpus is enough for each.
            for s in range(2) if element.linear else [g % 2]:
                shape, m, n, k = _SHAPES[(e + 2 * g + 3 * s) % len(_SHAPES)]
                seed += 1
                w = _weights(values((n, k), seed), element.name + group)
                x: NDArray[Any] = values((m, k), seed + 1_000_000)
                bias = values((n,), seed + 2_000_000) if s else None
                for compute in w.format.computes:
                    name = f"{w.format}-{compute}-{shape}"
                    yield Case(name, x, w, compute, bias)
                if s == 0 and "int8" in element.computes:
                    codes = (x * 31).astype(np.int8)
                    yield Case(f"{w.format}-int8-codes-{shape}", codes, w, "int8", bias)


def matmul_bound(x: NDArray[Any], q: QTensor, compute: str = "f32") -> NDArray[np.float64]:
    """Return the published bound of ``|y - x @ q.dequantize().T|`` for each element of the product.

    Parameters
    ----------
    x : ndarray
        Activations, shape (M, K).
    q : QTensor
        Weights, shape (N, K).
    compute : str, default "f32"
        ``"f32"``, ``"bf16"`` or ``"int8"``.

    Returns
    -------
    ndarray of float64
        Shape (M, N).
    """
    a = np.abs(x.astype(np.float64))
    w = np.abs(q.dequantize().astype(np.float64))
    k = x.shape[-1]
    size: NDArray[np.float64] = a @ w.T
    # The smallest normal number covers what underflows.
    tiny = 2.0**-126 * (1 + k)
    bound: NDArray[np.float64]
    if compute == "f32":
        bound = (k * 2.0**-24 + 2.0**-23) * size + tiny
    elif compute == "bf16":
        # Both operands rounded to 8 bits, subnormals flushed, sums in float32 in any order.
        flushed = tiny * (a.sum(-1)[:, None] + w.sum(-1)[None, :])
        bound = (2.0**-7 + 2.0**-16 + (k + 2) * 2.0**-23) * size + tiny + flushed
    elif compute == "int8":
        # Half a step of the activation scale for each weight, and the roundings of scales and sums.
        step = a.max(-1, initial=0) / 127
        half = 0.5 * (1 + 2.0**-22) * step[:, None] * w.sum(-1)[None, :]
        bound = half + (q.scales.shape[-1] + 4) * 2.0**-23 * (size + half) + tiny
        rounding = q.format.element.rounding
        if rounding:
            # Values of a table that stand as integers: that far from them, on either side.
            wide = np.abs(q.scales.astype(np.float64) * q.tensor_scale).repeat(
                q.format.group or max(k, 1), -1
            )[:, :k]
            bound += 1.001 * rounding * ((a + step[:, None]) @ wide.T)
    else:
        raise ValueError(f"no bound is published for compute={compute!r}")
    return bound


@dataclass
class Report:
    """What a self-test found."""

    levels: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the float32 and int8 results at each ISA level; equal when all is well."""
    cases: int = 0
    """Products computed, over all levels."""
    failures: list[str] = field(default_factory=list)
    """A line for each result that was wrong; empty when all is well."""
    seconds: float = 0.0
    """Time it took."""

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return not self.failures and len(set(self.levels.values())) == 1

    @property
    def hash(self) -> str:
        """SHA-256 of the corpus results at the highest level."""
        return list(self.levels.values())[-1]

    def __bool__(self) -> bool:
        return self.ok

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return {
            "ok": self.ok,
            "hash": self.hash,
            "levels": dict(self.levels),
            "cases": self.cases,
            "failures": list(self.failures),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [f"{name:<12} {value[:16]}" for name, value in self.levels.items()]
        lines += self.failures[:20]
        if len(self.failures) > 20:
            lines.append(f"and {len(self.failures) - 20} more")
        verdict = "passed" if self.ok else "FAILED"
        lines.append(f"{verdict}: {self.cases} products in {self.seconds:.1f} s")
        return "\n".join(lines)


def self_test(*, threads: int | None = None) -> Report:
    """Check every kernel that runs on this machine against the reference.

    Parameters
    ----------
    threads : int, optional
        At most this many threads.

    Returns
    -------
    Report
        True in a condition when everything agreed; prints as a table.

    Notes
    -----
    ``NIBBLAS_ISA`` lowers the highest level. The hashes do not depend on it.
    """
    started = time.perf_counter()
    count = _threads.resolve(threads)
    top = _core.isa_active()
    levels = []
    for name, reason in _core.isa_report():
        if reason is None:
            levels.append(name)
        if name == top:
            break
    report = Report()
    digests = {name: hashlib.sha256() for name in levels}
    for case in cases():
        _check_case(case, digests, count, report)
    report.levels = {name: digest.hexdigest() for name, digest in digests.items()}
    report.seconds = time.perf_counter() - started
    return report


def _check_case(case: Case, digests: dict[str, Any], threads: int, report: Report) -> None:
    storage = case.weight._storage
    packed = storage.pack(threads)
    shape = (len(case.x), storage.rows)
    exact = case.compute in _EXACT
    want = np.empty(shape, np.float32)
    if exact:
        _core.reference(case.x, storage.parts(), want, case.compute, case.bias)
    else:
        dense = case.weight.dequantize().astype(np.float64)
        ideal = case.x.astype(np.float64) @ dense.T
        bound = matmul_bound(case.x, case.weight, case.compute)
        if case.bias is not None:
            ideal += case.bias
            bound += 2.0**-23 * (np.abs(ideal) + bound)
    for name, digest in digests.items():
        got = np.full(shape, np.nan, np.float32)
        _core.matmul(case.x, packed, got, case.compute, case.bias, threads, name)
        report.cases += 1
        if exact:
            wrong = got.view(np.uint32) != want.view(np.uint32)
            digest.update(case.name.encode())
            digest.update(got.tobytes())
        else:
            wrong = ~(np.abs(got - ideal) <= bound)
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            expected = want[i, j] if exact else ideal[i, j]
            report.failures.append(
                f"{name} {case.name}: {int(wrong.sum())} of {wrong.size} values differ, first at "
                f"({i}, {j}): {got[i, j]!r}, expected {expected!r}"
            )
