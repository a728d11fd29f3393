"""Timing side by side, and matrices worth timing."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from ..formats import Element

# A sample shorter than this says more about the clock than about the product.
_SAMPLE = 1e-3


def transformer_weight(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    """Return a matrix with the shape of a transformer's weights: heavy tails and outlier channels.

    Each value is normal with a standard deviation of 0.02, times ``exp(0.3 g)`` of its own normal
    ``g`` (the tails), times ``exp(0.25 g)`` of its row (output channels differ), times 8 in one
    input channel out of 256 (at least one) at random: those where activations are large, too.

    Parameters
    ----------
    rows, cols : int
        N and K.
    seed : int
        Of the generator.
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols), np.float32)
    # In slices, so that the tails need no second matrix of the same size.
    step = max(1, (1 << 20) // cols)
    for start in range(0, rows, step):
        part = w[start : start + step]
        part *= np.exp(0.3 * rng.standard_normal(part.shape, np.float32))
    w *= np.float32(0.02) * np.exp(0.25 * rng.standard_normal((rows, 1), np.float32))
    w[:, outlier_channels(cols, seed)] *= 8
    return w


def outlier_channels(cols: int, seed: int = 0) -> NDArray[np.intp]:
    """Return which input channels :func:`transformer_weight` makes large."""
    rng = np.random.default_rng([seed, 1])
    return rng.choice(cols, max(1, cols // 256), replace=False).astype(np.intp)


def activations(m: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    """Return normal activations, 8 times larger in the outlier channels."""
    x = np.random.default_rng([seed, 2]).standard_normal((m, cols), np.float32)
    x[:, outlier_channels(cols, seed)] *= 8
    return x


def medians(
    functions: dict[str, Callable[[], object]], budget: float, samples: int = 30
) -> dict[str, float]:
    """Return seconds per call of each function: medians of samples taken in turns.

    Turns matter: a machine that becomes slower for a while then does so for all.

    Parameters
    ----------
    functions : dict of str to callable
        What to time.
    budget : float
        Seconds to spend on all together; each is called twice in any case.
    samples : int
        At most so many samples of each.
    """
    loops: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        took = max(time.perf_counter() - start, 1e-7)
        loops[name] = max(1, min(1000, int(_SAMPLE / took)))
        times[name] = [took]
    turn = sum(times[n][0] * loops[n] for n in functions)
    for _ in range(min(samples, int(budget / turn))):
        for name, function in functions.items():
            n = loops[name]
            start = time.perf_counter()
            for _ in range(n):
                function()
            times[name].append((time.perf_counter() - start) / n)
    return {n: statistics.median(t) for n, t in times.items()}


def default_format(element: Element) -> str:
    """Return the name under which demo and bench show an element: its own groups, or 128."""
    return element.name if element.group else f"{element.name}_g128"


@contextlib.contextmanager
def blas_threads(n: int) -> Iterator[int | None]:
    """Give NumPy's BLAS as many threads as nibblas has; None where threadpoolctl is missing."""
    try:
        import threadpoolctl
    except ImportError:
        yield None
        return
    with threadpoolctl.threadpool_limits(n, user_api="blas"):
        yield n


def plot_module() -> Any:
    """Return matplotlib's pyplot, drawing to files; an ImportError that says what to install."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
