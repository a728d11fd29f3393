"""Products on a CUDA device, for CuPy arrays and whatever speaks DLPack.

Imported when a CuPy array or a ``cuda`` device is first met; importing nibblas loads nothing of it.
"""

from __future__ import annotations

from . import _activations, _arithmetic, _graph, _intops, _panels, _product, _quantize
from ._activations import *  # noqa: F403
from ._arithmetic import *  # noqa: F403
from ._graph import *  # noqa: F403
from ._intops import *  # noqa: F403
from ._panels import *  # noqa: F403
from ._product import *  # noqa: F403
from ._quantize import *  # noqa: F403

__all__ = [
    *_activations.__all__,
    *_arithmetic.__all__,
    *_graph.__all__,
    *_intops.__all__,
    *_panels.__all__,
    *_product.__all__,
    *_quantize.__all__,
]
