"""What the codes of a format become in the registers of the tensor cores; see decode.cuh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formats import Element
from ..qtensor import _to_bf16_bits
from ._plan import BF16, E4M3, F16, FLOAT, LINE, PAIRS, S8, SMALL, TABLE

__all__ = ["Worth", "integers", "is_paired", "known", "line", "worth"]


class Worth(NamedTuple):
    """How one class of arithmetic decodes an element."""

    kind: int
    """LINE, PAIRS, FLOAT, TABLE or SMALL."""
    mantissa: int
    """Mantissa bits of FLOAT."""
    tables: tuple[NDArray[Any], ...]
    """Entries of PAIRS and SMALL (16) or TABLE (256) in the class's type; then what they leave
    over."""
    unit: float
    """What 1 in a register is worth."""


def line(element: Element) -> tuple[int, int, float]:
    """Return mul, sub and unit of an element whose code u stands for ``(mul*u - sub) * unit``."""
    values = element.values.astype(np.float64)
    step = values[1] - values[0]
    unit = step if step < 1 else 1.0
    return int(step / unit), -int(values[0] / unit), float(unit)


def integers(element: Element) -> tuple[NDArray[np.int8], float]:
    """Return the integers that stand for the values of a table, and what 1 is worth.

    The least power of two that makes every value an integer of a byte; else 127 steps.
    """
    values = element.values
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore", over="ignore"):
        for power in range(-8, 9):
            scaled = values * np.float32(2.0**power)
            if finite.all() and (scaled == np.trunc(scaled)).all() and np.abs(scaled).max() <= 127:
                return scaled.astype(np.int8), 2.0**-power
        unit = np.abs(values[finite]).max() / np.float32(127)
        nearest = np.clip(np.rint(values / unit), -127, 127)
    return np.where(finite, nearest, 0).astype(np.int8), float(unit)


@functools.cache
def _e4m3() -> dict[float, int]:
    from ..formats import Format

    values = Format("e4m3").element.values
    return {float(v): int(u) for u, v in enumerate(values) if np.isfinite(v) and u != 128}


def eighths(element: Element) -> tuple[NDArray[np.uint8], float] | None:
    """Return the bytes of e4m3 that stand for the values of an element, and what 1 is worth.

    None where some value is no number of e4m3.
    """
    if element.linear:
        mul, sub, _ = line(element)
        return _bytes_of(mul * np.arange(1 << element.bits) - sub, 1.0)
    values = element.values.astype(np.float64)
    for power in sorted(range(-10, 11), key=abs):
        found = _bytes_of(values * 2.0**power, 2.0**-power)
        if found is not None:
            return found
    return None


def _bytes_of(values: NDArray[Any], unit: float) -> tuple[NDArray[np.uint8], float] | None:
    codes = _e4m3()
    if any(np.isfinite(v) and float(v) not in codes for v in values):
        return None
    return np.array([codes.get(float(v), 0x7F) for v in values], np.uint8), unit


def _halves(v: NDArray[np.float32], act: int) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Return the nearest numbers of a 16-bit type as bits, and what they are."""
    if act == F16:
        with np.errstate(over="ignore"):
            half = v.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float32)
    finite = np.isfinite(v)
    bits = np.where(finite, _to_bf16_bits(np.where(finite, v, 0).astype(np.float32)), 0)
    bits = np.where(finite, bits, v.view(np.uint32) >> 16 | np.where(np.isnan(v), 0x40, 0))
    bits = bits.astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def _small_float(element: Element, act: int, finite: bool) -> tuple[int, float] | None:
    """Return mantissa and unit of an element whose bits are moved to those of the 16-bit type."""
    bits, values = element.bits, element.values.astype(np.float64)
    u = np.arange(1 << bits, dtype=np.uint32)
    sign = (u >> (bits - 1)) << 15
    usable = np.isfinite(values) & (values != 0)
    if not usable.any():
        return None
    for mantissa in range(bits - 2):
        up = (10 if act == F16 else 7) - mantissa
        pattern = sign | ((u & ((1 << (bits - 1)) - 1)) << up & 0x7FFF)
        if act == F16:
            register = pattern.astype(np.uint16).view(np.float16).astype(np.float64)
        else:
            bias = (1 << (bits - 2 - mantissa)) - 1
            wide = (pattern << 16).astype(np.uint32).view(np.float32)
            register = wide.astype(np.float64) * 2.0 ** (127 - bias)
        if not np.isfinite(register[usable]).all() or (register[usable] == 0).any():
            continue
        units = values[usable] / register[usable]
        with np.errstate(invalid="ignore"):
            expected = register * units[0]
        same = (expected == values) | (np.isnan(expected) & np.isnan(values))
        if finite:
            same |= ~np.isfinite(values)
        if (units == units[0]).all() and same.all():
            return mantissa, float(units[0])
    return None


