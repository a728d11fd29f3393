"""Quantisers: how codes and scales are found for a float matrix, and what to do before.

``"rtn"``
    Round to nearest: the scale comes from the extreme values of the group, the codes from rounding.
``"mse"``
    Scale search: a grid of scales below the ``"rtn"`` one, the smallest squared error wins.

Each name is accepted as ``method=`` by :func:`nibblas.quantize`. :func:`ksort` and :func:`cluster`
reorder channels first, so that outliers share blocks; :class:`MixedLinear` gives blocks formats of
their own; :func:`allocate` gives layers formats within a budget.
"""

from __future__ import annotations

from ._allocate import allocate
from ._ksort import ChannelOrder, HeadOrder, cluster, ksort
from ._methods import METHODS
from ._mixed import MixedLinear
from ._obs import obs_scores

__all__ = [
    "METHODS",
    "ChannelOrder",
    "HeadOrder",
    "MixedLinear",
    "allocate",
    "cluster",
    "ksort",
    "obs_scores",
]
