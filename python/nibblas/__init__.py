"""nibblas: linear algebra for numbers smaller than a byte.

>>> import numpy as np, nibblas as nb
>>> w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
>>> qw = nb.quantize(w, "int8")
>>> (np.ones(16, dtype=np.float32) @ qw.T).shape
(4,)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _threads, formats, quantizers
from ._api import explain, matmul, quantize
from ._core import __version__
from ._threads import get_num_threads, set_num_threads, threads
from .formats import Format
from .qtensor import QTensor

if TYPE_CHECKING:
    from . import approx, cost, intops, io, testing
    from ._hadamard import hadamard
    from ._info import info
    from ._sparse import DeltaLinear, prune
    from .io import load, save
    from .testing import self_test

__all__ = [
    "DeltaLinear",
    "Format",
    "QTensor",
    "__version__",
    "approx",
    "cost",
    "explain",
    "formats",
    "get_num_threads",
    "hadamard",
    "info",
    "intops",
    "io",
    "load",
    "matmul",
    "prune",
    "quantize",
    "quantizers",
    "save",
    "self_test",
    "set_num_threads",
    "testing",
    "threads",
]

# Loaded when first asked for: importing the package stays cheap.
_LAZY = {
    "DeltaLinear": "_sparse",
    "approx": "",
    "cost": "",
    "cuda": "",
    "hadamard": "_hadamard",
    "info": "_info",
    "intops": "",
    "io": "",
    "load": "io",
    "prune": "_sparse",
    "save": "io",
    "self_test": "testing",
    "testing": "",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not module:
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_threads.register_threadpoolctl()
