"""Quantisers: how codes and scales are found for a float matrix.

``"rtn"``
    Round to nearest: the scale comes from the extreme values of the group, the codes from rounding.
``"mse"``
    Scale search: a grid of scales below the ``"rtn"`` one, the smallest squared error wins.

Each name is accepted as ``method=`` by :func:`nibblas.quantize`.
"""

from __future__ import annotations

from ._obs import obs_scores

__all__ = ["METHODS", "obs_scores"]

METHODS: tuple[str, ...] = ("rtn", "mse")
"""Names accepted as ``method=``."""
