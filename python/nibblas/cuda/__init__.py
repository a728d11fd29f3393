"""Products on a CUDA device, for CuPy arrays and whatever speaks DLPack.

Imported when a CuPy array or a ``cuda`` device is first met; importing nibblas loads nothing of it.
"""

from __future__ import annotations

from ._product import (
    Panels,
    Storage,
    explain,
    is_device_array,
    place,
    product,
    product_both,
    require,
)

__all__ = [
    "Panels",
    "Storage",
    "explain",
    "is_device_array",
    "place",
    "product",
    "product_both",
    "require",
]
