"""How many threads a call may use.

Precedence: the ``threads=`` argument, the innermost ``with nb.threads(n)``, ``set_num_threads``
(which is also what threadpoolctl sets), ``NIBBLAS_NUM_THREADS``, the CPUs this process may run on.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from contextvars import ContextVar, Token
from importlib import util
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any, SupportsIndex

from . import _core

__all__ = ["get_num_threads", "set_num_threads", "threads"]

_MAX = 1024
_local: ContextVar[int] = ContextVar("nibblas_threads", default=0)


def cgroup_quota(root: str = "/sys/fs/cgroup") -> float:
    """Return how many CPUs' worth of time the control group grants; infinity without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            text = []
            for name in names:
                with open(os.path.join(root, name), encoding="ascii") as f:
                    text += f.read().split()
            quota, period = text[:2]
            if quota in ("max", "-1"):
                return math.inf
            return int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def available_cpus() -> int:
    """Return the number of CPUs this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def _available() -> int:
    return max(1, math.ceil(min(available_cpus(), cgroup_quota(), _MAX)))


def _check(n: SupportsIndex) -> int:
    try:
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"threads must be an integer, got {type(n).__name__}") from None
    if value < 1:
        raise ValueError(f"threads must be at least 1, got {value}")
    return min(value, _MAX)


def _initial() -> int:
    text = os.environ.get("NIBBLAS_NUM_THREADS", "").strip()
    if text:
        try:
            return _check(int(text))
        except ValueError:
            warnings.warn(
                f"NIBBLAS_NUM_THREADS={text!r} is not a positive integer and is ignored",
                RuntimeWarning,
                stacklevel=2,
            )
    return _available()


_core.set_num_threads(_initial())


def get_num_threads() -> int:
    """Return the number of threads a call made here would use."""
    return _local.get() or _core.get_num_threads()


def set_num_threads(n: SupportsIndex, /) -> None:
    """Set the number of threads for the whole process.

    Parameters
    ----------
    n : int
        At least 1. More than there are cores is allowed; results never depend on it.
    """
    _core.set_num_threads(_check(n))


def resolve(n: SupportsIndex | None) -> int:
    """Return the ``threads=`` argument checked, or what is in force without it."""
    return get_num_threads() if n is None else _check(n)


class threads:
    """Context manager that sets the number of threads for the code inside it.

    The setting belongs to the current context (thread or task), so concurrent blocks do not disturb
    each other.

    Parameters
    ----------
    n : int
        At least 1.
    """

    __slots__ = ("_n", "_tokens")

    def __init__(self, n: SupportsIndex, /) -> None:
        self._n = _check(n)
        self._tokens: list[Token[int]] = []

    def __enter__(self) -> threads:
        self._tokens.append(_local.set(self._n))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _local.reset(self._tokens.pop())


def _register(ctl: ModuleType) -> None:
    """Tell threadpoolctl about the library, so that ``threadpool_limits`` governs it."""
    if not hasattr(ctl, "LibController") or not hasattr(ctl, "register"):
        return  # before version 3.3 it takes no libraries

    class NibblasController(ctl.LibController):  # type: ignore[misc, name-defined]
        user_api = "nibblas"
        internal_api = "nibblas"
        filename_prefixes = ("_core",)
        check_symbols = ("nibblas_get_num_threads", "nibblas_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.nibblas_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.nibblas_set_num_threads(int(num_threads))

        def get_version(self) -> str:
            return _core.__version__

    ctl.register(NibblasController)


class _WhenImported:
    """Registers with threadpoolctl once somebody imports it; doing so here would be slow."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "threadpoolctl" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_threadpoolctl() -> None:
    """Register with threadpoolctl, now if it is imported and otherwise when it is."""
    module = sys.modules.get("threadpoolctl")
    if module is not None:
        _register(module)
    else:
        sys.meta_path.insert(0, _WhenImported())
