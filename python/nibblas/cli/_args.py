"""Parsers of arguments, shared by the commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeVar

from .. import formats

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def format_name(text: str) -> formats.Format:
    """Parse the name of a format."""
    try:
        return formats.Format(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def shape(text: str) -> tuple[int, int]:
    """Parse ``NxK``: rows (out features) by columns (in features)."""
    parts = text.lower().split("x")
    try:
        rows, cols = (int(p) for p in parts)
    except ValueError:
        rows = cols = 0
    if rows < 1 or cols < 1:
        raise argparse.ArgumentTypeError(f"expected a shape such as 4096x4096, got {text!r}")
    return rows, cols


def listed(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Parse several values, separated by commas."""

    def parse(text: str) -> list[T]:
        return [one(part.strip()) for part in text.split(",")]

    return parse
