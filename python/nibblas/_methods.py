"""Names of the ways to quantise."""

from __future__ import annotations

METHODS: tuple[str, ...] = ("rtn", "mse")
"""Names accepted as ``method=``."""