def is_paired(element: Element) -> bool:
    """Whether codes lie in pairs, for tables of pairs of values.

    Those of up to four bits, unless their bits can be moved to where a 16-bit float has them.
    """
    if element.linear or element.bits > 4:
        return False
    return any(_small_float(element, act, True) is None for act in (F16, BF16))


@functools.cache
def _worth(name: str, act: int, finite: bool) -> Worth:
    from ..formats import Format

    element = Format(name).element
    if act == E4M3:
        bytes_of = eighths(element)
        if bytes_of is None or (element.linear and element.bits > 4):
            raise ValueError(f"compute='fp8' is not available for {name}: e4m3 lacks its values")
        kind = PAIRS if is_paired(element) else SMALL if element.bits <= 4 else TABLE
        entries = np.resize(bytes_of[0], 256 if kind == TABLE else 16)
        return Worth(kind, 0, (entries,), bytes_of[1])
    if element.linear:
        return Worth(LINE, 0, (), line(element)[2])
    kind, size = (PAIRS, 16) if is_paired(element) else (TABLE, 256)
    if act == S8:
        codes, step = integers(element)
        if (element.rounding == 0) != np.array_equal(codes * np.float32(step), element.values):
            raise ValueError(
                f"compute='int8' is not available for {name} on CUDA: its integers take two bytes"
            )
        if kind == TABLE and element.bits <= 4:
            kind, size = SMALL, 16
        return Worth(kind, 0, (np.resize(codes, size),), step)
    if kind == TABLE:
        found = _small_float(element, act, finite)
        if found is not None:
            return Worth(FLOAT, found[0], (), found[1])
    values = element.values
    # float16 has the room for every table once its top is near 2^14; bfloat16 needs none.
    top = np.abs(values[np.isfinite(values)]).max()
    lift = float(2.0 ** (14 - np.ceil(np.log2(top)))) if act == F16 else 1.0
    rest = (values * np.float32(lift)).astype(np.float32)
    tables = []
    # bfloat16 leaves bits over that float32 activations ask for.
    for _ in range(3 if act == BF16 else 1):
        bits, is_now = _halves(rest, act)
        tables.append(np.resize(bits, size))
        with np.errstate(invalid="ignore"):
            rest = np.where(np.isfinite(rest), rest - is_now, 0).astype(np.float32)
        if not rest.any():
            break
    return Worth(kind, 0, tuple(tables), 1 / lift)


def known(element: Element) -> bool:
    """Whether registers of every class of arithmetic hold the numbers of an element.

    They do not where a code says nothing by itself, has more than eight bits, or reaches beyond
    what the precise part of float16 spans.
    """
    return _known(element.name)


@functools.cache
def _known(name: str) -> bool:
    from ..formats import Format

    element = Format(name).element
    if element.span > 1 or element.bits > 8:
        return False
    if element.linear:
        return True
    numbers = element.values[np.isfinite(element.values)]
    if not numbers.any():
        return False
    found = _worth(name, F16, True)
    if found.kind == FLOAT:
        return True
    half = found.tables[0].view(np.float16)[: len(element.values)].astype(np.float64) * found.unit
    exact = element.values.astype(np.float64)
    finite = np.isfinite(exact)
    return bool((np.abs(half - exact) <= 2.0**-11 * np.abs(exact))[finite].all())


def worth(element: Element, act: int, finite: bool) -> Worth:
    """Return how products in a class of arithmetic decode an element.

    `finite` says that no code of the tensor stands for NaN or an infinity.
    """
    return _worth(element.name, act, finite)
