"""Repeating device work without the host's part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Graph", "graph"]


class Graph:
    """Device work that was captured once; calling it starts it again, on the current stream."""

    __slots__ = ("_executable", "_held", "_launch", "_stream", "result")

    def __init__(self, captured: Any, result: Any, held: tuple[Any, ...]) -> None:
        from cupy.cuda import get_current_stream, runtime

        self._executable = captured.graphExec
        self._launch = runtime.graphLaunch
        self._stream = get_current_stream
        self._held = captured, *held
        self.result = result
        """What the function returned; its arrays are written anew by every call."""

    def __call__(self) -> Any:
        """Start the work and return :attr:`result`; nothing waits."""
        self._launch(self._executable, self._stream().ptr)
        return self.result


def graph(function: Callable[..., Any], *args: Any) -> Graph:
    """Run a function once, then capture what it does on the device.

    A call of the result costs one launch on the host, whatever the function does, where a product
    called from Python costs some 20 us: more than the product itself where rows are few. Operands
    are read where they were: write new values into the same arrays (``x[...] = ...``).

    Parameters
    ----------
    function : callable
        Device work on the current stream alone; it must not wait for the device. Called twice.
    *args
        Its arguments; the graph keeps them.

    Returns
    -------
    Graph

    Examples
    --------
    >>> step = nb.cuda.graph(lambda: nb.matmul(x, qw.T, out=y))  # doctest: +SKIP
    >>> step()  # doctest: +SKIP
    """
    import cupy

    # Compiles, packs, and takes what memory the work needs.
    function(*args)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    # Memory that is freed while the work is captured must not serve anybody else: the graph uses
    # it whenever it runs.
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        function(*args)
        stream.synchronize()
        stream.begin_capture()
        try:
            result = function(*args)
        finally:
            captured = stream.end_capture()
    return Graph(captured, result, (function, args, stream, pool))
